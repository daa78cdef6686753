"""The promises about derivatives.

First derivatives are checked by finite differences and by the parity rule, second ones by the parity rule. An op
without a derivative must raise.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..op import Op
from .inputs import build, call, cast, every, flops, reference, work
from .parity import assert_close_to_truth
from .promise import MODERATE, QUICK, TINY, first_case, floating, floating_outputs, promise

STEP, RELATIVE = 1e-6, 1e-3  # of finite differences in float64, as in torch.autograd.gradcheck
DRAWS = 16  # the inputs of a small case are drawn so many times and judged together: errors of few rows vary by chance


@promise
def gradients_match_finite_differences(op: Op, case: dict[str, Any]) -> None:
    """In float64, the derivative agrees with finite differences of the op; for larger cases along one direction."""
    args = cast(build(op, case), torch.float64)
    names = floating(args)

    def function(*tensors):
        return op(**(args | dict(zip(names, tensors))))

    leaves = [args[n].clone().requires_grad_() for n in names]
    if work(op, case) > TINY:
        for i, name in enumerate(names):
            _assert_slope(function, leaves, i, f"{op.qualified}: gradients for {case}: d{name}")
        return
    try:
        torch.autograd.gradcheck(function, leaves, eps=STEP, rtol=RELATIVE)
    except RuntimeError as error:
        which = ", ".join(f"input {i} is {name}" for i, name in enumerate(names))
        raise AssertionError(f"{op.qualified}: gradients for {case} ({which}): {error}") from error


def _assert_slope(function: Callable[..., Any], leaves: Sequence[Tensor], i: int, what: str) -> None:
    """Checks one input along a random direction v: with w the change of the outputs, <J^T w, v> must be <w, w>."""
    direction = torch.randn(leaves[i].shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)

    def moved(step: float) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return floating_outputs(function(*leaves[:i], leaves[i] + step * direction, *leaves[i + 1 :]))

    changes = [(a - b) / (2 * STEP) for a, b in zip(moved(STEP), moved(-STEP))]
    outs = floating_outputs(function(*leaves))
    (gradient,) = torch.autograd.grad(outs, leaves[i], changes, allow_unused=True)
    got = 0.0 if gradient is None else (gradient * direction).sum().item()
    expected = sum(change.square().sum().item() for change in changes)
    assert abs(got - expected) <= RELATIVE * expected, (
        f"{what} is not what finite differences along a random direction give: got {got:.9g}, expected {expected:.9g}"
    )


def gradients(op: Op, args: dict[str, Any], douts: Sequence[Tensor]) -> dict[str, Tensor]:
    """The gradient of each floating-point input, or zeros. ``douts`` are the gradients of what the op returns."""
    leaves = {n: args[n].detach().clone().requires_grad_() for n in floating(args)}
    out = op(**(args | leaves))
    out = out if isinstance(out, tuple) else (out,)
    pairs = [(o, d.to(o.dtype)) for o, d in zip(out, douts) if o.is_floating_point()]
    torch.autograd.backward([o for o, _ in pairs], [d for _, d in pairs])
    return {n: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for n, leaf in leaves.items()}


@promise
def gradients_keep_the_parity_rule(
    op: Op, case: dict[str, Any], dtype: torch.dtype = torch.float32, backend: str = "auto"
) -> None:
    """The gradients on a backend are about as exact as those through the reference, compared with float64."""
    found: dict[str, list] = {}  # actual, plain and truth of each gradient
    for seed in range(DRAWS if flops(op, case) <= QUICK else 1):
        args = build(op, case, dtype, seed=seed)
        outs = reference(op, args)[: len(op.returns)]
        generator = torch.Generator().manual_seed(seed)
        douts = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outs]
        with backends.use_backend(backend):
            actual = gradients(op, args, douts)
        with backends.use_backend("reference"):
            plain = gradients(op, args, douts)
            truth = gradients(op, cast(args, torch.float64), [d.double() for d in douts])
        for name in actual:
            found.setdefault(name, []).append((actual[name], plain[name], truth[name]))
    for name, runs in found.items():
        label = f"{op.qualified}: d{name} on {backend!r} for {case} in {dtype}"
        assert_close_to_truth(*(torch.stack(tensors) for tensors in zip(*runs)), label)


def _penalty(op: Op, args: dict[str, Any], function: Callable[[dict[str, Any]], Sequence[Tensor]]):
    """The gradients, for each input, of the sum of the squared gradients of a loss.

    None where autograd takes the first gradients for constants.
    """
    leaves = [args[name].clone().requires_grad_() for name in floating(args)]
    outs = floating_outputs(tuple(function(args | dict(zip(floating(args), leaves)))[: len(op.returns)]))
    weights = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape) for o in outs]
    loss = sum((o * w).sum() + o.square().sum() for o, w in zip(outs, weights))
    first = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    total = sum(g.square().sum() for g in first if g is not None)
    if not (isinstance(total, Tensor) and total.requires_grad):
        return None
    return torch.autograd.grad(total, leaves, materialize_grads=True)


@promise
def second_derivatives_keep_the_parity_rule(op: Op, case: dict[str, Any]) -> None:
    """Second derivatives keep the parity rule, compared with float64 through the reference.

    They must include that what the forward pass saves, such as a mean, changes with the inputs.
    """
    args = build(op, case)
    found = _penalty(op, args, lambda a: call(op, a))
    assert found is not None, (
        f"{op.qualified}: the gradients for {case} are constants to autograd, and have no derivative; compute them by "
        "differentiable functions or by an op with derivative_of="
    )
    plain = _penalty(op, args, lambda a: reference(op, a))
    exact = _penalty(op, cast(args, torch.float64), lambda a: reference(op, a))
    for name, *tensors in zip(floating(args), found, plain, exact):
        assert_close_to_truth(*tensors, f"{op.qualified}: second derivative by {name} for {case}")


@promise
def no_derivative_raises(op: Op) -> None:
    """A backward pass through an op without a derivative raises. Else its inputs would silently get no gradients."""
    args = build(op, first_case(op, MODERATE))
    args = {n: every(lambda t: t.requires_grad_() if t.is_floating_point() else t, v) for n, v in args.items()}
    outs = [o for o in call(op, args) if o.is_floating_point() and o.numel()]
    wanted = f"{op.qualified} has no derivative"
    if not outs:
        assert not any(o.requires_grad for o in call(op, args)), f"{op.qualified}: an integer output requires gradients"
        return
    try:
        outs[0].sum().backward()
    except RuntimeError as error:
        assert wanted in str(error), f"{op.qualified}: a backward pass must raise {wanted!r}, got {str(error)!r}"
    else:
        raise AssertionError(f"{op.qualified}: a backward pass must raise RuntimeError {wanted!r}, got no error")
