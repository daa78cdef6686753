"""Attention in Triton on the PTX machine, beyond the op's own cases: large scores, hidden keys, biases, equal bits."""

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.kernels import attention as forward
from gpt2fast.kernels import attention_backward as backward
from gpt2fast.kernels import common
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth, ptx
from gpt2fast.testing.inputs import build, reference, truth

CASE = dict(B=2, T=20, S=37, H=2, D=16)


def gradients(args, dout):
    with ptx.machine() as machine:
        out, lse = forward.attention(**args)
        found = backward.attention_backward(dout=dout, out=out, lse=lse, **args)
    return (out, lse, *found), machine.launches


def arguments(dtype=torch.float32, **case):
    args = build(OPS["attention"], CASE | case, dtype)
    return args, torch.randn(args["q"].shape, generator=torch.Generator().manual_seed(7)).to(dtype)


@pytest.mark.parametrize("size", (1e4, 4e9))
def test_large_scores_keep_the_digits_of_their_differences(size):
    """Every score is ``size`` and a small whole number: the probabilities are those of the whole numbers."""
    args, dout = arguments(causal=False)
    g = torch.Generator().manual_seed(1)
    small = torch.randint(0, 4, (2, 37, 2), generator=g).float() * (1024 if size > 1e6 else 1)
    for name in "qk":
        args[name] = torch.zeros_like(args[name])
    args["q"][..., 0] = args["q"][..., 1] = 1
    args["k"][..., 0], args["k"][..., 1] = size, small
    args["scale"] = 1.0
    (out, _, *_), _ = gradients(args, dout)
    plain = args | dict(k=args["k"].clone())
    plain["k"][..., 0] = 0
    exact = OPS["attention"].reference(**{n: v.double() if torch.is_tensor(v) else v for n, v in plain.items()})[0]
    # float32 holds size + small only to its own spacing, which is 256 or less here: 1024 is a whole number of those
    torch.testing.assert_close(out, exact.float())


def test_keys_hidden_by_a_large_number_count_nothing_where_others_are_seen():
    args, dout = arguments(causal=True)
    bias = torch.zeros(2, 1, 1, 37)
    bias[0, ..., :9] = -1e30
    found, _ = gradients(args | dict(bias=bias), dout)
    expected, _ = gradients(args | dict(bias=bias.masked_fill(bias < 0, -torch.inf)), dout)
    assert all(t.isfinite().all() for t in found)
    for ours, others in zip(found[:-1], expected[:-1]):
        torch.testing.assert_close(ours, others)


def test_what_lies_in_hidden_keys_changes_no_bit():
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[0, :5], mask[1, 30:] = False, False
    args, dout = arguments(mask=True)
    args["mask"] = mask
    first, _ = gradients(args, dout)
    poisoned = args | {n: args[n].masked_fill(~mask[..., None, None], torch.nan) for n in "kv"}
    second, _ = gradients(poisoned, dout)
    assert all(map(torch.equal, first, second))
    assert not first[3][0, :5].any() and not first[4][1, 30:].any()


def gradient_of_bias(shape):
    args, dout = arguments(bias=True, causal=True)
    g = torch.Generator().manual_seed(3)
    args["bias"] = torch.randn(shape, generator=g) if shape[-1] > 1 or shape[-2] > 1 else torch.zeros(shape)
    (out, lse, *found), _ = gradients(args, dout)
    assert found[3].shape == shape
    return found[3], dict(dout=dout, out=out, lse=lse, **args)


@pytest.mark.parametrize("shape", ((1, 1, 1, 37), (2, 1, 20, 1), (1, 1, 20, 37)), ids=str)
def test_the_gradient_of_a_bias_is_summed_where_it_broadcasts(shape):
    found, args = gradient_of_bias(shape)
    op = OPS["attention_backward"]
    assert_close_to_truth(found, reference(op, args)[3], truth(op, args)[3], "dbias")


def test_the_gradient_of_one_number_for_all_keys_is_zero():
    """But for rounding, as the same number for all keys changes no probability."""
    found, args = gradient_of_bias((1, 2, 1, 1))
    ordinary = reference(OPS["attention_backward"], args | dict(bias=torch.zeros(2, 2, 20, 37)))[3]
    assert found.abs().max() < torch.finfo(torch.float32).eps * ordinary.abs().sum()


def test_gradients_repeat_bit_for_bit():
    args, dout = arguments(torch.bfloat16, dropout_p=0.2, seed=True)
    first, launches = gradients(args, dout)
    assert [launch.kernel for launch in launches] == [
        "attention_kernel", "attention_backward_q_kernel", "attention_backward_kv_kernel",
    ]  # fmt: skip
    assert all(map(torch.equal, first, gradients(args, dout)[0]))
    assert not any(launch.counters["global_atomic_requests"] for launch in launches)


def test_what_is_covered():
    q = torch.empty(1, 3, 2, 257, device="meta")
    assert forward.supports(q, q, q) == "attention in Triton covers head sizes of 1 to 256, got 257"
    q = torch.empty(1, 3, 2, 64, device="meta", dtype=torch.float64)
    assert forward.supports(q, q, q) == "attention in Triton covers float32, bfloat16 and float16, got float64"


def test_an_old_triton_leaves_float32_to_others(monkeypatch):
    """Triton 3.5 multiplies float32 by three products of TF32 at best, whose error breaks the parity rule."""
    monkeypatch.setattr(common, "HAS_BF16X6", False)
    q = torch.empty(1, 3, 2, 64, device="meta")
    assert forward.supports(q, q, q).startswith("attention of float32 in Triton needs Triton 3.6, got 3.")
    assert forward.supports(*[q.bfloat16()] * 3) is None


def test_float32_takes_six_products_of_bfloat16():
    """Tiles of GPT-2's head size multiply nothing twice: 2, 3 and 4 products of 128 x 128 x 64, six times each."""
    args, dout = arguments(D=64, B=1, T=128, S=128, H=1, causal=False)
    _, launches = gradients(args, dout)
    flops = [launch.counters["tensor_flops"] for launch in launches]
    assert flops == [6 * products * 2 * 128 * 128 * 64 for products in (2, 3, 4)]
