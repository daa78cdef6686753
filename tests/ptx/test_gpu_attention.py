"""Attention on the PTX machine, beyond the op's own cases: large scores, hidden keys, biases, equal bits.

Forward and backward each run in Triton and in CUDA C++, in all four pairs: each backend takes the other's results.
"""

import pytest
import torch
from both import kernels_of

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth
from gpt2fast.testing.inputs import build, reference, truth

CASE = dict(B=2, T=20, S=37, H=2, D=16)
forward, backward = kernels_of("attention"), kernels_of("attention_backward")


@pytest.fixture(name="gradients")
def of_both(forward, backward):
    """``gradients(args, dout)``: out, lse, the gradients of q, k, v and bias, and the launches."""

    def run(args, dout):
        (out, lse), first = forward("attention", args)
        found, second = backward("attention_backward", dict(dout=dout, out=out, lse=lse, **args))
        return (out, lse, *found), [*first, *second]

    return run


def arguments(dtype=torch.float32, **case):
    args = build(OPS["attention"], CASE | case, dtype)
    return args, torch.randn(args["q"].shape, generator=torch.Generator().manual_seed(7)).to(dtype)


@pytest.mark.parametrize("size", (1e4, 4e9))
def test_large_scores_keep_the_digits_of_their_differences(gradients, size):
    """Every score is ``size`` plus a small integer. The probabilities are those of the integers alone."""
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


def test_keys_hidden_by_a_large_number_count_nothing_where_others_are_seen(gradients):
    args, dout = arguments(causal=True)
    bias = torch.zeros(2, 1, 1, 37)
    bias[0, ..., :9] = -1e30
    found, _ = gradients(args | dict(bias=bias), dout)
    expected, _ = gradients(args | dict(bias=bias.masked_fill(bias < 0, -torch.inf)), dout)
    assert all(t.isfinite().all() for t in found)
    for ours, others in zip(found[:-1], expected[:-1]):
        torch.testing.assert_close(ours, others)


def test_what_lies_in_hidden_keys_changes_no_bit(gradients):
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[0, :5], mask[1, 30:] = False, False
    args, dout = arguments(mask=True)
    args["mask"] = mask
    first, _ = gradients(args, dout)
    poisoned = args | {n: args[n].masked_fill(~mask[..., None, None], torch.nan) for n in "kv"}
    second, _ = gradients(poisoned, dout)
    assert all(map(torch.equal, first, second))
    assert not first[3][0, :5].any() and not first[4][1, 30:].any()


def gradient_of_bias(gradients, shape):
    args, dout = arguments(bias=True, causal=True)
    g = torch.Generator().manual_seed(3)
    args["bias"] = torch.randn(shape, generator=g) if shape[-1] > 1 or shape[-2] > 1 else torch.zeros(shape)
    (out, lse, *found), _ = gradients(args, dout)
    assert found[3].shape == shape
    return found[3], dict(dout=dout, out=out, lse=lse, **args)


@pytest.mark.parametrize("shape", ((1, 1, 1, 37), (2, 1, 20, 1), (1, 1, 20, 37)), ids=str)
def test_the_gradient_of_a_bias_is_summed_where_it_broadcasts(gradients, shape):
    found, args = gradient_of_bias(gradients, shape)
    op = OPS["attention_backward"]
    assert_close_to_truth(found, reference(op, args)[3], truth(op, args)[3], "dbias")


def test_the_gradient_of_one_number_for_all_keys_is_zero(gradients):
    """The same number for all keys changes no probability, except by rounding."""
    found, args = gradient_of_bias(gradients, (1, 2, 1, 1))
    ordinary = reference(OPS["attention_backward"], args | dict(bias=torch.zeros(2, 2, 20, 37)))[3]
    assert found.abs().max() < torch.finfo(torch.float32).eps * ordinary.abs().sum()


def test_gradients_repeat_bit_for_bit(gradients):
    args, dout = arguments(torch.bfloat16, dropout_p=0.2, seed=True)
    first, launches = gradients(args, dout)
    assert all(map(torch.equal, first, gradients(args, dout)[0]))
    assert not any(launch.counters["global_atomic_requests"] for launch in launches)
