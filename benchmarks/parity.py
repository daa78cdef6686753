"""How far results are from the truth: ``python -m benchmarks.parity [OP ...] [--json FILE]``.

For each op, case and dtype it shows the error of our kernel against float64, the error of plain PyTorch, and the bound
of the parity rule (twice PyTorch's error plus one rounding step), as RMS and as maximum. If there are several outputs
in the case's dtype, the one nearest to its bound is shown. Outputs in another dtype count only if there are no others.
Integers must be equal.
"""

import argparse
import sys

import torch

from gpt2fast import backends
from gpt2fast.dtypes import dtype_name
from gpt2fast.op import OPS, Op
from gpt2fast.testing.check import find_ops
from gpt2fast.testing.inputs import build, call, cut, names_of_outputs, reference, truth
from gpt2fast.testing.parity import measure, more_seeds

from . import cases, peak
from .output import JSON_HELP, json_file, write
from .table import show
from .units import number

SMALL = 20_000_000  # larger cases get fewer rows, until they have at most so many operations
KINDS = ("rms", "max")
HEADER = ["op", "case", "dtype", "output", "ours, RMS", "PyTorch", "bound", "ours, max", "PyTorch", "bound"]


def steps(row: dict) -> list[float | None]:
    """The six errors of a row in rounding steps. In this unit the bound is 2 x PyTorch's error + 1.

    A rounding step is eps times the RMS, or the maximum, of the truth. If the truth is 0, the result is None.
    """
    found: list[float | None] = []
    for kind in KINDS:
        step = row[f"{kind}_bound"] - 2 * row[f"plain_{kind}"]
        found += [row[name] / step if step > 0 else None for name in (kind, f"plain_{kind}", f"{kind}_bound")]
    return found


def measure_case(op: Op, case: dict, dtype: torch.dtype) -> dict:
    """A row: the errors of the output that comes nearest to its bound, or in ``failed`` the reason why it has none."""
    case = cut(op, case, SMALL)
    row = dict(op=op.name, label=cases.describe(case), dtype=dtype_name(dtype))
    try:
        args = build(op, case, dtype)
        runs = [tuple(f(op, args) for f in (call, reference, truth))]
        for seed in more_seeds(op, case, runs[0][0]):
            again = build(op, case, dtype, seed=seed)
            runs.append(tuple(f(op, again) for f in (call, reference, truth)))
        found, same = [], True
        for i, name in enumerate(names_of_outputs(op, args)):
            actual, plain, exact = (torch.stack([run[kind][i] for run in runs]) for kind in range(3))
            if not actual.is_floating_point():
                same = same and torch.equal(actual, plain)
            elif actual.numel():
                errors = measure(actual, plain, exact)
                found.append(dict(output=name, of_dtype=actual.dtype == dtype, **errors))
    except (RuntimeError, ValueError, TypeError) as failure:
        return row | dict(failed=str(failure))
    row["keeps"] = same and all(errors["fits"] for errors in found)
    found = [errors for errors in found if "plain_rms" in errors]  # outputs with at least one finite number
    if not found:
        return row | dict(output="all", equal=same)
    shown = [errors for errors in found if errors["of_dtype"]] or found
    return row | max(shown, key=lambda e: max(e[k] / e[f"{k}_bound"] if e[f"{k}_bound"] else 0.0 for k in KINDS))


def run(names: list[str], each=None) -> dict:
    """Rows for the ops named, or for all ops that have a kernel of ours on this machine."""
    chosen = find_ops(names)
    if not names:
        chosen = [OPS[op.name] for op in cases.bench_ops([])]
    found = dict(kind="parity", machine=peak.machine(), rows=[])
    for op in chosen:
        for case in cases.bench_cases(op):
            for dtype in op.dtypes:
                found["rows"].append(measure_case(op, case, dtype))
        each and each(found)
    return found


def cells(row: dict) -> list[str]:
    first = [row["op"], row["label"], row["dtype"]]
    if "failed" in row:
        return [*first, "FAILED", *[""] * 6]
    if "equal" in row:
        return [*first, "equal" if row["equal"] else "not equal: FAILED", *[""] * 6]
    return [*first, row["output"], *map(number, steps(row))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="OP", help="ops by name (default: all that have a kernel)")
    parser.add_argument("--json", type=json_file, nargs="?", const="-", metavar="FILE", help=JSON_HELP)
    args = parser.parse_args(argv)
    found = run(args.names, lambda found: args.json != "-" and write(found, args.json))
    if args.json == "-":
        write(found, "-")
    else:
        title = f"Errors in rounding steps. {found['machine']['cpu']}, {backends.isa()}"
        show(HEADER, [cells(row) for row in found["rows"]], title, 4)
    return int(any(not row.get("keeps") for row in found["rows"]))


if __name__ == "__main__":
    sys.exit(main())
