"""Fixtures and parametrize helpers that loop over OPS, for all op tests. In every test, uninitialised memory is NaN."""

import os

# The processes of `pytest -n` share the cores, so a thread that waits for others must not spin: it would take their
# core from them. OpenMP reads this when torch is imported. Subprocesses get it too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from torch import Tensor

import gpt2fast.ops  # noqa: F401
from gpt2fast import op as declare
from gpt2fast.op import OPS
from gpt2fast.testing import checks_of, runnable_isas, work
from gpt2fast.testing.contract import name_of
from gpt2fast.testing.inputs import flops  # noqa: F401  for the tests
from gpt2fast.testing.promise import poisoned_memory

ISAS = runnable_isas()
os.environ.pop("PYTEST_ADDOPTS", None)  # tests that a test starts must not get these options


def op_cases(limit: float = float("inf"), ops=None) -> list:
    """(op, case) for every case with fewer than ``limit`` operations."""
    return [
        pytest.param(op, case, id=f"{op.name}-{name_of(case)}")
        for op in ops or OPS.values()
        for case in op.cases
        if work(op, case) <= limit
    ]


def checks(*promises: str) -> list:
    """These promises of every op of ours, as ``checks_of`` makes them."""
    return [check for op in OPS.values() if op.namespace == "gpt2fast" for check in checks_of(op, *promises)]


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty gives NaN, so that an output that no kernel wrote cannot look right."""
    with poisoned_memory():
        yield


@pytest.fixture
def ops_as_before():
    """Takes the ops that a test declares out of OPS again, over which other tests loop."""
    before = dict(OPS)
    yield
    OPS.clear()
    OPS.update(before)


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

    def run(x):
        half.check_call(x)  # every kernel that is registered at the dispatcher must do this
        return half.body(x)

    library.impl("half", run, "CPU")
    half.library = library  # its kernels are registered as long as it lives
    return half


@pytest.fixture
def half(_half):
    """An op as a user declares one, with a CPU kernel in Python. Set ``half.body`` to break the kernel."""
    _half.body = lambda x: (x * 0.5).contiguous()
    OPS["gpt2fast_test::half"] = _half
    yield _half
    del OPS["gpt2fast_test::half"]


@pytest.fixture(scope="session")
def _scaled():
    @declare(
        shapes=dict(x="... C", weight="C"), cases=[dict(B=2, T=3, C=5), dict(B=1, T=1, C=2)],
        flops=lambda n: 6 * n["C"], fused=lambda x, weight: x * weight, namespace="gpt2fast_test",
    )  # fmt: skip
    def scaled(x: Tensor, weight: Tensor) -> Tensor:
        """y = x weight."""
        return x * weight

    @scaled.backward("x weight")
    def _(saved, grad):
        return scaled.derivative(saved, grad)

    library = torch.library.Library("gpt2fast_test", "IMPL")

    def run(x, weight):
        scaled.check_call(x, weight)
        return x * weight

    library.impl("scaled", run, "CPU")
    scaled.library = library
    return scaled


@pytest.fixture
def scaled(_scaled):
    """An op as a user declares one, with a derivative. Set ``scaled.derivative`` to break the derivative."""
    _scaled.derivative = lambda saved, grad: dict(
        x=(grad.y * saved.weight).contiguous(), weight=(grad.y * saved.x).flatten(0, -2).sum(0)
    )
    OPS["gpt2fast_test::scaled"] = _scaled
    yield _scaled
    del OPS["gpt2fast_test::scaled"]
