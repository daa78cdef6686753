"""Loops over OPS: pytest.mark.parametrize helpers shared by the op tests. Uninitialised memory is NaN in every test."""

import pytest
import torch
from torch import Tensor

import gpt2fast.ops  # noqa: F401
from gpt2fast import op as declare
from gpt2fast.op import OPS
from gpt2fast.testing import build, runnable_isas, runs, work

ISAS = runnable_isas()


def name_of(case: dict) -> str:
    return "-".join(f"{k}{'' if v is True else v}" for k, v in case.items())


def flops(op, case: dict) -> float:
    """Of a case, by the declaration; where that does not say, one for each element of the first tensor."""
    return op.flops(case) if op.flops else build(op, case)[next(iter(op.tensors))].numel()


def op_cases(limit: float = float("inf"), ops=None) -> list:
    """(op, case) for every case below ``limit`` operations."""
    return [
        pytest.param(op, case, id=f"{op.name}-{name_of(case)}")
        for op in ops or OPS.values()
        for case in op.cases
        if work(op, case) <= limit
    ]


def op_runs() -> list:
    """(op, case, dtype, target, layout): what ``gpt2fast check`` runs."""
    found = []
    for op in OPS.values():
        for case, dtype, target, layout in (run.values() for run in runs(op)):
            name = f"{op.name}-{name_of(case)}-{str(dtype).removeprefix('torch.')}-{target}-{layout}"
            found.append(pytest.param(op, case, dtype, target, layout, id=name))
    return found


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


@pytest.fixture(scope="session")
def _half():
    def plain(x):
        return x * 0.5

    @declare(
        shapes=dict(x="... C"), cases=[dict(B=2, T=3, C=5), dict(B=1, T=1, C=2)], flops=lambda n: 6 * n["C"],
        derivative=False, baseline=plain, naive=lambda x: x / 2, namespace="gpt2fast_test",
    )  # fmt: skip
    def half(x: Tensor) -> Tensor:
        """y = x / 2."""
        return x.clone() * 0.5

    library = torch.library.Library("gpt2fast_test", "IMPL")
    library.impl("half", lambda x: half.kernel(x), "CPU")
    half.library = library  # which lives as long as its kernels shall
    return half


@pytest.fixture
def half(_half):
    """An op as a user declares one, its CPU kernel in Python: set ``half.kernel`` to break it."""
    _half.kernel = lambda x: (x * 0.5).contiguous()
    OPS["gpt2fast_test::half"] = _half
    yield _half
    del OPS["gpt2fast_test::half"]
