"""Makes test inputs from a declaration. A case has the sizes by letter and the other arguments by name."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import second
from .. import shapes as _shapes
from ..op import Op

LAYOUTS = ("contiguous", "sliced", "transposed")
# "sliced": the rows are parts of a wider buffer. "transposed": the last dimension is not dense. The gaps hold NaN.


def build(
    op: Op, case: dict[str, Any], dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0
) -> dict[str, Any]:
    """The arguments of ``op`` for ``case``: random normals or the tensors of ``make=``.

    Optional tensors are included if the case names them. A backward op gets the inputs and outputs of its forward op's
    reference, and random gradients of the outputs.
    """
    generator = torch.Generator().manual_seed(seed)
    if op.derivative_of is not None:
        return _build_backward(op, case, dtype, layout, seed)
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
        dims, wanted = _shapes.parse(spec)
        made = []
        for shape in case["each"] if dims == _shapes.EACH else [_shapes.concrete(spec, case, leading)]:
            if name in op.make:
                tensor = op.make[name](shape, case, generator)
            else:
                tensor = torch.randn(shape, generator=generator)
            made.append(_lay_out(tensor.to(wanted or (dtype if tensor.is_floating_point() else tensor.dtype)), layout))
        args[name] = made if dims == _shapes.EACH else made[0]
    return {name: args[name] for name in op.signature.parameters}


def _build_backward(op: Op, case: dict, dtype: torch.dtype, layout: str, seed: int) -> dict[str, Any]:
    forward, generator = op.derivative_of, torch.Generator().manual_seed(~seed)  # other numbers than the inputs
    assert forward is not None
    wanted = {n: True for n in forward.optional if f"d{n}" in op.returns and n not in op.signature.parameters}
    made = build(forward, case | wanted, dtype, seed=seed)
    made |= dict(zip(forward.outputs, reference(forward, made)))
    for name in forward.returns:
        made[f"d{name}"] = torch.randn(made[name].shape, generator=generator).to(made[name].dtype)
    args = {n: made[n] if n in made else case.get(n, p.default) for n, p in op.signature.parameters.items()}
    return {n: _lay_out(v, layout) if isinstance(v, Tensor) else v for n, v in args.items()}


def call(op: Op, args: dict[str, Any]) -> tuple[Tensor, ...]:
    """All outputs of ``op`` on the backend in force, those for the backward pass included, as a tuple.

    For an op that changes arguments in place, they are changed copies of those. The given arguments stay as they are.
    """
    return outputs_of(op, op.overload, args)


def outputs_of(op: Op, function: Callable[..., Any], args: dict[str, Any]) -> tuple[Tensor, ...]:
    """The tensors that ``function`` returns or changes, as a tuple. It takes the arguments of ``op``."""
    if op.mutates:
        args = args | {name: every(torch.clone, args[name]) for name in op.mutates}
        function(**args)
        changed = [args[name] for name in op.mutates]
        return tuple(t for value in changed for t in (value if isinstance(value, list) else [value]))
    out = function(**args)
    return out if isinstance(out, tuple) else (out,)


def names_of_outputs(op: Op, args: dict[str, Any]) -> list[str]:
    """The names of the tensors that ``call`` returns."""
    if not op.mutates:
        return list(op.outputs)
    values = {name: args[name] for name in op.mutates}
    return [
        label
        for name, value in values.items()
        for label in ([f"{name}[{i}]" for i in range(len(value))] if isinstance(value, list) else [name])
    ]


def every(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Applies ``function`` to a tensor, or to every tensor of a list. Other values are returned as they are."""
    if isinstance(value, (list, tuple)):
        return [every(function, member) for member in value]
    return function(value) if isinstance(value, Tensor) else value


def tensors_of(args: dict[str, Any]) -> list[Tensor]:
    """All tensors among the arguments, those in lists included."""
    values = [member for v in args.values() for member in (v if isinstance(v, (list, tuple)) else [v])]
    return [value for value in values if isinstance(value, Tensor)]


def cast(args: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Converts all floating-point tensors to ``dtype``, float32 statistics included."""

    return {name: every(lambda t: t.to(dtype) if t.is_floating_point() else t, value) for name, value in args.items()}


def reference(op: Op, args: dict[str, Any], dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """The outputs of the reference, for the arguments in ``dtype`` (None: as they are)."""
    return outputs_of(op, op.reference, args if dtype is None else cast(args, dtype))


def truth(op: Op, args: dict[str, Any]) -> tuple[Tensor, ...]:
    """The outputs in float64, by the reference. For a backward op, by autograd through the forward op's reference."""
    if op.derivative_of is None:
        return reference(op, args, torch.float64)
    return second.gradients(op, cast(args, torch.float64))


def work(op: Op, case: dict[str, Any]) -> int:
    """An estimate of the cost of a case in operations: the larger of its FLOPs and 8 per input element."""
    flops = int(op.flops(case)) if op.flops else 0
    if op.derivative_of is not None:
        return max(flops, work(op.derivative_of, case))
    return max(flops, 8 * sum(_elements(op, case)))


def flops(op: Op, case: dict[str, Any]) -> float:
    """The FLOPs of a case by the declaration. Without ``flops=``, one for each element of the first tensor."""
    if op.flops:
        return op.flops(case)
    return flops(op.derivative_of, case) if op.derivative_of is not None else next(iter(_elements(op, case)), 0)


def has_elements(op: Op, case: dict[str, Any]) -> bool:
    """Whether the first tensor of a case is not empty and the case has FLOPs."""
    forward = op.derivative_of or op
    return flops(op, case) > 0 and next(iter(_elements(forward, case)), 0) > 0


def _elements(op: Op, case: dict[str, Any]) -> list[int]:
    """The number of elements of each tensor argument of a case."""
    args = {n: case.get(n, p.default) for n, p in op.signature.parameters.items() if n not in op.tensors}
    leading = (case["B"], case["T"]) if "B" in case and "T" in case else ()
    found = []
    for name in op.tensors:
        if name in op.optional and not case.get(name):
            continue
        spec = _shapes.resolve(op.shapes[name], args)
        each = _shapes.parse(spec)[0] == _shapes.EACH
        shapes = case["each"] if each else [_shapes.concrete(spec, case, leading)]
        found.append(sum(math.prod(shape) for shape in shapes))
    return found


def cut(op: Op, case: dict[str, Any], limit: int) -> dict[str, Any]:
    """The case with fewer rows, if it costs more than ``limit``: first a batch of 1, then an odd number of tokens.

    Columns, heads and vocabulary stay as they are, because a kernel may hold all of them. So does the number of keys
    before the tokens, or the number of all keys where there are fewer keys than tokens.
    """
    rows = "R" if "R" in case else "T"
    while work(op, case) > limit and any(shape[:1] > (1,) for shape in case.get("each", ())):
        shapes = list(case["each"])  # the largest one gets smaller
        at = max((i for i in range(len(shapes)) if shapes[i][:1] > (1,)), key=lambda i: math.prod(shapes[i]))
        shapes[at] = (max(shapes[at][0] // 2, 2) - 1, *shapes[at][1:])
        case = case | dict(each=shapes)
    while work(op, case) > limit and (case.get("B", 1) > 1 or case.get(rows, 1) > 3):
        if case.get("B", 1) > 1:
            case = case | dict(B=1)
            continue
        fewer = max(case[rows] // 2, 2) - 1
        if case.get("S", 0) >= case.get("T", 0) and "S" in case:
            case = case | dict(S=case["S"] - case["T"] + fewer)
        case = case | {rows: fewer}
    return case


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
