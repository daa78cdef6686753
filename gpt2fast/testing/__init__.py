"""What tests of kernels need, for ours and for yours: inputs from a declaration, the parity rule, checks by op."""

from .check import check_op, has_kernel, run_check, runs
from .inputs import LAYOUTS, build, call, work
from .isa import cpu_isa, runnable_isas
from .parity import assert_close_to_truth, assert_parity, measure

__all__ = [
    "LAYOUTS",
    "assert_close_to_truth",
    "assert_parity",
    "build",
    "call",
    "check_op",
    "cpu_isa",
    "has_kernel",
    "measure",
    "run_bench",
    "run_check",
    "runnable_isas",
    "runs",
    "work",
]


def run_bench(names: list[str], as_json: bool = False) -> int:
    """Times ops by name against PyTorch; needs the benchmarks folder of the repository."""
    try:
        from benchmarks.ops import main
    except ModuleNotFoundError as error:
        raise SystemExit("gpt2fast bench runs from the repository's root: benchmarks/ is not installed") from error
    return main([*names, *(["--json"] if as_json else [])])
