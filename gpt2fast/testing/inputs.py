"""Test inputs from a declaration: a case's letters give the shapes, its words the other arguments."""

import math
from typing import Any

import torch
from torch import Tensor

from .. import shapes as _shapes
from ..op import Op

LAYOUTS = ("contiguous", "sliced", "transposed")
# contiguous; sliced: rows of a wider buffer, the gaps NaN; transposed: innermost dimension not dense, gaps NaN


def build(
    op: Op, case: dict[str, Any], dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0
) -> dict[str, Any]:
    """The arguments of ``op`` for ``case``: random normals, or what ``make=`` says, with optional tensors if named."""
    generator = torch.Generator().manual_seed(seed)
    args: dict[str, Any] = {}
    for name, parameter in op.signature.parameters.items():
        if name not in op.tensors:
            args[name] = case.get(name, parameter.default)
    leading = (case["B"], case["T"]) if "B" in case and "T" in case else ()
    for name in op.tensors:
        if name in op.optional and not case.get(name):
            args[name] = None
            continue
        spec = _shapes.resolve(op.shapes[name], args)
        shape, wanted = _shapes.concrete(spec, case, leading), _shapes.parse(spec)[1]
        if name in op.make:
            tensor = op.make[name](shape, case, generator)
        else:
            tensor = torch.randn(shape, generator=generator)
        args[name] = _lay_out(tensor.to(wanted or (dtype if tensor.is_floating_point() else tensor.dtype)), layout)
    return {name: args[name] for name in op.signature.parameters}


def call(op: Op, args: dict[str, Any]) -> tuple[Tensor, ...]:
    """All outputs of ``op`` on the active backend, those for the backward pass included, as a tuple."""
    out = op.overload(**args)
    return out if isinstance(out, tuple) else (out,)


def cast(args: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Floating tensors to ``dtype`` (float32 statistics included where it is float64)."""

    def convert(value):
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: convert(value) for name, value in args.items()}


def reference(op: Op, args: dict[str, Any], dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """The reference's outputs; with ``dtype=torch.float64`` the truth for these very inputs."""
    out = op.reference(**(args if dtype is None else cast(args, dtype)))
    return out if isinstance(out, tuple) else (out,)


def work(op: Op, case: dict[str, Any]) -> int:
    """An estimate of what running a case costs, in operations: the larger of its FLOPs and 8 per input element."""
    args = {n: case.get(n, p.default) for n, p in op.signature.parameters.items() if n not in op.tensors}
    leading = (case["B"], case["T"]) if "B" in case and "T" in case else ()
    elements = 0
    for name in op.tensors:
        if name not in op.optional or case.get(name):
            elements += math.prod(_shapes.concrete(_shapes.resolve(op.shapes[name], args), case, leading))
    return max(int(op.flops(case)) if op.flops else 0, 8 * elements)


def _lay_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "contiguous" or tensor.dim() < 2:
        return tensor
    gap = torch.nan if tensor.is_floating_point() else 0
    if layout == "sliced":
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), gap, dtype=tensor.dtype)
        wide[..., : tensor.shape[-1]] = tensor
        return wide[..., : tensor.shape[-1]]
    if layout == "transposed":
        wide = torch.full((*tensor.shape, 2), gap, dtype=tensor.dtype)
        wide[..., 0] = tensor
        return wide[..., 0]
    raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
