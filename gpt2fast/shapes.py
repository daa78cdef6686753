"""Shapes by letter, such as ``"B T C"``: a small language for the checks, test inputs and error messages of every op.

``op`` in op.py describes the language. ``check`` compares the arguments of a call with the declaration and raises.
``compile_check`` generates Python code that does the same in less time for calls that fit.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import values as _values
from .dtypes import dtype_name


def parse(spec: str) -> tuple[list[str], torch.dtype | None]:
    """Splits ``"B T C: int64"`` into its dimensions and dtype (None: the dtype of the first floating tensor)."""
    dims, _, dtype = spec.partition(":")
    return dims.split(), getattr(torch, dtype.strip()) if dtype else None


EACH = ["each"]  # the dimensions of a list of tensors of any shapes; all such lists of a call have the same shapes


def _members(op: str, name: str, value: Any, dims: list[str], sizes: dict[str, Any]) -> list[tuple[str, Any]]:
    """The tensor of an argument, or the tensors of a list, each with its name for error messages."""
    if dims != EACH:
        return [(name, value)]
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{op}: {name} must be a list of tensors, got {type(value).__name__}")
    if "each" in sizes and len(value) != len(sizes["each"]):
        raise ValueError(f"{op}: {name} must have {len(sizes['each'])} tensors, got {len(value)}")
    sizes.setdefault("each", [])
    return [(f"{name}[{i}]", tensor) for i, tensor in enumerate(value)]


def resolve(spec: Any, args: dict[str, Any]) -> str:
    """The text of a shape for these arguments: a spec may be a function, or ``"N K if transposed else K N"``."""
    if callable(spec):
        return spec(args)
    if not (found := alternatives(spec)):
        return spec
    yes, condition, no = found
    return yes if args.get(condition) else no


def alternatives(spec: str) -> tuple[str, str, str] | None:
    """Splits ``"N K if transposed else K N"`` into its three parts; None for a text without a condition."""
    yes, _, rest = spec.partition(" if ")
    condition, _, no = rest.partition(" else ")
    return (yes, condition, no) if rest else None


def concrete(spec: str, sizes: dict[str, int], leading: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The shape with the numbers of ``sizes``; ``C|1`` counts as C, and ``...`` becomes ``leading``."""
    shape: list[int] = []
    for dim in parse(spec)[0]:
        if dim == "...":
            shape.extend(leading)
        else:
            letter = dim.split("|")[0]
            if not (letter.isdigit() or letter in sizes):
                raise ValueError(f"case must say {letter} for the shape {spec!r}, got {sizes}")
            shape.append(int(letter) if letter.isdigit() else sizes[letter])
    return tuple(shape)


def example(spec: str, sizes: dict[str, int], dtype: torch.dtype, device: str | torch.device) -> Tensor | list[Tensor]:
    """A tensor in the memory of one element, or a list of one tensor. ``sizes`` by letter; every other size is 64."""
    dims, own = parse(spec)
    if dims == EACH:
        return [torch.zeros(64, dtype=own or dtype, device=device)]
    letters = {dim.split("|")[0]: 64 for dim in dims if dim != "..."} | sizes
    shape = concrete(" ".join(dims), letters, (64, 64))
    return torch.zeros((), dtype=own or dtype, device=device).expand(shape)


def check(op: str, shapes: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError or TypeError where an argument does not fit; returns the sizes that the letters stand for."""
    sizes: dict[str, Any] = {}
    first = first_floating = None
    specs = {name: parse(resolve(spec, args)) for name, spec in shapes.items()}
    # Tests compute the exact result in float64. Arguments declared as float32, such as statistics, are float64 then.
    # The first tensor without a declared dtype tells.
    data = (args.get(name) for name, (_, dtype) in specs.items() if dtype is None)
    first_data = next((value for value in data if value is not None), None)
    float64 = _is_float64(next(iter(first_data), None) if isinstance(first_data, (list, tuple)) else first_data)
    for name, (dims, dtype) in specs.items():
        value = args.get(name)
        if value is None:
            continue
        dtype = torch.float64 if dtype == torch.float32 and float64 else dtype
        for label, tensor in _members(op, name, value, dims, sizes):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{op}: {label} must be a tensor, got {type(tensor).__name__}")
            first = first or (label, tensor)
            if tensor.device != first[1].device:
                raise ValueError(f"{op}: {label} must be on {first[1].device} as {first[0]} is, got {tensor.device}")
            if dtype is None:
                if not tensor.is_floating_point():
                    raise TypeError(f"{op}: {label} must be a floating-point tensor, got {dtype_name(tensor.dtype)}")
                first_floating = first_floating or (label, tensor)
                if tensor.dtype != first_floating[1].dtype:
                    expected = f"{dtype_name(first_floating[1].dtype)} as {first_floating[0]} is"
                    raise TypeError(f"{op}: {label} must have dtype {expected}, got {dtype_name(tensor.dtype)}")
            elif tensor.dtype != dtype:
                raise TypeError(f"{op}: {label} must have dtype {dtype_name(dtype)}, got {dtype_name(tensor.dtype)}")
            if dims == EACH:
                expected, index = sizes["each"], int(label[len(name) + 1 : -1])
                if index == len(expected):
                    expected.append(tensor.shape)
                elif tensor.shape != expected[index]:
                    raise ValueError(
                        f"{op}: {label} must have shape {_tuple(expected[index])}, got {_tuple(tensor.shape)}"
                    )
            elif not _fits(dims, tuple(tensor.shape), sizes):
                raise ValueError(f"{op}: {label} must have shape {_describe(dims, sizes)}, got {_tuple(tensor.shape)}")
    return sizes


def compile_check(
    op: str, signature: inspect.Signature, shapes: dict[str, Any], rules: list[_values.Rule]
) -> Callable[..., None]:
    """Returns a function of the op's arguments that checks shapes, dtypes, devices and values of a call.

    Generated code only finds out whether the call fits. Where it does not, ``check`` and ``values.check`` raise the
    error.
    """
    compiled: dict[tuple, Callable[..., bool]] = {}
    conditions = _values.conditions(rules, tuple(shapes))
    by_name, specs_of, key_of = _arguments_by_name(signature), tuple(shapes.values()), None
    conditional = [found[1] for spec in specs_of if not callable(spec) and (found := alternatives(spec))]
    if any(map(callable, specs_of)):
        key_of = lambda *args, **kwargs: _resolved(specs_of, by_name(*args, **kwargs))  # noqa: E731
    elif conditional:  # the specs depend on flags alone
        key_of = _from_arguments(signature, f"({''.join(f'bool({n}), ' for n in conditional)})")
    constant = None if key_of else _compile(signature, dict(shapes), conditions)

    def check_call(*args, **kwargs) -> None:
        fits = constant
        if fits is None:
            key = key_of(*args, **kwargs)
            fits = compiled.get(key)
            if fits is None:
                specs = _resolved(specs_of, by_name(*args, **kwargs))
                fits = compiled[key] = _compile(signature, dict(zip(shapes, specs)), conditions)
        if not fits(*args, **kwargs):
            values = by_name(*args, **kwargs)
            _values.check(op, rules, values, check(op, shapes, values))

    return check_call


def _resolved(specs: Sequence, values: dict[str, Any]) -> tuple[str, ...]:
    return tuple([resolve(spec, values) for spec in specs])


def _arguments_by_name(signature: inspect.Signature) -> Callable[..., dict[str, Any]]:
    """A function that does what ``signature.bind`` and ``apply_defaults`` do, in a tenth of their time."""
    return _from_arguments(signature, f"dict({', '.join(f'{n}={n}' for n in signature.parameters)})")


def _from_arguments(signature: inspect.Signature, expression: str) -> Callable[..., Any]:
    """A function with this signature that returns an expression of its arguments."""
    scope = {f"_{n}": p.default for n, p in signature.parameters.items()}
    return eval(f"lambda {_parameters(signature)}: {expression}", scope)


def _parameters(signature: inspect.Signature) -> str:
    """The parameters as text. The default of ``name`` is a variable ``_name``."""
    return ", ".join(n if p.default is p.empty else f"{n}=_{n}" for n, p in signature.parameters.items())


def _compile(signature: inspect.Signature, specs: dict[str, str], conditions: list[str]) -> Callable[..., bool]:
    """A function of the op's arguments that answers True only where ``check`` would raise nothing.

    It may answer False where ``check`` raises nothing: in rare cases (float64, a broadcast size that is seen first) and
    for arguments that are not tensors.
    """
    lines, first, floating, leading, listed = [], False, False, False, False
    for name, spec in specs.items():
        dims, dtype = parse(spec)
        if dims == EACH:
            lines += _compile_list(name, dtype, first, floating, listed)
            first, floating, listed = True, floating or dtype is None, True
            continue
        named = [dim for dim in dims if dim != "..."]
        body = [f"_shape = {name}.shape", f"if len(_shape) {'!=' if named == dims else '<'} {len(named)}: return False"]
        if named != dims:
            rest = f"_shape[:{-len(named)}]" if named else "_shape"
            body.append(f"if {rest} != _leading: return False" if leading else f"_leading = {rest}")
            leading = True
        for index, dim in enumerate(named, -len(named)):
            letter, _, broadcast = dim.partition("|")
            size, known = f"_shape[{index}]", letter if letter.isdigit() else f"_{letter}"
            if not (broadcast or letter.isdigit()):
                body.append(f"if {known} is None: {known} = {size}")
            body.append(f"if {size} != {known}{f' and {size} != 1' if broadcast else ''}: return False")
        if dtype is not None:
            body.append(f"if {name}.dtype != {dtype}: return False")
        else:
            body.append(f"if {name}.dtype != _dtype: return False" if floating else f"_dtype = {name}.dtype")
            body += [] if floating else ["if _dtype not in FAST: return False"]
            floating = True
        body.append(f"if {name}.device != _device: return False" if first else f"_device = {name}.device")
        first = True
        optional = signature.parameters[name].default is None
        lines += [f"if {name} is not None:", *(f"    {line}" for line in body)] if optional else body
    letters = {dim.split("|")[0] for spec in specs.values() for dim in parse(spec)[0] if dim != "each"}
    head = [f"_{letter} = None" for letter in sorted(letters) if letter.isalpha()]
    lines += [f"if not ({condition}): return False" for condition in conditions]
    scope: dict[str, Any] = {f"_{n}": p.default for n, p in signature.parameters.items()}
    text = "\n".join(f"    {line}" for line in [*head, *lines, "return True"])
    scope |= dict(torch=torch, FAST=frozenset((torch.float32, torch.bfloat16, torch.float16)))
    scope |= dict(lies_in=_values.lies_in, drawable=_values.drawable)
    exec(f"def fits({_parameters(signature)}):\n{text}", scope)
    return scope["fits"]


def _compile_list(name: str, dtype: torch.dtype | None, first: bool, floating: bool, known: bool) -> list[str]:
    """The lines of ``_compile`` for a list of tensors. ``known`` says whether a list came before."""
    lines = [f"if not isinstance({name}, (list, tuple)) or not {name}: return False"]
    lines += [] if first else [f"_device = {name}[0].device"]
    if dtype is None and not floating:
        lines += [f"_dtype = {name}[0].dtype", "if _dtype not in FAST: return False"]
    wanted = "_dtype" if dtype is None else dtype
    lines += [f"if len({name}) != len(_first): return False"] if known else [f"_first = {name}"]
    differs = f"_t.shape != _o.shape or _t.dtype != {wanted} or _t.device != _device"
    return [*lines, f"for _t, _o in zip({name}, _first):", f"    if {differs}: return False"]


def _is_float64(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float64


def _fits(dims: list[str], shape: tuple, sizes: dict[str, Any]) -> bool:
    leading = dims[0] == "..." if dims else False
    named = dims[1:] if leading else dims
    if len(shape) < len(named) or (len(shape) > len(named) and not leading):
        return False
    split = len(shape) - len(named)
    found: dict[str, Any] = {"...": shape[:split]} if leading else {}
    if leading and sizes.get("...", found["..."]) != found["..."]:
        return False
    for dim, size in zip(named, shape[split:]):
        letter, _, broadcast = dim.partition("|")
        expected = int(letter) if letter.isdigit() else sizes.get(letter, found.get(letter, size))
        if size != expected and not (broadcast and size == 1):
            return False
        if not letter.isdigit() and not (broadcast and size == 1):
            found[letter] = size
    sizes.update(found)
    return True


def _describe(dims: list[str], sizes: dict[str, Any]) -> str:
    values: list[Any] = []
    for dim in dims:
        letter, _, broadcast = dim.partition("|")
        known = sizes.get(letter, letter)
        if letter == "...":
            values.extend(known if isinstance(known, tuple) else (known,))
        else:
            values.append(f"{known} or 1" if broadcast else known)
    named, numbers = _tuple(dims), _tuple(values)
    return named if named == numbers else f"{named} = {numbers}"


def _tuple(items) -> str:
    items = [str(int(i)) if isinstance(i, int) else str(i) for i in items]
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
