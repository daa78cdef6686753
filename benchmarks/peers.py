"""gpt2fast and other engines on the CPU: ``python -m benchmarks.peers [--engines A,B] [--widths A,B] [--out FILE]``.

All engines read the same weights and generate greedily. Before an engine is timed, transformers' logits judge its
tokens (``peer_agreement.py``). Then the engines of one width take turns, each in a process of its own, and ratios come
from pairs of the same round. For t(n), the seconds for n new tokens after B prompts of P tokens, in tokens per second:
prefill = P B / t(1) and decode = B (n - 1) / (t(n) - t(1)). Nothing is installed: packages that are missing are named.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from gpt2fast import backends

from . import peak
from .options import parse_list, positive
from .output import folder as writable_folder
from .output import json_file, origin, write
from .peer_agreement import Judge, refusal, share
from .peer_ctranslate2 import CTranslate2
from .peer_engines import OURS, WIDTHS, Engine, Gpt2fast, Rows, Transformers
from .peer_llama import LlamaCpp
from .peer_onnx import OnnxRuntime
from .peer_openvino import OpenVino
from .peer_process import EngineFailed, Process
from .table import show
from .timing import ratios, summarise

KINDS: tuple[type[Engine], ...] = (Gpt2fast, Transformers, OnnxRuntime, OpenVino, CTranslate2, LlamaCpp)
ENGINES = {kind.name: kind for kind in KINDS}
# Rows, prompt, new tokens.
WORK = dict(decode=(1, 32, 33), long=(1, 512, 33), batch=(8, 32, 17), prefill=(1, 512, 1))
SIZES: dict[str, dict] = {
    "124M": {},
    "tiny": dict(n_layer=2, n_embd=128, n_head=2, vocab_size=1003, n_positions=128),
}
# transformers starts GPT-2 at 0.02. Then the embedding of a token outweighs all layers, and every token is repeated.
GAIN = 1.13  # the standard deviation of weights is GAIN / sqrt(n_embd): layers neither shrink nor blow up
PAUSE = 0.2  # seconds before each turn, in which the threads of the engine before it stop waiting for work
HEADER = ["case", "dtype", "engine", "tokens/s", "±%", "gpt2fast is", "q10-q90", "bandwidth", "same tokens"]


def make_checkpoint(folder: Path, size: str, seed: int = 0) -> Path:
    """A GPT-2 with random weights as a transformers checkpoint, or the checkpoint that ``size`` names."""
    import transformers

    if size not in SIZES:
        return Path(size)
    path = folder / f"checkpoint-{size}-{seed}"
    if not (path / "model.safetensors").exists():
        torch.manual_seed(seed)
        sizes = dict(n_embd=768, bos_token_id=0, eos_token_id=0) | SIZES[size]
        sizes["initializer_range"] = GAIN / sizes["n_embd"] ** 0.5
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
        for block in model.transformer.h:
            # GELU's outputs have a mean above 0. Its product with the weights would be the same vector for all tokens,
            # and one token would always win.
            weight = block.mlp.c_proj.weight.data
            weight -= weight.mean(0)
        model.save_pretrained(path)
    return path


def make_prompts(work: str, config: dict) -> tuple[Rows, int]:
    """The prompts of a kind of work, and the number of new tokens. A prompt is shorter where positions are few."""
    B, P, new = WORK[work]
    P = min(P, config["n_positions"] - new)
    if P < 1:
        raise ValueError(f"benchmarks.peers: {work} needs {new + 1} positions, the model has {config['n_positions']}")
    draw = torch.Generator().manual_seed(P)
    return torch.randint(0, config["vocab_size"], (B, P), generator=draw).tolist(), new


def start(kinds: Sequence[type[Engine]], width: str, threads: int, checkpoint: Path, folder: Path) -> tuple:
    """The running engines with the bytes that a step reads, and why the others do not run, by name."""
    running, absent = {}, {}
    for kind in kinds:
        if width not in kind.bits:
            absent[kind.name] = f"has no {width} weights"
        elif missing := kind.missing(width):
            absent[kind.name] = f"not installed: pip install {' '.join(missing)}"
        else:
            process = Process(kind, width, threads)
            try:
                place = folder / f"{kind.name}-{width}"
                place.mkdir(parents=True, exist_ok=True)
                running[kind.name] = process, process.build(checkpoint, place)
            except EngineFailed as error:
                process.close()
                absent[kind.name] = f"could not load the model: {error}"
    return running, absent


def take_turns(running: dict, tokens: Rows, new: int, rounds: int, probe) -> dict[str, list[dict]]:
    """The figures of each engine in each round: seconds, and the read bandwidth before and after its turn."""
    found: dict[str, list[dict]] = {name: [] for name in running}
    for turn in range(rounds):
        for name in running if turn % 2 else reversed(running):
            time.sleep(PAUSE)
            before = probe()
            figures = running[name][0].clock(tokens, new)
            found[name].append(dict(turn=turn, seconds=figures, read=[before, probe()]))
    return found


def run_work(running: dict, kinds: dict, work: str, width: str, judge: Judge, rounds: int, probe) -> dict:
    """A row of results: the engines whose tokens agree, timed, and why the others are not."""
    tokens, new = make_prompts(work, judge.config)
    row = dict(case=f"{len(tokens)}x{len(tokens[0])}", dtype=width, what="prefill" if new == 1 else "decode", new=new,
               agreement={}, refused={})  # fmt: skip
    timed = {}
    for name, (process, nbytes) in running.items():
        if len(tokens) > 1 and not kinds[name].batches:
            row["refused"][name] = "takes one row at a time"
            continue
        try:
            row["agreement"][name] = found = judge(tokens, process.decode(tokens, new), new)
        except EngineFailed as error:
            row["refused"][name] = str(error)
            continue
        if reason := refusal(found, width == "float32" and kinds[name].exact):
            row["refused"][name] = reason
        else:
            timed[name] = process, nbytes
    turns = take_turns(timed, tokens, new, rounds, probe)
    return row | summary(turns, {name: nbytes for name, (_, nbytes) in timed.items()}, tokens, row["what"], new)


def summary(turns: dict[str, list[dict]], nbytes: dict[str, float], tokens: Rows, what: str, new: int) -> dict:
    """Medians and quantiles of each engine, ratios of pairs with ours, and shares of the read bandwidth."""
    seconds = {name: [turn["seconds"][what] for turn in each] for name, each in turns.items()}
    work = len(tokens) * (len(tokens[0]) if what == "prefill" else new - 1)
    made = dict(
        rounds=max(map(len, turns.values()), default=0),
        figures=turns,
        seconds={name: summarise(times) for name, times in seconds.items()},
        rate={name: work / summarise(times)["median"] for name, times in seconds.items()},
        ratio={n: ratios(times, seconds[OURS]) for n, times in seconds.items() if n != OURS and OURS in seconds},
    )
    if what == "decode":
        steps = {n: [(new - 1) / s for s in times] for n, times in seconds.items()}
        made["weights"] = nbytes
        made["share"] = {
            name: summarise([nbytes[name] * s / (sum(turn["read"]) / 2) for s, turn in zip(steps[name], each)])
            for name, each in turns.items()
        }
    return made


def cells(row: dict) -> list[list[str]]:
    """The lines of the table, an engine each."""
    lines = []
    B, P = row["case"].split("x")
    first = [f"batch {B}, {'prompt' if row['what'] == 'prefill' else 'after'} {P}", row["dtype"]]
    for name, rate in row["rate"].items():
        found, ratio, part = row["seconds"][name], row["ratio"].get(name), row.get("share", {}).get(name)
        spread = 50 * (found["q90"] - found["q10"]) / found["median"]
        against = [f"{ratio['median']:.2f}x", f"{ratio['q10']:.2f}-{ratio['q90']:.2f}"] if ratio else ["", ""]
        lines.append([*first, name, f"{rate:.1f}", f"{spread:.0f}", *against,
                      f"{100 * part['median']:.0f}%" if part else "",
                      f"{100 * share(row['agreement'][name]):.0f}%"])  # fmt: skip
    lines += [[*first, name, "FAILED", *[""] * (len(HEADER) - 4)] for name in row["refused"]]
    return lines


def run(kinds: Sequence[type[Engine]], widths: Sequence[str], works: Sequence[str], size: str, rounds: int,
        folder: Path, made_by: dict | None = None, each=None) -> dict:  # fmt: skip
    """All rows. ``absent`` says by width and engine why an engine did not run. ``each`` is called after every row."""
    checkpoint = make_checkpoint(folder, size)
    judge, threads = Judge(checkpoint), torch.get_num_threads()
    for work in works:
        make_prompts(work, judge.config)  # raises before anything is measured
    machine_probe = peak.Probe(huge=True, nbytes=peak.ARRAY)
    found = dict(kind="peers", made_by=made_by, machine=peak.machine(), size=size, rows=[], absent={},
                 versions={kind.name: kind.versions() for kind in kinds})  # fmt: skip
    for width in widths:
        running, found["absent"][width] = start(kinds, width, threads, checkpoint, folder)
        try:
            for work in works:
                by_name = {kind.name: kind for kind in kinds}
                found["rows"].append(
                    run_work(running, by_name, work, width, judge, rounds, lambda: machine_probe("read"))
                )
                each and each(found)
        finally:
            for process, _ in running.values():
                process.close()
    return found


def notes(found: dict) -> list[str]:
    """Lines under the table: what did not run and why, each once, and near-ties."""
    lines: dict[str, list[str]] = {}
    for width, absent in found["absent"].items():
        for name, why in absent.items():
            lines.setdefault(f"{name}: {why}", []).append(width)
    made = [text if "not installed" in text else f"{text} ({', '.join(widths)})" for text, widths in lines.items()]
    if any("not installed" in text for text in made):
        made.append('All engines: pip install "gpt2fast[peers]"')
    for row in found["rows"]:
        where = f"{row['what']} {row['case']} {row['dtype']}"
        made += [f"{where}, {name}: not timed: {why}" for name, why in row["refused"].items()]
        for name, agreement in row["agreement"].items():
            if row["dtype"] == "float32" and (ties := agreement["near_ties"]):
                made.append(f"{where}, {name}: {len(ties)} tokens are the other one of a near-tie")
    return made


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.split("\n")[0])
    add = made.add_argument
    for flag, known in (("--engines", ENGINES), ("--widths", WIDTHS), ("--work", WORK)):
        add(flag, type=parse_list(known), default=list(known), metavar="A,B", help=f"of {', '.join(known)}")
    add("--size", default="124M", metavar="SIZE", help="124M or tiny, with random weights, or a checkpoint's folder")
    add("--rounds", type=positive, default=5, metavar="N", help="turns of each engine (default 5)")
    add("--threads", type=positive, metavar="N", help="default: torch's")
    add("--folder", type=writable_folder, metavar="FOLDER", help="keep the engines' models there")
    add("--out", type=json_file, metavar="FILE", help="write JSON with the figures of each round")
    return made


def main(argv: list[str] | None = None) -> int:
    args = (made := parser()).parse_args(argv)
    if args.size not in SIZES and not (Path(args.size) / "config.json").is_file():
        made.error(f"--size must be {', '.join(SIZES)} or a folder with config.json and weights, got {args.size!r}")
    if backends._C is None:
        made.error(f"the read bandwidth is measured by the C++ extension: {backends.status()['cpu']}")
    if args.threads:
        torch.set_num_threads(args.threads)
    kinds = [ENGINES[name] for name in args.engines]
    with tempfile.TemporaryDirectory() as temporary:
        place = args.folder or Path(temporary)
        made_by = origin("python -m benchmarks.peers", argv)

        def each(found: dict) -> None:
            write(found, args.out if args.out != "-" else None)
            for line in cells(found["rows"][-1]):
                print(*line, sep="  ", file=sys.stderr, flush=True)

        try:
            found = run(kinds, args.widths, args.work, args.size, args.rounds, place, made_by, each)
        except ValueError as error:
            made.error(str(error))
    if args.out == "-":
        write(found, "-")
        return 0
    machine = found["machine"]
    title = f"{args.size} on {machine['cpu']}, {machine['isa']}, {machine['threads']} threads for every engine"
    show(HEADER, [line for row in found["rows"] for line in cells(row)], title, 3)
    for line in notes(found):
        print(line)
    return int(any(row["refused"] for row in found["rows"]))


if __name__ == "__main__":
    sys.exit(main())
