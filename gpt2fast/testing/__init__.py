"""Tools for testing ops and kernels, ours and yours: ``checks_of`` an op, inputs, the parity rule, targets."""

from .check import check_contract, check_op, find_ops, run_check, runs
from .contract import PROMISES, Check, checks_of
from .inputs import LAYOUTS, build, call, truth, work
from .isa import cpu_isa, runnable_isas
from .parity import assert_close_to_truth, assert_parity, measure
from .targets import lacks, on, targets, targets_of

__all__ = [
    "Check",
    "LAYOUTS",
    "PROMISES",
    "assert_close_to_truth",
    "assert_parity",
    "build",
    "call",
    "check_contract",
    "check_op",
    "checks_of",
    "cpu_isa",
    "find_ops",
    "lacks",
    "measure",
    "on",
    "run_bench",
    "run_check",
    "runnable_isas",
    "runs",
    "targets",
    "targets_of",
    "truth",
    "work",
]


def run_bench(arguments: list[str]) -> int:
    """Times ops by name against PyTorch, as ``python -m gpt2fast.benchmarks.ops`` does; returns its exit status."""
    from ..benchmarks.ops import main

    return main(arguments)
