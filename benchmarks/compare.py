"""Compares two runs of the op benchmarks: what became faster or slower, and whether that is more than noise.

A machine is not equally fast on two days. Therefore the ratio to PyTorch is compared, which each run has measured for
itself; the times stand beside it. Each quotient has an interval, which holds 95 % of 2000 resamplings of both runs'
rounds.
"""

import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

HEADER = ["op", "case", "dtype", "mode", "ours before µs", "now µs", "vs torch before", "now", "change", "95 %", ""]
RESAMPLINGS = 2000


def read(path: str) -> dict:
    """The results of ``benchmarks.ops`` in a file. Raises ValueError if the file has none."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if found["kind"] != "ops":
            raise ValueError(f"it is of kind {found['kind']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"gpt2fast bench: --compare must be a file that --save wrote, got {path}: {error}") from error
    return found


def quotient(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """after / before, from their medians, and the interval that holds 95 % of the resamplings."""
    draw = random.Random(0)

    def median(values: Sequence[float]) -> float:
        return statistics.median(draw.choices(values, k=len(values)))

    found = sorted(median(after) / median(before) for _ in range(RESAMPLINGS))
    middle = statistics.median(after) / statistics.median(before)
    return middle, found[round(0.025 * (RESAMPLINGS - 1))], found[round(0.975 * (RESAMPLINGS - 1))]


def verdict(low: float, high: float) -> str:
    """``faster`` or ``slower`` if 1 is not in the interval."""
    return "faster" if low > 1 else "slower" if high < 1 else "as before"


def compare(before: dict, after: dict) -> list[dict]:
    """How the ratio to PyTorch changed, for each row that both results of ``benchmarks.ops`` have timed."""
    earlier = {_key(row): row for row in before["rows"] if "rounds" in row}
    found = []
    for row in after["rows"]:
        old = earlier.get(_key(row))
        if old is None or "rounds" not in row or row["best"] not in old["rounds"]:
            continue
        ratios = [[a / b for a, b in zip(r["rounds"][row["best"]], r["rounds"]["ours"])] for r in (old, row)]
        change, low, high = quotient(*ratios)
        found.append(
            dict(
                zip(("op", "label", "dtype", "mode"), _key(row)),
                seconds=[r["seconds"]["ours"]["median"] for r in (old, row)],
                ratios=[statistics.median(r) for r in ratios],
                change=change,
                low=low,
                high=high,
                verdict=verdict(low, high),
            )
        )
    return found


def cells(row: dict) -> list[str]:
    """The row of the table."""
    return [
        *(row[name] for name in ("op", "label", "dtype", "mode")),
        *(f"{1e6 * seconds:.4g}" for seconds in row["seconds"]),
        *(f"{ratio:.2f}x" for ratio in row["ratios"]),
        f"{row['change']:.3f}",
        f"{row['low']:.3f}-{row['high']:.3f}",
        row["verdict"],
    ]


def _key(row: dict) -> tuple[str, str, str, str]:
    return row["op"], row["label"], row["dtype"], row.get("mode", "fwd")
