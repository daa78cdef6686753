"""What is timed of an op (the forward pass, the backward pass, or both), and what our kernel is compared with."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gpt2fast import backends
from gpt2fast.op import Op
from gpt2fast.testing.gradients import gradients_keep_the_parity_rule
from gpt2fast.testing.parity import assert_parity

from . import cases

MODES = dict(fwd="the forward pass", bwd="the backward pass alone", fwd_bwd="both")
BASELINES = ("fused", "naive", "compiled", "reference")  # and the names of backends


def assert_right(op: Op, case: dict, dtype: torch.dtype, mode: str) -> None:
    """Raises AssertionError if the call that will be timed breaks the parity rule."""
    if mode != "bwd":
        assert_parity(op, case, dtype)
    if mode != "fwd":
        gradients_keep_the_parity_rule(op, case, dtype, "auto")


def ways(op: Op, case: dict, names: Sequence[str] | None = None) -> dict[str, Callable]:
    """What our kernel is compared with, by name, as functions that take the op's arguments by position.

    ``names`` are of ``BASELINES`` or of backends. None stands for PyTorch's fused way and the naive one. Raises
    ValueError for an unknown name, and RuntimeError for a backend that cannot run here.
    """
    found = cases.rivals(op, case)
    if names is None:
        return found
    chosen = {}
    for name in names:
        if name in ("fused", "naive"):
            chosen |= {name: found[name]} if name in found else {}
        elif name == "compiled":
            chosen[name] = torch.compile(op.naive or op.reference, fullgraph=True, dynamic=False)
        elif name == "reference":
            chosen[name] = op.reference
        elif name in backends.BACKENDS:
            with backends.use_backend(name):
                if (kernel := backends.BACKENDS[name].kernels.get(op.key)) is not None:
                    chosen[name] = kernel.run
        else:
            known = ", ".join((*BASELINES, *backends.BACKENDS))
            raise ValueError(f"gpt2fast bench: baselines must be of {known}, got {name!r}")
    return chosen


def with_leaves(args: tuple) -> tuple[tuple, list[Tensor]]:
    """The arguments, with their floating-point tensors replaced by leaves of autograd, and these leaves."""
    args = tuple(a.detach().requires_grad_() if _differentiable(a) else a for a in args)
    return args, [a for a in args if _differentiable(a)]


def outputs(op: Op, function: Callable, args: tuple) -> list[Tensor]:
    """Calls ``function`` and returns those outputs of ``op`` that have gradients."""
    out = function(*args)
    found = (out if isinstance(out, tuple) else (out,))[: len(op.returns)]
    return [o for o in found if o.is_floating_point()]


def prepared(op: Op, function: Callable, args: tuple, mode: str) -> Callable[[], Any]:
    """A function without arguments, which runs the passes of ``function`` that ``mode`` names, for these arguments.

    Raises RuntimeError if PyTorch cannot differentiate ``function``.
    """
    if mode == "fwd":
        return functools.partial(function, *args)
    args, leaves = with_leaves(args)
    found = outputs(op, function, args)
    grads = [torch.ones_like(o) for o in found]
    if mode == "bwd":
        backward = functools.partial(torch.autograd.grad, found, leaves, grads, retain_graph=True, allow_unused=True)
        backward()  # raises if there is no derivative
        return backward
    return lambda: torch.autograd.grad(outputs(op, function, args), leaves, grads, allow_unused=True)


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
