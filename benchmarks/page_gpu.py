"""Tables and bars for the results of benchmarks.gpu, a run on a machine with a GPU."""

from .page_tables import RIVALS, Bar, Row, Table, spread, timed
from .units import NONE, count, number, percent, quantity

TOLD = {"gpu": "GPU", "torch": "torch", "triton": "Triton", "transformers": "transformers", "python": "Python"}


def found_by(results: dict, stage: str) -> dict:
    return results["stages"].get(stage, {}).get("found") or {}


def of_machine(results: dict) -> list[tuple[str, str]]:
    machine = found_by(results, "machine")
    facts = [(TOLD[name], str(machine[name])) for name in TOLD if name in machine]
    if "copy_bytes_per_second" in machine:
        facts.append(("memory, copying", quantity(machine["copy_bytes_per_second"], "B/s")))
    if "bfloat16_flops_per_second" in machine:
        facts.append(("bfloat16 product", quantity(machine["bfloat16_flops_per_second"], "FLOP/s")))
    if results.get("rehearsal"):
        facts.append(("rehearsal", "without a GPU: its times mean nothing"))
    return [*facts, ("started", results.get("started", NONE)), ("commit", results.get("commit") or NONE)]


def rival(row: dict) -> tuple[str, dict] | None:
    """The fastest other way and the ratio to it. Our own ways do not count."""
    found = {name.removeprefix("vs "): ratio for name, ratio in row.get("ratios", {}).items()}
    found = {name: ratio for name, ratio in found.items() if not name.startswith("ours")}
    return min(found.items(), key=lambda item: row["seconds"][item[0]]["median"]) if found else None


def _times(row: dict) -> list[str]:
    """The rival, our time, the rival's time, and the ratio with its quantiles."""
    ours, other = row["seconds"]["ours"], rival(row)
    if other is None:
        return [NONE, timed(ours), NONE, NONE]
    name, ratio = other
    return [RIVALS.get(name, name), timed(ours), quantity(row["seconds"][name]["median"], "s"), spread(ratio)]


COLUMNS = ["compared with", "our time", "its time", "ratio"]


def of_ops(results: dict) -> Table | None:
    rows = []
    for row in found_by(results, "ops").get("rows", []):
        tags = dict(dtype=row["dtype"])
        share = [percent(row["share"]) if row.get("share") else NONE]
        if "error" in row:
            rows.append(Row([row["op"], row["case"], row["dtype"], row["error"], *[NONE] * 4], tags, bad=True))
        else:
            rows.append(Row([row["op"], row["case"], row["dtype"], *_times(row), *share], tags))
    note = (
        "Times on the GPU, the L2 cache flushed before each; the ways take turns. The fastest other way is the rival."
    )
    header = ["op", "case", "dtype", *COLUMNS, "share of copying bandwidth"]
    return Table("Ops on the GPU", header, rows, 4, note) if rows else None


def of_model(results: dict) -> Table | None:
    rows = []
    for row in found_by(results, "model").get("rows", []):
        if "error" in row:
            rows.append(Row([row["what"], row["case"], row["error"], *[NONE] * 4], bad=True))
            continue
        rate = row.get("tokens_per_second", {}).get("ours")
        rows.append(Row([row["what"], size(row), *_times(row), number(rate)]))
    note = (
        "GPT-2 124M in bfloat16, by the wall clock: prefill, decoding and a training step (forward and backward pass)."
    )
    header = ["work", "size", *COLUMNS, "our tokens/s"]
    return Table("The whole model on the GPU", header, rows, 3, note) if rows else None


def size(row: dict) -> str:
    B, _, T = row["case"].partition("x")
    return f"batch of {B}" + (f", {T} tokens" if T else "")


def of_parity(results: dict) -> Table | None:
    rows = []
    for row in found_by(results, "parity").get("rows", []):
        cells = [row["op"], row["target"], row.get("error", ""), str(row["runs"]), str(row["runs"] - row["wrong"])]
        rows.append(Row(cells, dict(backend=row["target"].split(":")[0]), bad=bool(row["wrong"])))
    left = found_by(results, "parity").get("left")
    note = "Runs that were held against the parity rule on the GPU." + (
        f" The time limit left out {count(left)} more runs." if left else ""
    )
    header = ["op", "target", "first error", "runs", "of which keep the rule"]
    return Table("Parity on the GPU", header, rows, 3, note) if rows else None


def of_stages(results: dict) -> Table:
    rows = []
    for name, stage in results["stages"].items():
        checks = stage.get("found", {}).get("rows", []) if name == "sanitizer" else []
        ended = stage["ended"] + "".join(f"; {row['what']} {row['ended']}" for row in checks)
        seconds = quantity(stage["seconds"], "s") if "seconds" in stage else NONE
        rows.append(Row([name, ended, seconds], bad=stage["ended"].startswith("exit")))
    return Table("Stages of the run", ["stage", "how it ended", "time"], rows, 2, results.get("note", ""))


def tables(results: dict) -> list[Table]:
    found = (of_ops(results), of_model(results), of_parity(results), of_stages(results))
    return [table for table in found if table is not None]


def bars(results: dict) -> list[Bar]:
    made = []
    for stage in ("ops", "model"):
        for row in found_by(results, stage).get("rows", []):
            if "error" in row or (other := rival(row)) is None:
                continue
            name = f"{row['op']} {row['case']}" if stage == "ops" else f"GPT-2: {row['what']}, {size(row)}"
            dtype = row.get("dtype", "bfloat16")
            made.append(Bar(name, RIVALS.get(other[0], other[0]), other[1], dict(dtype=dtype)))
    return made
