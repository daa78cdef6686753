"""``@op`` as a user meets it: declarations that do not fit are refused, in-place ops are seen by autograd."""

import pytest
import torch
from torch import Tensor

import gpt2fast.ops  # noqa: F401
from gpt2fast.op import OPS, op
from gpt2fast.testing import build


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
