"""``python -m gpt2fast check``: every case of an op, dtype by dtype, instruction set by instruction set."""

import contextlib
import json
import sys

import torch

from ..op import OPS, Op
from .inputs import LAYOUTS, work
from .isa import cpu_isa, runnable_isas
from .parity import assert_parity

SMALL = 20_000_000  # floating-point operations up to which a case runs on every instruction set and layout


def check_op(op: Op, everything: bool = False) -> list[dict]:
    """Runs the parity rule over ``op``'s cases; a row a run: case, dtype, isa, layout, error (None: it holds)."""
    rows = []
    isas = runnable_isas() if has_kernel(op) else []
    isas = isas or [None]
    for case in op.cases:
        small = everything or work(op, case) <= SMALL
        for isa in isas if small else isas[:1]:
            for layout in LAYOUTS if small else LAYOUTS[:1]:
                for dtype in op.dtypes:
                    error = None
                    with cpu_isa(isa) if isa else contextlib.nullcontext():
                        try:
                            assert_parity(op, case, dtype, layout)
                        except (AssertionError, RuntimeError, ValueError, TypeError) as failure:
                            error = str(failure)
                    rows.append(dict(case=case, dtype=str(dtype)[6:], isa=isa, layout=layout, error=error))
    return rows


def has_kernel(op: Op) -> bool:
    """Whether the CPU backend has a kernel for ``op``; without one its reference runs."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{op.namespace}::{op.name}", "CPU")


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
        report[op.name] = rows
        if not as_json:
            print(f"{op.name:24} {len(rows) - len(wrong):4} of {len(rows)} runs keep the parity rule")
            for row in wrong:
                print(f"  {row['case']} {row['dtype']} {row['isa']} {row['layout']}: {row['error']}")
    if as_json:
        json.dump(report, sys.stdout, default=str)
        print()
    return int(failures > 0)
