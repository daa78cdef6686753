"""What every op promises besides its numbers: all checks of gpt2fast.testing, and further promises of our own ops."""

import re

import pytest
import torch
from conftest import checks, flops
from torch.autograd import forward_ad

from gpt2fast import backends
from gpt2fast.op import OPS
from gpt2fast.testing import PROMISES, build, call
from gpt2fast.testing.inputs import cast, reference
from gpt2fast.testing.promise import TINY, floating


@pytest.mark.parametrize("check", checks(*(name for name in PROMISES if name != "parity")), ids=str)
def test_contract(check):
    check()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_autocast_to_the_widest_keeps_one_dtype(dtype):
    with torch.autocast("cpu", torch.bfloat16):
        assert OPS["gelu"](torch.randn(2, 3).to(dtype)).dtype == dtype


@pytest.mark.parametrize("name", ("layer_norm", "linear", "gelu", "cross_entropy", "attention", "decode_attention"))
def test_forward_mode_and_function_transforms(name):
    """Forward-mode AD and torch.func give what plain PyTorch gives, although an autograd kernel does not know them."""
    op = OPS[name]
    case = next(c for c in op.cases if 0 < flops(op, c) <= TINY)
    args = build(op, case)
    first = floating(args)[0]

    def through(function):
        return lambda x: function(**(args | {first: x})).square().sum()

    def plain(**kwargs):
        out = op.reference(**kwargs)
        return out[0] if op.saves else out

    x, tangent = args[first], torch.ones_like(args[first])
    assert torch.equal(torch.func.grad(through(op))(x), torch.func.grad(through(plain))(x))
    expected = torch.func.jvp(through(plain), (x,), (tangent,))[1]
    assert torch.equal(torch.func.jvp(through(op), (x,), (tangent,))[1], expected)
    with forward_ad.dual_level():
        assert torch.equal(forward_ad.unpack_dual(through(op)(forward_ad.make_dual(x, tangent))).tangent, expected)
    rows = torch.func.vmap(torch.func.grad(through(op)))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(rows[1], torch.func.grad(through(plain))(2 * x))


def test_a_third_derivative_raises():
    x = torch.randn(3, 4, requires_grad=True)
    (first,) = torch.autograd.grad(OPS["gelu"](x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="gpt2fast::gelu_backward is differentiated once more at most"):
        torch.autograd.grad(first.square().sum(), x, create_graph=True)


def test_tangents_in_a_list_are_not_dropped():
    x, direction = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="gpt2fast::gradient_norm has no derivative"):
            OPS["gradient_norm"]([forward_ad.make_dual(x, direction)])


@pytest.mark.parametrize("op", [o for o in OPS.values() if backends.is_native(o)], ids=lambda op: op.name)
def test_float64_runs_without_our_kernel_and_strict_raises(op):
    case = next(c for c in op.cases if 0 < flops(op, c) <= 100_000)
    args = cast(build(op, case), torch.float64)
    choice = backends.choose(op, **args)
    assert choice.backend == ("fused" if op.fused else "reference")
    assert choice.why == "the kernels cover float32, bfloat16 and float16 only"
    for a, b in zip(call(op, args), reference(op, args)):
        torch.testing.assert_close(a, b)
    expected = f"gpt2fast::{op.name}: backend 'cpu' does not cover this call: {choice.why}"
    with backends.use_backend("cpu"), pytest.raises(RuntimeError, match=re.escape(expected)):
        call(op, args)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("gelu", dict(approximate="fast"), "approximate must be 'tanh' or 'none', got 'fast'"),
        ("bias_gelu", dict(approximate="fast"), "approximate must be 'tanh' or 'none', got 'fast'"),
        ("linear", dict(activation="relu"), "activation must be 'none', 'gelu_tanh' or 'gelu_erf', got 'relu'"),
        ("attention", dict(window=-1), "window must be at least 0 (0: unlimited), got -1"),
        ("attention", dict(dropout_p=1.0), "dropout_p must lie in [0, 1), got 1"),
        ("attention", dict(dropout_p=0.5), "seed must be given where dropout_p > 0, got None"),
        ("decode_attention", dict(window=-2), "window must be at least 0 (0: unlimited), got -2"),
        ("decode_attention", dict(lengths=torch.tensor([5, 1])), "lengths must lie in [0, 4], got 5 at (0,)"),
        ("decode_attention", dict(lengths=torch.tensor([4, -1])), "lengths must lie in [0, 4], got -1 at (1,)"),
        ("decode_attention", dict(starts=torch.tensor([0, 5])), "starts must lie in [0, 4], got 5 at (1,)"),
        ("decode_attention", dict(starts=torch.tensor([-1, 0])), "starts must lie in [0, 4], got -1 at (0,)"),
        ("cross_entropy", dict(reduction="max"), "reduction must be 'none', 'mean' or 'sum', got 'max'"),
        ("cross_entropy", dict(label_smoothing=1.5), "label_smoothing must lie in [0, 1], got 1.5"),
        ("cross_entropy", dict(targets=torch.tensor([0, 1, 7, 2])),
         "targets must lie in [0, 7) or be -100, got 7 at (2,)"),
        ("embedding", dict(tokens=torch.tensor([[0, 1, 2], [3, -1, 2]])),
         "tokens must lie in [0, 7), got -1 at (1, 1)"),
        ("embedding", dict(tokens=torch.tensor([[0, 7, 2], [3, 1, 2]])), "tokens must lie in [0, 7), got 7 at (0, 1)"),
        ("embedding", dict(start=2), "positions must lie in [0, 4), got start = 2 and T = 3"),
        ("embedding", dict(positions=torch.tensor([[0, 4, 2]])), "positions must lie in [0, 4), got 4 at (0, 1)"),
        ("embedding", dict(positions=torch.tensor([[0, 1, -1]])), "positions must lie in [0, 4), got -1 at (0, 2)"),
        ("embedding", dict(start=2**63 - 1), f"positions must lie in [0, 4), got start = {2**63 - 1} and T = 3"),
        ("embedding", dict(start=-1), "positions must lie in [0, 4), got start = -1 and T = 3"),
        ("embedding", dict(token_types=torch.tensor([[0, 1, 2], [3, 1, 7]])),
         "token_types must lie in [0, 7), got 7 at (1, 2)"),
        ("embedding", dict(token_types=torch.tensor([[-1, 1, 2], [3, 1, 6]])),
         "token_types must lie in [0, 7), got -1 at (0, 0)"),
        ("sample", dict(top_p=0.0), "top_p must lie in (0, 1], got 0"),
        ("sample", dict(temperature=float("nan")),
         "temperature must be at least 0 (0: the likeliest token), got nan"),
        ("sample", dict(top_p=1.1), "top_p must lie in (0, 1], got 1.1"),
        ("sample", dict(temperature=-1.0), "temperature must be at least 0 (0: the likeliest token), got -1"),
        ("sample", dict(repetition_penalty=0.0), "repetition_penalty must be above 0, got 0"),
        ("sample", dict(min_p=2.0), "min_p must lie in [0, 1], got 2"),
        ("sample", dict(top_k=-1), "top_k must be at least 0 (0: off), got -1"),
        ("sample", dict(tokens=torch.tensor([[0, -5], [1, 2]])),
         "tokens must lie in [0, 7) or be -1, got -5 at (0, 1)"),
        ("sample", dict(tokens=torch.tensor([[0, 1], [7, 2]])), "tokens must lie in [0, 7) or be -1, got 7 at (1, 0)"),
        ("sample", dict(logits=torch.zeros(2, 0)), "V must be at least 1, got 0"),
        ("gelu", dict(x=torch.tensor(1.0)), "x must have shape (..., C), got ()"),
        ("sample", dict(logits=torch.tensor([[0.0, 1, 2, 3, 4, 5, 6], [0, 1, 2, torch.nan, 4, 5, 6]])),
         "logits must not hold NaN, got NaN at (1, 3)"),
        ("sample", dict(logits=torch.tensor([[0.0, 1, 2], [0, torch.inf, 2]])),
         "logits must have a finite greatest value in each row, got inf in row 1"),
        ("sample", dict(logits=torch.tensor([[0.0, 1, 2], [-torch.inf, -torch.inf, -torch.inf]])),
         "logits must have a finite greatest value in each row, got -inf in row 1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ("cpu", "fused", "reference"))
def test_bad_values(name, change, message, backend):
    declared = OPS[name]
    optional = {"mask", "bias", "positions", "ignore_index", "seed"}
    case = min(
        (c for c in declared.cases if flops(declared, c) and not optional & set(c)), key=lambda c: flops(declared, c)
    )
    args = build(declared, {k: v for k, v in case.items() if k not in ("start", "dropout_p", "seed")}) | change
    with backends.use_backend(backend), pytest.raises(ValueError) as raised:
        call(declared, args)
    assert str(raised.value).split("\n")[0] == f"gpt2fast::{name}: {message}"


@pytest.mark.parametrize(
    "backend, dtype",
    [("auto", torch.float32), ("fused", torch.float32), ("reference", torch.float32), ("auto", torch.float64)],
)
def test_keys_that_nobody_sees_may_hold_anything(backend, dtype):
    """The unused end of a cache is uninitialised memory, NaN here. It must not change outputs or gradients."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 2, 8, generator=g).to(dtype) for n in (1, 5, 5))
    lengths, mask = torch.tensor([3, 3]), torch.tensor([[True] * 3 + [False] * 2] * 2)
    for name, extra in (("decode_attention", dict(lengths=lengths)), ("attention", dict(mask=mask, causal=False))):
        results = []
        with backends.use_backend(backend):
            for poisoned in (False, True):
                leaves = [t.clone() for t in (q, k, v)]
                for t in leaves[1:]:
                    t[:, 3:] = torch.nan if poisoned else 0
                leaves = [t.requires_grad_() for t in leaves]
                out = OPS[name](*leaves, **extra)
                results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for clean, poisoned in zip(*results):
            assert torch.equal(clean, poisoned), (name, backend, dtype)
