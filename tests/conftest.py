"""Loops over OPS: pytest.mark.parametrize helpers shared by the op tests. Uninitialised memory is NaN in every test."""

import pytest
import torch

import gpt2fast.ops  # noqa: F401
from gpt2fast.op import OPS
from gpt2fast.testing import LAYOUTS, has_kernel, runnable_isas, work

SMALL = 20_000_000
ISAS = runnable_isas()


def name_of(case: dict) -> str:
    return "-".join(f"{k}{'' if v is True else v}" for k, v in case.items())


def op_cases(limit: float = float("inf"), ops=None) -> list:
    """(op, case) for every case below ``limit`` operations."""
    return [
        pytest.param(op, case, id=f"{op.name}-{name_of(case)}")
        for op in ops or OPS.values()
        for case in op.cases
        if work(op, case) <= limit
    ]


def op_runs() -> list:
    """(op, case, dtype, isa, layout): small cases everywhere, large ones on the best instruction set only."""
    runs = []
    for op in OPS.values():
        for case in op.cases:
            small = work(op, case) <= SMALL
            for isa in ISAS if small and has_kernel(op) else ISAS[:1]:
                for layout in LAYOUTS if small else LAYOUTS[:1]:
                    for dtype in op.dtypes:
                        word = str(dtype).removeprefix("torch.")
                        name = f"{op.name}-{name_of(case)}-{word}-{isa}-{layout}"
                        runs.append(pytest.param(op, case, dtype, isa, layout, id=name))
    return runs


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN, so that an output nobody wrote cannot look right."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
