"""``python -m gpt2fast check``: every case of an op, dtype by dtype, target by target."""

import json
import sys
from collections.abc import Iterator

from ..op import OPS, Op
from .inputs import LAYOUTS, cut, work
from .parity import assert_parity
from .targets import lacks, on, targets, targets_of

SMALL = 20_000_000  # floating-point operations up to which a case runs on every target and layout
SMALL_AS_PTX = 1_000_000  # the same for what runs as PTX on the CPU, where larger cases are cut down to it


def runs(op: Op) -> Iterator[dict]:
    """What the parity rule is held against: case, dtype, target and layout; large cases on the best CPU kernel only.

    What runs as PTX on the CPU is compiled for every dtype and layout: other layouts than the first take one dtype.
    """
    for declared in op.cases:
        for i, target in enumerate(targets_of(op)):
            case = cut(op, declared, SMALL_AS_PTX) if target.endswith(":ptx") else declared
            small = work(op, case) <= SMALL
            if not small and i and not target.startswith("fused") and not target.endswith(":gpu"):
                continue
            for layout in LAYOUTS if small else LAYOUTS[:1]:
                for dtype in op.dtypes if layout == LAYOUTS[0] or not target.endswith(":ptx") else op.dtypes[-1:]:
                    yield dict(case=case, dtype=dtype, target=target, layout=layout)


def check_op(op: Op) -> list[dict]:
    """Holds ``op`` against the parity rule; its runs, each with its error (None: it keeps the rule)."""
    rows = []
    for run in runs(op):
        error = None
        try:
            with on(run["target"]) as device:
                assert_parity(op, run["case"], run["dtype"], run["layout"], device=device)
        except (AssertionError, RuntimeError, ValueError, TypeError, ImportError) as failure:
            error = str(failure)
        rows.append(run | dict(dtype=str(run["dtype"]).removeprefix("torch."), error=error))
    return rows


def find_ops(names: list[str]) -> list[Op]:
    """Ops by name, all of them for an empty list; ValueError with the choices for an unknown one."""
    from .. import ops  # noqa: F401  declares ours

    unknown = [name for name in names if name not in OPS]
    if unknown:
        raise ValueError(f"gpt2fast: op must be one of {', '.join(OPS)}, got {unknown[0]!r}")
    return [OPS[name] for name in names or OPS]


def run_check(names: list[str], as_json: bool = False) -> int:
    """Prints a line an op (or JSON of every run) and returns the exit status: 0 where every run keeps the rule."""
    failures, report = 0, {}
    for op in find_ops(names):
        rows = check_op(op)
        wrong = [row for row in rows if row["error"]]
        failures += len(wrong)
        missing = {target: reason for target in targets() if (reason := lacks(op, target))}
        report[op.name] = rows + [dict(target=target, error=None, missing=reason) for target, reason in missing.items()]
        if not as_json:
            without = f"; no kernel for {', '.join(missing)}" if missing else ""
            print(f"{op.name:24} {len(rows) - len(wrong):4} of {len(rows)} runs keep the parity rule{without}")
            for row in wrong:
                print(f"  {row['case']} {row['dtype']} {row['target']} {row['layout']}: {row['error']}")
    if as_json:
        json.dump(report, sys.stdout, default=str)
        print()
    return int(failures > 0)
