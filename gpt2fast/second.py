"""Derivatives of backward ops, for gradients of gradients (``create_graph=True``).

A backward op gets what its forward op saved, such as the mean of a row, as an argument. Its derivative must not treat
that as a constant, because the mean changes with x. Second derivatives are therefore computed by PyTorch, which
differentiates the reference of the forward op twice.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import shapes

if TYPE_CHECKING:
    from .op import Op


def gradients(declared: "Op", args: dict[str, Any], create_graph: bool = False) -> tuple[Tensor, ...]:
    """Computes the outputs of the backward op ``declared`` for ``args``, by autograd through the forward reference.

    An input of the forward op that is not among ``args`` is replaced by zeros: the gradients do not depend on it.
    """
    forward = declared.derivative_of
    first = next(v for v in args.values() if isinstance(v, Tensor) and v.is_floating_point())
    sizes = declared.check(args) | {name: v for name, v in args.items() if name.isupper()}
    values: dict[str, Any] = {}
    for name, parameter in forward.signature.parameters.items():
        values[name] = args[name] if name in args else parameter.default
        if name in forward.tensors and name not in args and f"d{name}" in declared.returns:
            spec = shapes.resolve(forward.shapes[name], values)
            shape = shapes.concrete(spec, sizes, sizes.get("...", ()))
            values[name] = torch.zeros(shape, dtype=first.dtype, device=first.device)
    wanted = [name[1:] for name in declared.returns if values.get(name[1:]) is not None]
    with torch.enable_grad():
        values |= {
            n: v if create_graph and v.requires_grad else v.detach().requires_grad_()
            for n, v in values.items()
            if n in wanted
        }
        outs = forward.reference(**values)
        outs = dict(zip(forward.outputs, outs if isinstance(outs, tuple) else (outs,)))
        given = [name for name in forward.returns if f"d{name}" in args]
        found = torch.autograd.grad(
            [outs[name] for name in given],
            [values[name] for name in wanted],
            [args[f"d{name}"] for name in given],
            materialize_grads=True,
            create_graph=create_graph,
        )
    by_name, none = dict(zip(wanted, found)), first.new_empty(0)
    return tuple(by_name.get(name[1:], none) for name in declared.returns)


def setup(declared: "Op"):
    """The ``setup_context`` for ``torch.library.register_autograd``. It keeps every argument of the backward op."""

    def keep(ctx, inputs, output) -> None:
        values = dict(zip(declared.names, inputs))
        ctx.save_for_backward(*(values[name] for name in declared.tensors))
        ctx.rest = {name: value for name, value in values.items() if name not in declared.tensors}

    return keep


def derivative(declared: "Op"):
    """The derivative of the backward op ``declared``, for ``torch.library.register_autograd``."""

    def differentiate(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError(f"{declared.qualified} is differentiated once more at most")
        needs = {name for name, needed in zip(declared.names, ctx.needs_input_grad) if needed}
        values = {name: None if t is None else t.detach() for name, t in zip(declared.tensors, ctx.saved_tensors)}
        leaves = {name: values[name].requires_grad_() for name in needs}
        found = gradients(declared, ctx.rest | values, create_graph=True)
        pairs = [(o, g) for o, g in zip(found, grads) if g is not None and g.shape == o.shape and o.requires_grad]
        if not pairs:
            return (None,) * len(declared.names)
        outs, given = zip(*pairs)
        made = torch.autograd.grad(outs, list(leaves.values()), given, allow_unused=True)
        by_name = dict(zip(leaves, made))
        return tuple(by_name.get(name) for name in declared.names)

    return differentiate
