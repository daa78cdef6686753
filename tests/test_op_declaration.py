"""``@op`` for users: declarations that do not fit are refused, and autograd sees the changes of in-place ops."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

import gpt2fast.ops  # noqa: F401
from gpt2fast import use_backend
from gpt2fast.op import OPS, op
from gpt2fast.testing import build, checks_of

pytestmark = pytest.mark.usefixtures("ops_as_before")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(shapes=dict(x="... C", y="C")), "shapes= must name arguments, x, scale, got 'y'"),
        (dict(shapes=dict()), "shapes= must say the shape of every tensor, got none for 'x'"),
        (dict(saves="mean"), "returns= and saves= must name its 1 outputs, got 2 (y, mean)"),
        (dict(returns=""), "returns= and saves= must name its 1 outputs, got 0 (none)"),
        (
            dict(values=dict(scale="at least 0")),
            "values= must be an interval, choices, 'given if NAME' or 'drawable if NAME', got 'at least 0'",
        ),
        (dict(values=dict(factor="[0, 1]")), "values= must name arguments, x, scale, got 'factor'"),
        (dict(values=dict(x="[0, C) or limit")), "values= must name arguments, x, scale, got 'limit'"),
        (dict(fused_returns=lambda x, scale: x), "fused_returns= must come with fused= and saves=, got it alone"),
        (dict(autocast="bfloat16"), "autocast must be 'lower', 'float32' or 'widest', got 'bfloat16'"),
    ],
)
def test_a_declaration_that_does_not_fit_its_function(options, message):
    before = dict(OPS)
    with pytest.raises(ValueError) as raised:

        @op(**dict(shapes=dict(x="... C"), cases=[], namespace="gpt2fast_test") | options)
        def misdeclared(x: Tensor, scale: float = 1.0) -> Tensor:
            """x, scaled."""
            return x * scale

    assert str(raised.value).removeprefix("gpt2fast_test::misdeclared: ") == message
    assert before == OPS and not hasattr(torch.ops.gpt2fast_test, "misdeclared")


def test_a_case_that_lacks_a_letter():
    with pytest.raises(ValueError, match=r"case must say C for the shape '... C', got {'B': 2, 'T': 3}"):
        build(OPS["gelu"], dict(B=2, T=3))


def test_in_place_ops_are_seen_by_autograd():
    @op(shapes=dict(x="... C"), cases=[], mutates=["x"], namespace="gpt2fast_test", autocast="widest")
    def halve_(x: Tensor) -> None:
        """Halves x in place."""
        x.mul_(0.5)

    weight = torch.ones(3, requires_grad=True)
    loss = (weight * weight).sum()
    with torch.no_grad():
        halve_(weight)
    assert weight.tolist() == [0.5, 0.5, 0.5]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def declare(factor, derivative=None, extra=False, autocast="widest"):
    """The op ``gpt2fast_test::again``: factor x, or factor x + shift, declared as in a notebook's cell."""
    options = dict(cases=[dict(B=2, T=3, C=5)], namespace="gpt2fast_test", autocast=autocast)
    if extra:

        @op(shapes=dict(x="... C", shift="C"), **options)
        def again(x: Tensor, shift: Tensor) -> Tensor:
            """y = factor x + shift."""
            return x * factor + shift

    else:

        @op(shapes=dict(x="... C"), **options)
        def again(x: Tensor) -> Tensor:
            """y = factor x."""
            return x * factor

    @again.backward()
    def _(saved, grad):
        return dict(x=grad.y * (factor if derivative is None else derivative), shift=grad.y.flatten(0, -2).sum(0))

    return again


@pytest.fixture
def forget_again():
    tag = torch.compiler.config.cache_key_tag
    yield
    OPS.pop("gpt2fast_test::again", None)
    torch.compiler.config.cache_key_tag = tag


def gradient(function, x):
    x = x.clone().requires_grad_()
    function(x).sum().backward()
    return x.grad


def test_an_op_declared_again_is_replaced(forget_again):
    x = torch.arange(6.0).view(2, 3)
    first = declare(2.0)

    def through(x):
        return first(x) + 1

    compiled = torch.compile(through, fullgraph=True)
    assert torch.equal(compiled(x), 2 * x + 1) and torch.equal(gradient(compiled, x), torch.full_like(x, 2))
    for factor in (3.0, 4.0):
        second = declare(factor, derivative=10 * factor)
        assert OPS["gpt2fast_test::again"] is second and first is second  # a name bound to the first gives the second
        for function in (second, first, torch.ops.gpt2fast_test.again):
            assert torch.equal(function(x), factor * x)
        assert torch.equal(second.reference(x), factor * x) and second(x.to("meta")).shape == x.shape
        assert torch.equal(gradient(second, x), torch.full_like(x, 10 * factor))
        assert torch.equal(compiled(x), factor * x + 1)
        assert torch.equal(gradient(compiled, x), torch.full_like(x, 10 * factor))
    declare(5.0, autocast="lower")
    with torch.autocast("cpu", torch.bfloat16):
        assert second(x).dtype == torch.bfloat16


def test_another_schema_replaces_too_and_keeps_every_promise(forget_again):
    x, shift = torch.arange(6.0).view(2, 3), torch.ones(3)
    first, others = declare(2.0), {name: vars(o).copy() for name, o in OPS.items()}
    for _ in range(2):
        second = declare(3.0, extra=True)
        assert second is first and torch.equal(first(x, shift), 3 * x + 1)
        with pytest.raises(
            ValueError, match=r"gpt2fast_test::again: shift must have shape \(C,\) = \(3,\), got \(2,\)"
        ):
            second(x, torch.ones(2))
        with use_backend("fused"):
            assert torch.equal(second(x, shift), 3 * x + 1)
        for check in checks_of(second):
            check()
        second = declare(2.0)
        assert torch.equal(first(x), 2 * x)
    for name, before in others.items():
        assert OPS[name] is first or vars(OPS[name]) == before
    assert torch.equal(gradient(OPS["gelu"], x), gradient(lambda x: torch.nn.functional.gelu(x, approximate="tanh"), x))


def test_a_derivative_registered_again_is_replaced(forget_again):
    x, declared = torch.ones(2, 3), declare(2.0)

    @declared.backward()
    def _(saved, grad):
        return dict(x=grad.y * 7)

    assert torch.equal(gradient(declared, x), torch.full_like(x, 7))


def test_a_kernel_of_an_op_declared_again_applies_where_the_schema_is_the_same(forget_again):
    x, first = torch.ones(2, 3), declare(2.0)
    library = torch.library.Library("gpt2fast_test", "IMPL")
    library.impl("again", lambda x: x * 100, "CPU")
    try:
        assert torch.equal(declare(3.0)(x), x * 100)
        said = (
            r"gpt2fast_test::again: a kernel at the dispatcher's CPU key was made for the schema \(Tensor x\) -> "
            r"Tensor, so that the op must have it when it is declared again, got \(Tensor x, Tensor shift\) -> Tensor"
        )
        with pytest.raises(ValueError, match=said):
            declare(4.0, extra=True)
        assert torch.equal(first(x), x * 100) and torch.equal(gradient(first, x), torch.full_like(x, 3))
        with use_backend("reference"):
            assert torch.equal(first(x), 3 * x)
            assert torch.equal(declare(5.0)(x), 5 * x)
    finally:
        library._destroy()
    assert torch.equal(first(x), 5 * x)


def test_ours_in_cpp_is_declared_again_in_another_process():
    """A call that the C++ kernels send back to Python (float64 here) reaches the new declaration."""
    code = """if True:
        import importlib, sys, torch
        import gpt2fast.ops
        from gpt2fast.op import OPS
        old = OPS["gelu"]
        importlib.reload(sys.modules["gpt2fast.ops.gelu"])
        new = OPS["gelu"]
        x = torch.randn(3, 4, dtype=torch.float64)
        for y in (x, x.float(), x.bfloat16()):
            torch.testing.assert_close(new(y), torch.nn.functional.gelu(y, approximate="tanh"))
        y = x.clone().requires_grad_()
        new(y).sum().backward()
        print(new is old, y.grad.shape)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True torch.Size([3, 4])\n", done.stderr


def test_a_derivative_that_nobody_has_registered_yet_is_missed_by_name():
    @op(shapes=dict(x="... C"), cases=[], namespace="gpt2fast_test")
    def twice(x: Tensor) -> Tensor:
        """y = 2 x."""
        return x * 2

    x = torch.ones(3, requires_grad=True)
    said = r"gpt2fast_test::twice has no derivative yet: register one by @twice.backward\(...\), or declare the op with"
    with pytest.raises(RuntimeError, match=said):
        twice(x).sum().backward()
    with pytest.raises(RuntimeError, match=said):
        torch.func.grad(lambda x: twice(x).sum())(x)
    twice.backward("")(lambda saved, grad: dict(x=2 * grad.y))
    twice(x).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


def _without_annotation(x, scale=1.0) -> Tensor: ...


def _without_return(x: Tensor): ...


def _of_any_number(x: Tensor, *more: Tensor) -> Tensor: ...


def _of_a_dict(x: Tensor, options: dict) -> Tensor: ...


@pytest.mark.parametrize(
    "function, reason",
    [
        (_without_annotation, "Parameter x must have a type annotation."),
        (_without_return, "No return type annotation was provided."),
        (_of_any_number, "We do not support positional-only args, varargs, or varkwargs."),
        (_of_a_dict, "Parameter options has unsupported type <class 'dict'>."),
    ],
)
def test_a_schema_that_cannot_be_inferred(function, reason):
    before = dict(OPS)
    with pytest.raises(ValueError) as raised:
        op(shapes=dict(x="... C"), cases=[], namespace="gpt2fast_test")(function)
    said = str(raised.value)
    name = function.__name__
    assert said.startswith(f"gpt2fast_test::{name}: no schema can be inferred from {name}(x") and reason in said
    assert "Arguments must be Tensor, int, float" in said and "valid types" not in said and before == OPS
