"""What every op promises besides its numbers: opcheck, gradients, compile, autocast, errors. All by the loop."""

import re

import pytest
import torch
from conftest import flops, op_cases
from torch import Tensor
from torch.autograd import forward_ad

from gpt2fast import backends, shapes
from gpt2fast.op import OPS
from gpt2fast.testing import LAYOUTS, assert_close_to_truth, build, call
from gpt2fast.testing.inputs import cast, every, outputs_of, reference

TINY = 4000  # operations: for float64 finite differences
FORWARD = [o for o in OPS.values() if o.has_derivative]


def floating(args):
    return [n for n, v in args.items() if isinstance(v, Tensor) and v.is_floating_point()]


@pytest.mark.parametrize("op, case", op_cases(10_000))
def test_opcheck(op, case):
    for layout in LAYOUTS[:2]:
        args = build(op, case, layout=layout)
        if op.has_derivative:
            args = {n: v.requires_grad_() if n in floating(args) else v for n, v in args.items()}
        torch.library.opcheck(op.overload, (), args)


@pytest.mark.parametrize("op, case", op_cases(TINY, FORWARD))
def test_gradients_against_finite_differences(op, case):
    args = cast(build(op, case), torch.float64)
    names = floating(args)

    def function(*tensors):
        out = op(**(args | dict(zip(names, tensors))))
        return out

    leaves = [args[n].clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, fast_mode=False)


def gradients(op, args, dout):
    leaves = {n: args[n].detach().clone().requires_grad_() for n in floating(args)}
    out = op(**(args | leaves))
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(out, [d.to(o.dtype) for o, d in zip(out, dout)])
    return {n: leaf.grad for n, leaf in leaves.items()}


@pytest.mark.parametrize("backend", ("auto", "fused"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("op, case", op_cases(3_000_000, FORWARD))
def test_gradients_keep_the_parity_rule(op, case, dtype, backend):
    found = {}  # per gradient: actual, plain and truth; small cases are pooled over seeds: few rows are luck
    for seed in range(16 if flops(op, case) <= 100_000 else 1):
        args = build(op, case, dtype, seed=seed)
        outs = reference(op, args)[: len(op.returns)]
        generator = torch.Generator().manual_seed(seed)
        dout = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outs]
        with backends.use_backend(backend):
            actual = gradients(op, args, dout)
        with backends.use_backend("reference"):
            plain = gradients(op, args, dout)
            truth = gradients(op, cast(args, torch.float64), [d.double() for d in dout])
        for name in actual:
            found.setdefault(name, []).append((actual[name], plain[name], truth[name]))
    for name, runs in found.items():
        assert_close_to_truth(*(torch.stack(tensors) for tensors in zip(*runs)), f"d{name}", op.gradient_slack)


@pytest.mark.parametrize("op", FORWARD, ids=lambda op: op.name)
def test_compiles_whole_forward_and_backward(op):
    case = next(c for c in op.cases if 0 < flops(op, c) <= 3_000_000 and c.get("B", c.get("R")) > 1)
    args = build(op, case)
    names = floating(args)

    def run(compiled, args):
        def function(*tensors):
            out = op(**(args | dict(zip(names, tensors))))
            return sum((o.square() / 2).sum() for o in (out if isinstance(out, tuple) else (out,)))

        leaves = [args[n].clone().requires_grad_() for n in names]
        (torch.compile(function, fullgraph=True) if compiled else function)(*leaves).backward()
        return [leaf.grad for leaf in leaves]

    torch._dynamo.reset()
    actual = run(True, args)
    with backends.use_backend("reference"):
        plain, truth = run(False, args), run(False, cast(args, torch.float64))
    for name, *gradients in zip(names, actual, plain, truth):
        assert_close_to_truth(*gradients, f"d{name}", op.gradient_slack)


@pytest.mark.parametrize("op", [o for o in OPS.values() if not o.has_derivative], ids=lambda op: op.name)
def test_compiles_whole_without_derivative(op):
    case = next(c for c in op.cases if 0 < flops(op, c) <= 3_000_000)
    args = build(op, case)
    torch._dynamo.reset()
    compiled = outputs_of(op, torch.compile(lambda **kw: op.overload(**kw), fullgraph=True), args)
    for a, b in zip(compiled, call(op, args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", FORWARD, ids=lambda op: op.name)
def test_autocast(op):
    case = next(c for c in op.cases if 0 < flops(op, c) <= 3_000_000)
    args = build(op, case)
    leaves = {n: v.requires_grad_() for n, v in args.items() if n in floating(args)}
    with torch.autocast("cpu", torch.bfloat16):
        out = op(**args)
        out = out if isinstance(out, tuple) else (out,)
        sum(o.float().sum() for o in out).backward()  # inside: the *_backward op is under autocast too
    expected = torch.bfloat16 if op.autocast == "lower" and "loss" not in op.returns else torch.float32
    assert all(o.dtype == expected for o in out)
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves.values())
    mixed = {n: v.detach().bfloat16() if i == 0 else v for i, (n, v) in enumerate(leaves.items())}
    with torch.autocast("cpu", torch.bfloat16):  # mixed dtypes in: no error
        op(**(args | mixed))


@pytest.mark.parametrize("op", [o for o in OPS.values() if not o.has_derivative], ids=lambda op: op.name)
def test_autocast_without_derivative(op):
    """What autocast casts to is what the op is called with: the very bits, statistics as they are."""
    case = next(c for c in op.cases if 0 < flops(op, c) <= 3_000_000)
    for dtype in (torch.float32, torch.bfloat16):
        args = build(op, case, dtype)
        target = {"lower": torch.bfloat16, "float32": torch.float32, "widest": dtype}[op.autocast]
        data = [n for n in floating(args) if shapes.parse(shapes.resolve(op.shapes[n], args))[1] is None]
        expected = call(op, args | {n: args[n].to(target) for n in data})
        with torch.autocast("cpu", torch.bfloat16):
            found = call(op, args)
        for a, b in zip(found, expected):
            assert a.dtype == b.dtype and torch.equal(a, b), dtype


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_autocast_to_the_widest_keeps_one_dtype(dtype):
    with torch.autocast("cpu", torch.bfloat16):
        assert OPS["gelu"](torch.randn(2, 3).to(dtype)).dtype == dtype


@pytest.mark.parametrize("name", ("layer_norm", "linear", "gelu", "cross_entropy", "attention", "decode_attention"))
def test_forward_mode_and_function_transforms(name):
    """Forward-mode AD and torch.func, which an autograd kernel does not know, give what plain PyTorch gives."""
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


def penalty(op, args, function):
    """Of the floating inputs the gradients of a loss and of the squares of its gradients."""
    leaves = [args[name].clone().requires_grad_() for name in floating(args)]
    outs = function(args | dict(zip(floating(args), leaves)))[: len(op.returns)]
    weights = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape) for o in outs]
    loss = sum((o * w).sum() + o.square().sum() for o, w in zip(outs, weights))
    first = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    total = sum(g.square().sum() for g in first if g is not None)
    return torch.autograd.grad(total, leaves, materialize_grads=True)


@pytest.mark.parametrize("op", [o for o in OPS.values() if o.has_derivative], ids=lambda o: o.name)
def test_second_derivatives(op):
    """Against float64 through the reference; what a forward pass saves, as a mean, changes with the inputs."""
    for case in [c for c in op.cases if 0 < flops(op, c) <= TINY]:
        args = build(op, case)
        found = penalty(op, args, lambda a: call(op, a))
        plain = penalty(op, args, lambda a: reference(op, a))
        exact = penalty(op, cast(args, torch.float64), lambda a: reference(op, a))
        for name, *tensors in zip(floating(args), found, plain, exact):
            assert_close_to_truth(*tensors, f"{case}: {name}", op.gradient_slack)


def test_a_third_derivative_raises():
    x = torch.randn(3, 4, requires_grad=True)
    (first,) = torch.autograd.grad(OPS["gelu"](x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="gpt2fast::gelu_backward is differentiated once more at most"):
        torch.autograd.grad(first.square().sum(), x, create_graph=True)


@pytest.mark.parametrize(
    "op", [o for o in OPS.values() if not (o.has_derivative or o.mutates or o.derivative_of)], ids=lambda o: o.name
)
def test_no_derivative_raises_instead_of_guessing(op):
    case = next(c for c in op.cases if 0 < flops(op, c) <= 3_000_000)
    args = build(op, case)
    args = {n: every(lambda t: t.requires_grad_() if t.is_floating_point() else t, v) for n, v in args.items()}
    outs = [o for o in call(op, args) if o.is_floating_point() and o.numel()]
    if not outs:
        assert not any(o.requires_grad for o in call(op, args))
        return
    with pytest.raises(RuntimeError, match=f"gpt2fast::{op.name} has no derivative"):
        outs[0].sum().backward()


def test_tangents_in_a_list_are_not_dropped():
    x, direction = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="gpt2fast::gradient_norm has no derivative"):
            OPS["gradient_norm"]([forward_ad.make_dual(x, direction)])


def wrong_inputs(op, args):
    """(argument, change, arguments): one size, rank, dtype, kind or device changed at a time."""
    for name in op.tensors:
        good = args[name]
        if isinstance(good, list):
            yield name, "length", args | {name: [*good, good[0]]}
            for _, change, changed in _wrong_tensors(name, good[0], args):
                yield name, change, args | {name: [changed[name], *good[1:]]}
        else:
            yield from _wrong_tensors(name, good, args)


def _wrong_tensors(name, good, args):
    for axis in range(good.dim()):
        if good.shape[axis]:
            yield name, f"axis {axis}", args | {name: torch.cat([good, good.narrow(axis, 0, 1)], axis)}
    yield name, "rank", args | {name: good[None]}
    yield name, "dtype", args | {name: good.to(torch.float64 if good.is_floating_point() else torch.int32)}
    yield name, "kind", args | {name: good.long() if good.is_floating_point() else good.float()}
    yield name, "device", args | {name: good.to("meta")}


def must_raise(op, args, name, change) -> bool:
    """Whether a change of any but the first tensors, which others are compared with, must be laid at ``name``."""
    specs = {n: shapes.parse(shapes.resolve(op.shapes[n], args)) for n in op.tensors}
    if name == op.tensors[0] or name == next(n for n, (_, dtype) in specs.items() if dtype is None):
        return False
    if not change.startswith("axis"):
        return True
    dims = specs[name][0]
    if dims == shapes.EACH:
        return True
    letter = dims[max(int(change[5:]) - args[name].dim() + len(dims), 0)].split("|")[0]
    before = op.tensors[: op.tensors.index(name)]
    return letter.isdigit() or any(letter in (d.split("|")[0] for d in specs[n][0]) for n in before)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_bad_input_names_op_argument_expected_and_got(op):
    case = next(c for c in op.cases if 0 < flops(op, c) <= 100_000)
    seen = set()
    for name, change, args in wrong_inputs(op, build(op, case | dict.fromkeys(op.optional, True))):
        try:
            shapes.check(f"gpt2fast::{op.name}", op.shapes, args)
        except (ValueError, TypeError) as error:
            expected = error
        else:  # the change fits: a letter that is nobody else's, or an only tensor of another dtype
            assert not must_raise(op, args, name, change), (name, change)
            continue
        for function in (op.overload, op.check_call):
            with pytest.raises(type(expected)) as raised:
                function(**args)
            assert str(raised.value).split("\n")[0] == str(expected), (name, change)
        said = re.match(rf"gpt2fast::{op.name}: (\w+)(?:\[\d+\])? must .+, got .+", str(expected))
        assert said, expected
        assert said[1] == name or not must_raise(op, args, name, change), (name, change, str(expected))
        seen.add(name)
    assert seen == set(op.tensors)


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
    """The unused end of a cache is uninitialised memory, NaN here: neither outputs nor gradients may show it."""
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
