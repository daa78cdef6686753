"""``python -m gpt2fast check``: every case of an op, dtype by dtype, instruction set by instruction set."""

import json
import os
import sys
from collections.abc import Iterator

import torch

from ..op import OPS, Op
from .inputs import LAYOUTS, work
from .isa import cpu_isa, runnable_isas
from .parity import assert_parity

SMALL = 20_000_000  # floating-point operations up to which a case runs on every instruction set and layout


def runs(op: Op) -> Iterator[dict]:
    """What the parity rule is held against: case, dtype, isa (None: no kernel) and layout; large cases on the best.

    ``GPT2FAST_CPU_ISA`` leaves one instruction set.
    """
    forced = os.environ.get("GPT2FAST_CPU_ISA")
    isas = [forced] if forced else runnable_isas()
    isas = isas if has_kernel(op) and isas else [None]
    for case in op.cases:
        small = work(op, case) <= SMALL
        for isa in isas if small else isas[:1]:
            for layout in LAYOUTS if small else LAYOUTS[:1]:
                for dtype in op.dtypes:
                    yield dict(case=case, dtype=dtype, isa=isa, layout=layout)


def check_op(op: Op) -> list[dict]:
    """Holds ``op`` against the parity rule; its runs, each with its error (None: it keeps the rule)."""
    rows = []
    for run in runs(op):
        error = None
        try:
            with cpu_isa(run["isa"]):
                assert_parity(op, run["case"], run["dtype"], run["layout"])
        except (AssertionError, RuntimeError, ValueError, TypeError) as failure:
            error = str(failure)
        rows.append(run | dict(dtype=str(run["dtype"]).removeprefix("torch."), error=error))
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
