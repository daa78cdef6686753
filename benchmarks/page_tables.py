"""The contents of the report as tables: the sections for each kind of results, with words and units for readers."""

from dataclasses import dataclass, field
from pathlib import Path

from . import kernel_page, parity, peak
from .units import NONE, between, count, interval, number, percent, quantity, times

RIVALS = {
    "fused": "PyTorch's fused way", "naive": "PyTorch, operation by operation", "compiled": "torch.compile",
    "sdpa": "PyTorch's SDPA", "eager": "transformers, eager attention", "liger": "Liger's kernel",
    "quack (no bias)": "Quack's kernel, without a bias", "transformers": "transformers",
    "compiled_transformers": "transformers in torch.compile",
}  # fmt: skip
BOUNDS = dict(read="memory, reading", copy="memory, copying", fma="float32 arithmetic", dot="bfloat16 arithmetic")
MODES = dict(fwd="", bwd="backward pass", fwd_bwd="forward and backward pass")


@dataclass
class Row:
    cells: list[str]  # text after a line break is small: a spread, or what a share refers to
    tags: dict[str, str] = field(default_factory=dict)  # dtype, backend, architecture: for the filter
    bad: bool = False


@dataclass
class Table:
    """A table. ``texts`` columns of text come first, and numbers follow. ``note`` says what the numbers are."""

    title: str
    header: list[str]
    rows: list[Row]
    texts: int = 1
    note: str = ""


@dataclass
class Bar:
    name: str
    rival: str
    ratio: dict
    tags: dict[str, str]


def fair(row: dict) -> str | None:
    """The way that a row of an op is compared with: the fastest one that is PyTorch's or a library's own.

    Our own backends and references do not count. Neither does PyTorch operation by operation, if it is the only way.
    """
    known = [name for name in row.get("seconds", {}) if name in RIVALS]
    if known in ([], ["naive"]):
        return None
    return min(known, key=lambda name: row["seconds"][name]["median"])


def case(row: dict) -> str:
    return " ".join(filter(None, (row["label"], MODES.get(row.get("mode", "fwd"), row.get("mode")))))


def failure(row: dict) -> str:
    """Why a row was not timed."""
    broken = "breaks the parity rule" in row["failed"]
    return "not timed: parity failed" if broken else f"not timed: {row['failed']}"


def timed(found: dict) -> str:
    return f"{quantity(found['median'], 's')}\n{interval(found, 's')}"


def spread(ratio: dict) -> str:
    return f"{times(ratio['median'])}\n{between(ratio)}"


def held(row: dict, way: str) -> str:
    """The most memory that our call holds, and below it that of the other way."""
    memory = row.get("memory", {})
    if memory.get("ours") is None:
        return NONE
    other = f"\nits {quantity(memory[way], 'B')}" if memory.get(way) is not None else ""
    return quantity(memory["ours"], "B") + other


def of_ops(results: dict) -> Table:
    rows = []
    measured = any("memory" in row for row in results["rows"])  # earlier versions did not measure it
    for row in results["rows"]:
        first, tags = [row["op"], case(row), row["dtype"]], dict(dtype=row["dtype"])
        if "failed" in row:
            rows.append(Row([*first, failure(row), *[NONE] * (6 + measured)], tags, bad=True))
            continue
        way = fair(row) or "naive"
        memory = "share" in row and (row["outside_cache"] or row["bound"] not in ("read", "copy"))
        compared = way in row["ratios"]
        rows.append(Row([
            *first, RIVALS[way] if compared else NONE, timed(row["seconds"]["ours"]),
            quantity(row["seconds"][way]["median"], "s") if compared else NONE,
            spread(row["ratios"][way]) if compared else NONE,
            quantity(row.get("bytes_per_second"), "B/s"),
            quantity(row.get("flops_per_second") or None, "FLOP/s"),
            f"{percent(row['share']['median'])}\n{BOUNDS[row['bound']]}" if memory else NONE,
            *([held(row, way)] if measured else []),
        ], tags))  # fmt: skip
    header = ["op", "case", "dtype", "compared with", "our time", "its time", "ratio", "bytes a second",
              "operations a second", "share of the limit", *(["memory"] if measured else [])]  # fmt: skip
    note = (
        "Medians of rounds in which ours and the other ways take turns; below them, the 10 % and 90 % quantiles. A "
        "ratio above 1 means that ours is faster. The share is that of the least time that memory or arithmetic, "
        "measured in the same rounds, would need; there is none for memory where a case fits into the caches."
    )
    if measured:
        note += " Memory is the most that a call holds beyond its inputs."
    return Table("Ops: all numbers", header, rows, 4, note)


def of_parity(results: dict) -> Table:
    rows = []
    for row in results["rows"]:
        first, tags = [row["op"], row["label"], row["dtype"]], dict(dtype=row["dtype"])
        bad = not row.get("keeps")
        if "failed" in row:
            rows.append(Row([*first, f"failed: {row['failed']}", *[NONE] * 6], tags, bad))
        elif "equal" in row:
            same = "equal" if row["equal"] else "not equal"
            rows.append(Row([*first, f"{row['output']}: {same}", *[NONE] * 6], tags, bad))
        else:
            rows.append(Row([*first, row["output"], *map(number, parity.steps(row))], tags, bad))
    header = ["op", "case", "dtype", "output", "RMS error, ours", "PyTorch's own", "bound", "largest error, ours",
              "PyTorch's own", "bound"]  # fmt: skip
    note = (
        "Errors against float64, in rounding steps of the output. The bound is twice plain PyTorch's own error plus "
        "one rounding step; a kernel whose error is larger is not timed."
    )
    return Table("Parity: how far from the truth", header, rows, 4, note)


def of_check(results: dict) -> Table:
    """What ``gpt2fast check --json`` printed: a row for each op, with how many of its runs and checks hold."""
    rows = []
    for key, found in results["ops"].items():
        runs, promises = ([row for row in found if kind in row] for kind in ("layout", "promise"))
        failures = [row["error"] for row in found if row.get("error")]
        missing = ", ".join(row["target"] for row in found if row.get("missing"))
        counts = [f"{count(sum(not row['error'] for row in some))} of {count(len(some))}" for some in (runs, promises)]
        rows.append(Row([key, failures[0] if failures else NONE, missing or NONE, *counts], bad=bool(failures)))
    header = ["op", "first failure", "no kernel for", "runs within the parity rule", "checks of the contract that hold"]
    note = "What gpt2fast check found: cases, dtypes, targets and layouts, and the promises that every op makes."
    return Table("Checks", header, rows, 3, note)


def work(row: dict) -> str:
    B, P = row["case"].split("x")
    what = f"after {P} tokens" if row["what"] == "decode" else f"{P} tokens"
    return f"{row['what']}, batch of {B}, {what}"


def of_model(results: dict) -> Table:
    rows = []
    for row in results["rows"]:
        first, tags = [work(row), row["dtype"]], dict(dtype=row["dtype"])
        if "failed" in row:
            rows.append(Row([*first, failure(row), *[NONE] * 5], tags, bad=True))
            continue
        rates = [number(row["rate"].get(name)) for name in ("native", "drop-in", row["best"])]
        ratios = [spread(row["ratio"][name]) if name in row["ratio"] else NONE for name in ("native", "drop-in")]
        share = row.get("share", {}).get("native")
        share = percent(share["median"]) if share else NONE
        rows.append(Row([*first, *rates, *ratios, share], tags))
    header = ["work", "dtype", "native, tokens/s", "drop-in, tokens/s", "transformers, tokens/s", "native, ratio",
              "drop-in, ratio", "native, share of read bandwidth"]  # fmt: skip
    note = (
        "GPT-2 124M with random weights. Native is gpt2fast.GPT2, drop-in is gpt2fast.GPT2LMHeadModel; both are "
        "compared with transformers in its faster attention. The share is that of reading all weights once a token. A "
        "training step is forward pass, backward pass and PyTorch's fused AdamW, the same on both sides."
    )
    return Table("The whole model", header, rows, 2, note)


def of_fresh(found: dict) -> Table:
    bare = "a process that only imports torch"
    rows = [
        Row(["peak memory above " + bare, quantity(found["memory"] * found["weights"], "B"),
             f"{times(found['memory'])} the weights, {quantity(found['weights'], 'B')}"]),
        Row(["start of the process to the first token", quantity(found["native_seconds"], "s"),
             f"{times(found['start'])} {bare}, {quantity(found['bare_seconds'], 's')}"]),
    ]  # fmt: skip
    note = "Fresh processes that load the native model in float32 and make 32 tokens after 32."
    return Table("Memory and start", ["what", "measured", "compared"], rows, 3, note)


def of_machine(results: dict) -> list[tuple[str, str]]:
    names = dict(cpu="processor", isa="instruction set", threads="threads", torch="torch", python="Python",
                 system="system", freed_memory_kept="freed memory kept")  # fmt: skip
    machine = dict(results["machine"])
    if "freed_memory_kept" in machine:
        machine["freed_memory_kept"] = "yes" if machine["freed_memory_kept"] else "no"
    return [(names.get(key, key.replace("_", " ")), str(value)) for key, value in machine.items()]


def limits(results: dict) -> dict[str, float]:
    """The machine's limits, as they stand at the head of the page and in the roofline."""
    return peak.limits(results["peaks"], results["machine"]["threads"])


def of_limits(results: dict) -> list[tuple[str, str]]:
    found = limits(results)
    return [
        ("memory, reading", quantity(found["read"], "B/s")), ("memory, copying", quantity(found["copy"], "B/s")),
        ("float32 multiply-add", quantity(found["fma"], "FLOP/s")),
        ("bfloat16 pair product", quantity(found["dot"], "FLOP/s")),
    ]  # fmt: skip


def bars_of_ops(results: dict) -> tuple[list[Bar], list[str]]:
    """The bars, and the rows that have no bar, each with the reason."""
    bars, without = [], []
    for row in results["rows"]:
        name = f"{row['op']} {case(row)}"
        if "failed" in row:
            without.append(f"{name} {row['dtype']} ({failure(row)})")
        elif (way := fair(row)) is None:
            without.append(f"{name} {row['dtype']} (PyTorch has no fused way)")
        else:
            bars.append(Bar(name, RIVALS[way], row["ratios"][way], dict(dtype=row["dtype"])))
    return bars, without


def bars_of_model(results: dict) -> list[Bar]:
    rivals = dict(sdpa="transformers with SDPA", eager=RIVALS["eager"])
    return [
        Bar(f"{name}: {work(row)}", rivals[row["best"]], ratio, dict(dtype=row["dtype"]))
        for row in results["rows"] if "failed" not in row for name, ratio in row["ratio"].items()
    ]  # fmt: skip


UNITS = {"bytes / least": "bytes moved, of the least", "sectors / ideal": "sectors, of the ideal",
         "conflicts a request": "bank conflicts a request",
         "products / least": "products, of the least"}  # fmt: skip


def of_kernels(path: Path = kernel_page.COUNTS) -> list[Table]:
    """The tables of the counts of GPU kernels, one for each architecture. Raises ValueError if the file has none."""
    header = [UNITS.get(name, name) for name in kernel_page.HEADS]
    found = []
    for architecture, counted in kernel_page.read(path).items():
        rows = [Row([cell.replace("%", "\u00a0%") for cell in kernel_page.cells(row)],
                    dict(dtype=row[1], backend=row[2], architecture=architecture)) for row in counted]  # fmt: skip
        found.append(Table(f"Architecture {architecture}", header, rows, 4))
    return found
