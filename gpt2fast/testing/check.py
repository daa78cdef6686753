"""``python -m gpt2fast check``: runs every case of an op in each dtype on each target, and checks the op's contract."""

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from itertools import product

from ..dtypes import dtype_name
from ..op import OPS, Op
from .inputs import LAYOUTS, cut, work
from .packages import import_entry_points
from .parity import assert_parity
from .targets import lacks, on, ptx_is_ready, targets, targets_of

SMALL = 20_000_000  # a case of up to this number of floating-point operations runs on every target and layout
SMALL_AS_PTX = 1_000_000  # larger cases that run as PTX on the CPU are cut down to this number


def runs(op: Op, every_pair: bool = False) -> Iterator[dict]:
    """The runs for the parity rule: case, dtype, target and layout. Large cases run on the best CPU kernel only.

    A kernel that runs as PTX is compiled anew for nearly every run. There, a case therefore runs once in each dtype and
    once in each layout, and the pairs of dtype and layout change from case to case (see ``_pairs``). ``every_pair``
    runs all of them.
    """
    for number, declared in enumerate(op.cases):
        for i, target in enumerate(targets_of(op)):
            as_ptx = target.endswith(":ptx")
            case = cut(op, declared, SMALL_AS_PTX) if as_ptx else declared
            small = work(op, case) <= SMALL
            if not small and i and not target.startswith("fused") and not target.endswith(":gpu"):
                continue
            layouts = LAYOUTS if small else LAYOUTS[:1]
            rotates = as_ptx and not every_pair and len(op.cases) >= len(LAYOUTS)
            for layout, dtype in _pairs(layouts, op.dtypes, number) if rotates else product(layouts, op.dtypes):
                yield dict(case=case, dtype=dtype, target=target, layout=layout)


def _pairs(layouts: Sequence[str], dtypes: Sequence, number: int) -> list[tuple]:
    """The pairs of layout and dtype that the case of this number runs in. Each layout and each dtype is there.

    The dtypes move on by one from case to case, so that three cases have every pair between them.
    """
    most = max(len(layouts), len(dtypes))
    return [(layouts[i % len(layouts)], dtypes[(i + number) % len(dtypes)]) for i in range(most)]


def check_op(op: Op) -> list[dict]:
    """Checks ``op`` by the parity rule. Returns its runs, each with its error (None: it keeps the rule)."""
    rows = []
    for run in runs(op):
        error = None
        try:
            with on(run["target"]) as device:
                assert_parity(op, run["case"], run["dtype"], run["layout"], device=device)
        except (AssertionError, RuntimeError, ValueError, TypeError, ImportError) as failure:
            error = str(failure)
        rows.append(run | dict(dtype=dtype_name(run["dtype"]), error=error))
    return rows


def check_contract(op: Op) -> list[dict]:
    """Calls every check of ``op`` but those of the parity rule. Returns a row each, with its error (None: it holds)."""
    from .contract import PROMISES, checks_of

    try:
        checks = checks_of(op, *(name for name in PROMISES if name != "parity"))
    except ValueError as failure:  # a declaration without cases
        return [dict(check=op.name, promise="cases", error=str(failure))]
    rows = []
    for check in checks:
        error = None
        try:
            check()
        except AssertionError as failure:
            error = str(failure)
        rows.append(dict(check=str(check), promise=check.promise, error=error))
    return rows


def find_ops(names: list[str]) -> list[Op]:
    """The ops with these names, or all ops for an empty list. Packages with an entry point ``gpt2fast.ops`` count too.

    Raises ValueError with the choices for an unknown name, and warns of each package that cannot be imported.
    """
    from .. import ops  # noqa: F401  declares ours

    failed = import_entry_points()
    for label, error in failed.items():
        warnings.warn(f"gpt2fast: the ops of {label} are left out: {error}", RuntimeWarning, stacklevel=2)
    unknown = [name for name in names if name not in OPS]
    if unknown:
        without = f"; {' and '.join(failed)} did not import" if failed else ""
        raise ValueError(f"gpt2fast: op must be one of {', '.join(OPS)}, got {unknown[0]!r}{without}")
    return [OPS[name] for name in names or OPS]


def run_check(names: list[str], as_json: bool = False) -> int:
    """Prints a line for each op (or JSON of every run and check). Returns the exit status, 0 where everything holds.

    Where all ops are checked, a package with ops that cannot be imported counts as a failure.
    """
    failures, report = 0, {}
    for op in find_ops(names):
        rows, contract = check_op(op), check_contract(op)
        wrong, broken = [row for row in rows if row["error"]], [row for row in contract if row["error"]]
        failures += len(wrong) + len(broken)
        missing = {target: reason for target in targets() if (reason := lacks(op, target))}
        absent = [dict(target=target, error=None, missing=reason) for target, reason in missing.items()]
        report[op.key] = rows + absent + contract
        if not as_json:
            without = f"; no kernel for {', '.join(missing)}" if missing else ""
            print(
                f"{op.key:24} {len(rows) - len(wrong):4} of {len(rows)} runs keep the parity rule, "
                f"{len(contract) - len(broken)} of {len(contract)} checks of the contract hold{without}"
            )
            for row in wrong:
                print(f"  {row['case']} {row['dtype']} {row['target']} {row['layout']}: {row['error']}")
            for row in broken:
                print(f"  {row['check']}: {row['error']}")
    if not names:
        for label, error in import_entry_points().items():
            failures += 1
            report[label] = [dict(error=error)]
    if as_json:
        json.dump(report, sys.stdout, default=str)
        print()
    if not ptx_is_ready():
        from .ptx.core import HOW

        print(f"gpt2fast check: no GPU kernel ran on the PTX machine, which is not compiled: {HOW}", file=sys.stderr)
    return int(failures > 0)
