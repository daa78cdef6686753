"""Large scores and logits: only their differences from the greatest matter, and these must not be lost in rounding.

All scores here are multiples of 8 with at most 24 bits, so that float32 holds them and the float64 truth is exact.
"""

import pytest
import torch

from gpt2fast import ops
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth, lacks, on, targets_of

OFFSETS = [-(2.0**27), 0.0, 2.0**27, -1e30]


def attention_inputs(offset, dtype=torch.float32):
    """Scores 8 n + offset with n in [-2, 2]. An offset of -1e30 is for the first row's first keys only, so that some
    queries see nothing else."""
    g = torch.Generator().manual_seed(0)
    q = torch.zeros(2, 40, 2, 16).index_fill(3, torch.tensor([0]), 8.0)
    k = torch.randn(2, 40, 2, 16, generator=g)
    k[..., 0] = torch.randint(-2, 3, (2, 40, 2), generator=g).float()
    v = torch.randn(2, 40, 2, 16, generator=g)
    bias = torch.full((2, 1, 40, 40), offset if offset != -1e30 else 0.0)
    if offset == -1e30:
        bias[0, :, :, :7] = offset
    return [t.to(dtype).requires_grad_() for t in (q, k, v)], bias.to(dtype)


def run_attention(target, offset, dtype=torch.float32, derive=True):
    leaves, bias = attention_inputs(offset, dtype)
    with on(target):
        out = ops.attention(*leaves, bias=bias, scale=1.0)
        if not derive:
            return (out,)
        weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)
        return out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)


def check(found, plain, truth, names):
    for name, *three in zip(names, found, plain, truth):
        assert_close_to_truth(*three, name)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("target", targets_of(OPS["attention"]))
def test_attention(target, offset):
    derive = lacks(OPS["attention_backward"], target) is None
    found = run_attention(target, offset, derive=derive)
    plain = run_attention("reference", offset)
    check(found, plain, run_attention("reference", offset, torch.float64), ("out", "dq", "dk", "dv"))


@pytest.mark.parametrize("target", targets_of(OPS["decode_attention"]))
def test_decode_attention(target):
    """Scores near 2^32, from q and k alone."""
    (q, k, v), _ = attention_inputs(0.0)
    q, k = q.detach()[:, :1] * 2**14, k.detach()
    k[..., 1:], k[..., 0] = 0, k[..., 0] * 2**14 + 2**15
    arguments = (q, k, v.detach(), torch.tensor([40, 9]), None, 0, 2.0**-2)
    with on("reference"):
        plain = ops.decode_attention(*arguments)
        truth = ops.decode_attention(
            *(t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in arguments)
        )
    with on(target):
        assert_close_to_truth(ops.decode_attention(*arguments), plain, truth)


@pytest.mark.parametrize("target", ["reference", "fused"])
def test_every_key_hidden_alike_is_no_key_hidden(target):
    q = torch.randn(1, 1, 1, 4)
    v = torch.arange(12.0).view(1, 3, 1, 4)
    with on(target):
        out = ops.attention(q, q.expand(1, 3, 1, 4) * 0, v, bias=torch.full((1, 1, 1, 3), -1e8), causal=False)
    assert out.flatten().tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("offset", [-(2.0**27), 2.0**27, 3e9 // 512 * 512])
@pytest.mark.parametrize("target", ["fused", *targets_of(OPS["cross_entropy"])])  # under "fused", the reference runs
def test_cross_entropy(target, offset, smoothing):
    g = torch.Generator().manual_seed(0)
    logits = 512 * torch.randint(-1, 2, (5, 300), generator=g).float() // 512
    logits = torch.where(logits < 0, -512.0, 0.0) + offset
    targets_ = torch.randint(0, 300, (5,), generator=g)

    def run(where, dtype=torch.float32, derive=True):
        leaf = logits.to(dtype).requires_grad_()
        with on(where):
            loss = ops.cross_entropy(leaf, targets_, label_smoothing=smoothing, reduction="none")
            return (loss.detach(), *(torch.autograd.grad(loss.sum(), leaf) if derive else ()))

    derive = lacks(OPS["cross_entropy_backward"], target) is None
    check(run(target, derive=derive), run("reference"), run("reference", torch.float64), ("loss", "dlogits"))


@pytest.mark.parametrize("options", [{}, dict(top_k=3), dict(top_p=0.5), dict(min_p=0.9), dict(temperature=0.5)])
@pytest.mark.parametrize("target", targets_of(OPS["sample"]))
def test_sample(target, options):
    g = torch.Generator().manual_seed(0)
    logits = 8.0 * torch.randint(-1, 2, (64, 50), generator=g) + 2.0**27
    arguments = (torch.tensor([5]), torch.arange(64))
    with on("reference"):
        expected = ops.sample(logits, *arguments, **options)
    with on(target):
        assert torch.equal(ops.sample(logits, *arguments, **options), expected)
    assert len(set(expected.tolist())) > 5
