"""The README's table of gpt2fast beside other engines, from a result of ``python -m benchmarks.peers``."""

import json
import re
from pathlib import Path

from .peer_agreement import share
from .peer_engines import OURS, WIDTHS
from .peers import ENGINES, SIZES
from .readme_cells import listed, ratio, work
from .table import markdown
from .units import number

NAMES = {
    OURS: "gpt2fast", "transformers": "transformers", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO",
    "ctranslate2": "CTranslate2", "llama-cpp-python": "llama.cpp",
}  # fmt: skip
KEYS = ("made_by", "machine", "size", "rows", "absent", "versions")
NO_WEIGHTS = "has no "  # how benchmarks.peers begins to say that an engine has no weights of a width
PATH = re.compile(r"(?<![\w.:/])~?/(?=[^\s/])(?:[^\s/'\"]+/)*")  # what stands before the last name of a path
SINGLE = "figures"  # the key of a row under which benchmarks.peers keeps the single rounds


def read(path: str | Path) -> dict | None:
    """The results of a file that benchmarks.peers wrote. None for a file of another kind, or that is no JSON.

    Raises ValueError where the results lack what the table needs.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("kind") != "peers":
        return None
    if missing := [key for key in KEYS if not found.get(key)]:
        raise ValueError(f"benchmarks.readme: {path}: expected the JSON of a run of benchmarks.peers with "
                         f"{', '.join(KEYS)}; got none of {', '.join(missing)}: run it with --out")  # fmt: skip
    if OURS not in found["versions"] or not columns(found):
        got = listed(list(found["versions"])) or "none"
        raise ValueError(f"benchmarks.readme: {path}: expected {OURS} and at least one other engine that ran; the "
                         f"engines of the run are {got}: run benchmarks.peers with others by --engines")  # fmt: skip
    return found


def to_publish(found: dict) -> dict:
    """The results without single rounds. Of paths, in errors of engines and as the size, only the file name is kept."""

    def clean(reasons: dict[str, str]) -> dict[str, str]:
        return {name: PATH.sub("", why) for name, why in reasons.items()}

    rows = [
        {name: value for name, value in row.items() if name != SINGLE} | dict(refused=clean(row["refused"]))
        for row in found["rows"]
    ]
    absent = {width: clean(reasons) for width, reasons in found["absent"].items()}
    return found | dict(rows=rows, absent=absent, size=Path(found["size"]).name)


def columns(found: dict) -> list[str]:
    """The other engines that ran: their tokens were judged in at least one row."""
    ran = {name for row in found["rows"] for name in (*row["rate"], *row["refused"])}
    return [name for name in NAMES if name in ran and name != OURS]


def table(found: dict) -> str:
    engines = columns(found)
    header = [f"GPT-2 {found['size']} against other engines", "weights", "tokens/s", "of the read bandwidth"]
    lines = []
    for row in sorted(found["rows"], key=lambda row: WIDTHS.index(row["dtype"])):
        part = row.get("share", {}).get(OURS)
        lines.append([
            work(row["what"], row["case"]),
            row["dtype"],
            number(row["rate"][OURS]) if OURS in row["rate"] else unknown(found, row, OURS),
            f"{100 * part['median']:.0f} %" if part else "–",
            *(cell(found, row, name) for name in engines),
        ])  # fmt: skip
    return markdown([*header, *(f"× {NAMES[name]}" for name in engines)], lines, text_columns=2)


def cell(found: dict, row: dict, name: str) -> str:
    """The ratio of our speed to that of an engine. Where only the engine was timed, its own speed."""
    if name in row["ratio"]:
        return ratio(row["ratio"][name])
    return f"{number(row['rate'][name])} tokens/s" if name in row["rate"] else unknown(found, row, name)


def unknown(found: dict, row: dict, name: str) -> str:
    """What stands for an engine that was not timed in this row."""
    if name in row["refused"]:
        return "not timed"
    why = found["absent"].get(row["dtype"], {}).get(name, "")
    return "–" if why.startswith(NO_WEIGHTS) else "not run"


def not_run(found: dict) -> list[str]:
    """The engines that did not run, each with the widths if it ran at others, and the reason."""
    made = []
    for name, shown in NAMES.items():
        if name not in found["versions"]:
            made += [] if name == "transformers" else [f"{shown} (left out)"]  # it has the table before this one
            continue
        reasons = {width: absent[name] for width, absent in found["absent"].items() if name in absent}
        others = {width: why for width, why in reasons.items() if not why.startswith(NO_WEIGHTS)}
        if name not in (*columns(found), OURS):
            others = others or reasons
        by_reason: dict[str, list[str]] = {}
        for width, why in others.items():
            by_reason.setdefault("not installed" if why.startswith("not installed") else why, []).append(width)
        for why, widths in by_reason.items():
            whole = name not in columns(found) and len(by_reason) == 1 and name != OURS
            made.append(f"{shown} ({why})" if whole else f"{shown} in {listed(widths)} ({why})")
    return made


def not_timed(found: dict) -> list[str]:
    """Where an engine ran without being timed, and why. Places with one reason are joined."""
    places: dict[tuple[str, str], list[str]] = {}
    for row in found["rows"]:
        for name, why in row["refused"].items():
            places.setdefault((name, why), []).append(f"{work(row['what'], row['case'])}, {row['dtype']}")
    return [f"{NAMES[name]} at {'; '.join(where)}: it {reason(why)}." for (name, why), where in places.items()]


def reason(why: str) -> str:
    """The reason as the end of a sentence that begins with "it"."""
    return why if why.startswith(("differs", "takes")) else f"failed with this message: {why}"


def judged(found: dict, width: str) -> list[str]:
    """The engines whose tokens are listed: those with narrower weights, and those that compute in fewer bits."""
    names = (OURS, *columns(found))
    return [name for name in names if width != "float32" or not ENGINES[name].exact]


def same_tokens(found: dict) -> list[str]:
    """How many tokens of such engines are those that transformers chooses in float32, in the rows of decoding that
    all of them ran. Rows with far fewer are named."""
    made, low = [], []
    for width in WIDTHS:
        agreements = {}
        for row in (row for row in found["rows"] if row["dtype"] == width and row["what"] == "decode"):
            here = {n: row["agreement"][n] for n in judged(found, width) if n in row["rate"] and n in row["agreement"]}
            agreements[work(row["what"], row["case"])] = here
        names = [name for name in judged(found, width) if any(name in here for here in agreements.values())]
        common = [here for here in agreements.values() if all(name in here for name in names)]
        shares = {}
        for name in names if common else ():
            same = sum(share(here[name]) * here[name]["tokens"] for here in common)
            shares[name] = same / sum(here[name]["tokens"] for here in common)
        if shares:
            made.append(f"{width}: {listed([f'{NAMES[n]} {100 * part:.0f} %' for n, part in shares.items()])}.")
        for where, here in agreements.items():
            best = max(map(share, here.values()), default=0)
            low += [
                f"{NAMES[name]} chooses {100 * share(each):.0f} % of them at {where}, {width}, where another engine "
                f"chooses {100 * best:.0f} %."
                for name, each in here.items()
                if share(each) < best / 3
            ]
    return made + low


def versions(found: dict, name: str) -> str:
    """An engine's name with its packages; transformers, which most engines read the weights by, is named once."""
    packages = {p: v for p, v in found["versions"][name].items() if p != "transformers"}
    return NAMES[name] + (f" ({', '.join(f'{p} {v}' for p, v in packages.items())})" if packages else "")


def plural(amount: int, word: str) -> str:
    return f"{amount} {word}{'' if amount == 1 else 's'}"


def command(text: str, width: int = 116) -> str:
    """A block of code with the command, in several lines where it is long."""
    lines = [""]
    for part in re.split(r"\s(?=--)", text):
        if lines[-1].strip() and len(lines[-1]) + len(part) > width:
            lines.append("   ")
        lines[-1] += f" {part}" if lines[-1] else part
    return "```sh\n" + " \\\n".join(lines) + "\n```"


def parts(found: dict) -> list[str]:
    """The paragraphs and the table."""
    machine, made_by = found["machine"], found["made_by"]
    made_with = made_by["versions"]
    rounds = sorted({row["rounds"] for row in found["rows"] if row["rate"]} or {0})
    turns = f"{rounds[0]} to {rounds[-1]} rounds" if len(rounds) > 1 else plural(rounds[0], "round")
    measured = (
        f"gpt2fast beside {listed([versions(found, name) for name in columns(found)])}, on {made_by['date']} on "
        f"{machine['cpu']} ({machine['isa']}), {plural(machine['threads'], 'thread')} for every engine, with torch "
        f"{made_with['torch']} and transformers {made_with['transformers']}. Each engine runs in a process of its own, "
        f"and they took turns for {turns}. A ratio is gpt2fast's speed divided by the other engine's in the same "
        f"round: the median, with the 10 % and 90 % quantiles. Below 1 the other engine is faster. The share of the "
        f"read bandwidth is given for decode: the bytes of gpt2fast's weights, without its cache, that it reads in a "
        f"second, over the bandwidth measured before and after each turn. It can exceed 100 % where caches keep "
        f"weights or the bandwidth changes meanwhile. A dash among the ratios: the engine has no weights of that "
        f"width. Weights of one width differ between engines in their scales and in the table of tokens "
        f"(docs/start.md)."
    )
    absent, untimed, tokens = not_run(found), not_timed(found), same_tokens(found)
    notes = [f"Not run: {', '.join(absent)}."] if absent else []
    notes += [f"Not timed: {' '.join(untimed)}"] if untimed else []
    if tokens:
        notes.append(f"Tokens that are transformers' choice in float32, or a near-tie of it: {' '.join(tokens)}")
    if found["size"] in SIZES:
        notes.append("Weights and prompts are random, so these shares do not tell how good a trained model is.")
    repeat = 'This command repeats the run; `pip install "gpt2fast[peers]"` brings the engines:'
    return [measured, repeat, command(made_by["command"]), table(found), " ".join(notes)]
