"""Head and loss in one, in Triton on the PTX machine: chunks of rows, ends of the vocabulary, large logits, bytes."""

import sys

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast import backends
from gpt2fast.kernels import linear_cross_entropy as kernels
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth, ptx
from gpt2fast.testing.inputs import build, reference, truth

DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
NAME = "linear_cross_entropy"


def run(name, args, backend="triton"):
    function, supports = kernels.KERNELS[name]
    assert supports(**args) is None
    with ptx.machine() as m, backends.use_backend(backend):
        return function(**args), m.launches


def check(name, args, **options):
    found, launches = run(name, args, **options)
    for what, ours, plain, exact in zip(OPS[name].outputs, found, *(f(OPS[name], args) for f in (reference, truth))):
        assert_close_to_truth(ours, plain, exact, what)
    return launches


@pytest.fixture
def few_rows(monkeypatch):
    """Chunks of at most 20 rows: of less than ten, PyTorch's product on a CPU has other errors than of many."""
    for name in ("MOST_ROWS", "FEW_ROWS"):
        monkeypatch.setattr(sys.modules["gpt2fast.ops.linear_cross_entropy"], name, 20)


@DTYPES
@pytest.mark.parametrize("backend", ("triton", "auto"))
@pytest.mark.parametrize("V", (1, 64, 4095, 4097))
def test_chunks_and_ends_of_the_vocabulary(V, backend, dtype, few_rows):
    args = build(OPS[NAME], dict(R=50, K=24, V=V, keep="both", ignore_index=0), dtype)
    launches = check(NAME, args, backend=backend)
    assert sum(launch.kernel == "loss_and_gradient_kernel" for launch in launches) == 3
    backward = build(OPS[f"{NAME}_backward"], dict(R=50, K=24, V=V, reduction="none"), dtype)
    check(f"{NAME}_backward", backward, backend=backend)


@DTYPES
def test_chunks_change_what_is_added_up_and_nothing_else(dtype, few_rows, monkeypatch):
    args = build(OPS[NAME], dict(R=50, K=24, V=70, keep="both"), dtype)
    (loss, lse, dx, dweight), _ = run(NAME, args)
    monkeypatch.undo()
    whole, _ = run(NAME, args)
    assert torch.equal(loss, whole[0]) and torch.equal(lse, whole[1]) and torch.equal(dx, whole[2])
    assert_close_to_truth(dweight, *(f(OPS[NAME], args)[3] for f in (reference, truth)))


@DTYPES
def test_bytes(dtype):
    """The logits are read for the loss, read once more and written where there are gradients; nothing else counts."""
    R, K, V = 12, 16, 4096
    args = build(OPS[NAME], dict(R=R, K=K, V=V), dtype)
    size = R * V * dtype.itemsize
    for keep, reads, writes in (("none", 1, 0), ("both", 2, 1)):
        launches = check(NAME, args | dict(keep=keep))
        (launch,) = (launch for launch in launches if launch.kernel == "loss_and_gradient_kernel")
        moved = launch.per_buffer["logits_ptr"]
        assert moved["read_bytes"] + moved.get("written_bytes", 0) <= 1.05 * size * (reads + writes)
        assert not launch.inefficient()


def test_large_logits_keep_the_digits_of_their_differences():
    """A column of x adds 2^22 to every logit of a row: the loss and its gradients are those without it, to the bit."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.zeros(5, 3), torch.zeros(300, 3)
    x[:, 0], weight[:, 0] = 1.0, torch.randn(300, generator=g).round()
    args = dict(x=x, weight=weight, targets=torch.arange(5), keep="dx", reduction="sum")
    (near, _, dnear, _), _ = run(NAME, args)
    weight[:, 1], x[:, 1] = 1.0, 2.0**22
    (far, _, dfar, _), _ = run(NAME, args)
    assert torch.equal(near, far) and torch.equal(dnear[:, 0], dfar[:, 0])


def test_a_target_outside_the_vocabulary_is_no_number():
    x, weight = torch.zeros(3, 8), torch.zeros(5, 8)
    (loss, *_), _ = run(NAME, dict(x=x, weight=weight, targets=torch.tensor([4, 5, -1]), reduction="none"))
    assert loss.isnan().tolist() == [False, True, True]
