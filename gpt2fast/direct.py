"""A short path for calls that no native CPU kernel runs: it does not go through torch's dispatcher.

These are the calls on a GPU, and those on a CPU while native kernels are hidden, as under ``use_backend("fused")``. For
an op registered from Python, the dispatcher takes more time on the host than most kernels take on the GPU.

A call takes the short path where nothing but autograd would take part in it: no autocast, torch.func, torch.compile or
dispatch mode, no tensor of a subclass, no list of tensors, no argument that the op changes in place, and no CUDA kernel
that someone registered with the dispatcher. On a CPU, autograd must not record the call either. Every other call goes
through the dispatcher. Its results are the same, or as exact where ``fused_returns=`` stands in for ``fused=``.

Inside ``ptx.machine()``, CPU tensors take the short path as CUDA tensors do, so that it is tested without a GPU.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends

if TYPE_CHECKING:
    from .op import Op

_PLAIN = (Tensor, torch.nn.Parameter, type(None))
_count_dispatch_modes = torch._C._len_torch_dispatch_stack
_has_function_mode = torch._C._is_torch_function_mode_enabled
_transformation = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state


def run(declared: "Op", args: Sequence, kwargs: dict) -> Any:
    """Returns the outputs of the op, or NotImplemented where the call must go through the dispatcher.

    The outputs in ``saves`` may be missing where autograd does not record the call.
    """
    whole = not kwargs and len(args) == len(declared.names)
    values = args if whole else _by_position(declared, args, kwargs)
    if values is None or declared.mutates or not _is_open(declared, values):
        return NotImplemented
    records = torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)
    if not records:
        declared.check_call(*values)
        choice = backends.choose(declared, *values)
        short = declared.fused_returns is not None and choice.backend == "fused"
        function = declared.fused_returns if short else choice.run
        out = backends.run_chosen(function, values) if values[0].is_cuda else function(*values)
        return (out,) if short and not isinstance(out, tuple) else out
    if declared.autograd_function is None or not (values[0].is_cuda or backends.cpu_counts_as_cuda()):
        return NotImplemented
    differentiable = declared.fused_is_differentiable
    if differentiable is not None and differentiable(*values):
        declared.check_call(*values)
        choice = backends.choose(declared, *values)
        if choice.backend == "fused":
            return backends.run_chosen(choice.run, values)  # PyTorch's own autograd records the call
    return declared.autograd_function.apply(*values)


def _by_position(declared: "Op", args: Sequence, kwargs: dict) -> Sequence | None:
    """Every argument of the op by position, or None where they do not fit its signature.

    The dispatcher then raises the error.
    """
    defaults = declared.defaults
    if len(args) + len(kwargs) > len(defaults):
        return None
    rest = defaults[len(args) :]
    if kwargs:
        names = declared.names[len(args) :]
        if not kwargs.keys() <= set(names):
            return None
        rest = tuple(kwargs.get(name, default) for name, default in zip(names, rest))
    return None if declared.required in rest else (*args, *rest)


def _is_open(declared: "Op", values: Sequence) -> bool:
    """Whether nothing but autograd would take part in the call if it went through the dispatcher."""
    first = values[0]
    if not isinstance(first, Tensor):
        return False
    if first.is_cuda or (first.is_cpu and backends.cpu_counts_as_cuda()):
        if torch._C._dispatch_has_kernel_for_dispatch_key(declared.qualified, "CUDA"):
            return False
    elif not (first.is_cpu and backends.hides_native_kernels()):
        return False
    for place in declared.tensor_places:
        if type(values[place]) not in _PLAIN:
            return False
    return (
        _count_dispatch_modes() == 0
        and not _has_function_mode()
        and _transformation() is None
        and _tracing_state() is None
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled(first.device.type)
    )


def autograd_function(declared: "Op", setup: Callable, derivative: Callable) -> type[torch.autograd.Function]:
    """An autograd function for the op. ``setup`` and ``derivative`` are those that the dispatcher uses too."""

    def forward(ctx, *args):
        out = backends.run(declared, args, {})
        setup(ctx, args, out)
        ctx.set_materialize_grads(False)  # no zeros are made for the outputs in ``saves``, which have no gradient
        outputs = out if isinstance(out, tuple) else (out,)
        ctx.like = [(o.shape, o.dtype, o.device) for o in outputs[: len(declared.returns)]]
        return out

    def backward(ctx, *grads):
        made = [
            torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
            for grad, (shape, dtype, device) in zip(grads, ctx.like)
        ]
        return derivative(ctx, *made, *grads[len(made) :])

    members = dict(forward=staticmethod(forward), backward=staticmethod(backward))
    return type(declared.name, (torch.autograd.Function,), members)
