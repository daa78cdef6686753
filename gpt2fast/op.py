"""An op is declared once: the decorated function's signature is the schema, its body the reference of every test.

``@op`` registers the reference under every device (and a second time as ``gpt2fast_reference::name``, where kernels
send what they do not cover), ``@name.backward`` the derivative above every backend, and the autocast rule above that.
"""

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.compiler import is_dynamo_compiling

from . import shapes as _shapes

NAMESPACE = "gpt2fast"
REFERENCE = "gpt2fast_reference"
OPS: dict[str, "Op"] = {}

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_reference_library = torch.library.Library(REFERENCE, "FRAGMENT")
_FLOATING = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(eq=False)
class Op:
    """A declared op. Calling it returns what users want; ``op.overload`` also returns what the backward pass needs."""

    name: str
    namespace: str
    reference: Callable
    signature: inspect.Signature
    schema: str
    shapes: dict[str, Any]
    cases: list[dict]
    returns: tuple[str, ...]
    saves: tuple[str, ...]
    make: dict[str, Callable]
    flops: Callable | None
    autocast: str
    mutates: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    slack: float
    baseline: Callable | None
    naive: Callable | None
    has_derivative: bool = False
    gradient_slack: float = 1.0

    def __post_init__(self):
        self.overload = getattr(getattr(torch.ops, self.namespace), self.name).default
        self._entry = self.overload._op  # what the overload calls, without its frame
        self.tensors = tuple(n for n, p in self.signature.parameters.items() if _holds_tensor(p.annotation))
        self.optional = tuple(n for n in self.tensors if self.signature.parameters[n].default is None)
        self.outputs = self.returns + self.saves

    def __call__(self, *args, **kwargs):
        # torch.compile knows overloads; a plain call saves a tenth of a small op's time by going below it
        out = (self.overload if is_dynamo_compiling() else self._entry)(*args, **kwargs)
        if not self.saves:
            return out
        return out[0] if len(self.returns) == 1 else out[: len(self.returns)]

    def __repr__(self):
        return f"<op {self.namespace}::{self.name}{self.schema}>"

    @property
    def summary(self) -> str:
        return (self.reference.__doc__ or "").strip().split("\n")[0]

    def check(self, args: dict[str, Any]) -> dict[str, Any]:
        """Raises ValueError or TypeError, naming op, argument, expected and got; returns the sizes by letter."""
        return _shapes.check(f"{self.namespace}::{self.name}", self.shapes, args)

    def bind(self, args: Sequence, kwargs: dict) -> dict[str, Any]:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def backward(self, saves: str = "", slack: float = 1.0):
        """Registers the derivative, once, above every backend.

        ``saves`` names the inputs and outputs to keep. The function gets them (and every non-tensor argument) as
        attributes of ``saved`` and the gradients of the outputs as attributes of ``grad`` (None where not needed),
        with ``saved.needs`` the set of inputs that want one, and returns a dict from input to gradient.
        ``slack`` is a factor on the parity rule of the gradients; give the reason beside it.
        """
        kept = saves.split()

        def register(function):
            def setup(ctx, inputs, output):
                values = dict(zip(self.signature.parameters, inputs))
                outputs = output if isinstance(output, tuple) else (output,)
                found = values | dict(zip(self.outputs, outputs))
                ctx.save_for_backward(*(found[name] for name in kept))
                ctx.rest = {n: v for n, v in values.items() if n not in self.tensors}
                ctx.mark_non_differentiable(
                    *(t for n, t in zip(self.outputs, outputs) if n in self.saves or not t.is_floating_point())
                )

            def derivative(ctx, *grads):
                needs = {n for n, wanted in zip(self.signature.parameters, ctx.needs_input_grad) if wanted}
                saved = SimpleNamespace(**ctx.rest, **dict(zip(kept, ctx.saved_tensors)), needs=needs)
                found = function(saved, SimpleNamespace(**dict(zip(self.outputs, grads))))
                return tuple(found.get(n) if n in needs else None for n in self.signature.parameters)

            _register_autograd(self, derivative, setup)
            self.has_derivative, self.gradient_slack = True, slack
            return self

        return register


def op(
    *,
    shapes: dict[str, Any],
    cases: list[dict],
    returns: str = "y",
    saves: str = "",
    make: dict[str, Callable] | None = None,
    flops: Callable | None = None,
    autocast: str = "widest",
    mutates: Sequence[str] = (),
    dtypes: Sequence[torch.dtype] = _FLOATING,
    slack: float = 1.0,
    derivative: bool = True,
    baseline: Callable | None = None,
    naive: Callable | None = None,
    namespace: str = NAMESPACE,
) -> Callable[[Callable], Op]:
    """Declares an op by its PyTorch reference.

    Args:
        shapes: per tensor argument its dimensions by letter, ``"B T C"``; ``...`` for any leading ones, ``C|1`` for a
            broadcast one, a digit for itself, ``: int64`` for a dtype other than that of the first floating tensor;
            or a function from the arguments to such a text.
        cases: sizes by letter, plus non-tensor arguments by name and ``name=True`` for optional tensors to include.
        returns, saves: names of the outputs that a call returns, and of those kept for the backward pass.
        make: per argument a function ``(shape, case, generator) -> tensor`` where random normals are wrong.
        flops: function from a case to floating-point operations.
        autocast: ``"lower"`` (to the autocast dtype), ``"float32"`` or ``"widest"`` (of the arguments).
        mutates: arguments that the op changes in place; such an op returns nothing and has no derivative.
        dtypes: of the floating arguments, tested and benchmarked.
        slack: factor on the parity rule; give the reason beside it.
        derivative: whether ``@name.backward`` will follow; if not, a backward pass through it raises.
        baseline, naive: PyTorch's best fused way and the plain composition, taking the op's arguments, for benchmarks.
    """
    if autocast not in ("lower", "float32", "widest"):
        raise ValueError(f"autocast must be 'lower', 'float32' or 'widest', got {autocast!r}")

    def declare(function: Callable) -> Op:
        name, signature = function.__name__, inspect.signature(function)
        schema = torch.library.infer_schema(function, mutates_args=tuple(mutates))
        outputs = () if mutates else (*returns.split(), *saves.split())
        _check_declaration(f"{namespace}::{name}", signature, schema, outputs, shapes, mutates)
        library, references = _libraries.setdefault(
            namespace,
            (torch.library.Library(namespace, "FRAGMENT"), torch.library.Library(f"{namespace}_reference", "FRAGMENT")),
        )
        for lib in (library, references):
            lib.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        qualified = f"{namespace}::{name}"

        @functools.wraps(function)
        def checked(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            _shapes.check(qualified, shapes, bound.arguments)
            return function(*bound.args, **bound.kwargs)

        for lib in (library, references):
            lib.impl(name, checked, "CompositeExplicitAutograd")
        declared = Op(
            name, namespace, checked, signature, schema, shapes, list(cases), tuple(returns.split()),
            tuple(saves.split()), make or {}, flops, autocast, tuple(mutates), tuple(dtypes), slack, baseline, naive,
        )  # fmt: skip
        if mutates:
            _bump_versions(declared, library)
        elif not derivative:
            _refuse_backward(declared)
        _register_autocast(declared, library)
        functools.update_wrapper(declared, function)
        OPS[name if namespace == NAMESPACE else qualified] = declared
        return declared

    return declare


_libraries = {NAMESPACE: (_library, _reference_library)}


def _holds_tensor(annotation: Any) -> bool:
    return bool(re.search(r"\bTensor\b", str(annotation)))


def _check_declaration(op: str, signature, schema: str, outputs: Sequence[str], shapes, mutates) -> None:
    """Raises ValueError where the words of ``@op`` do not fit the function below it."""
    parameters = signature.parameters
    for option, names in (("shapes", shapes), ("mutates", mutates)):
        if unknown := [name for name in names if name not in parameters]:
            raise ValueError(f"{op}: {option}= must name arguments, {', '.join(parameters)}, got {unknown[0]!r}")
    if missing := [n for n, p in parameters.items() if _holds_tensor(p.annotation) and n not in shapes]:
        raise ValueError(f"{op}: shapes= must say the shape of every tensor, got none for {missing[0]!r}")
    count = len(torch._C.parse_schema(op + schema).returns)
    if count != len(outputs):
        named = ", ".join(outputs) or "none"
        raise ValueError(f"{op}: returns= and saves= must name its {count} outputs, got {len(outputs)} ({named})")


def _refuse_backward(declared: Op) -> None:
    """Without this, autograd would see constants and training would silently lose gradients."""

    def derivative(ctx, *grads):
        raise RuntimeError(f"{declared.namespace}::{declared.name} has no derivative")

    _register_autograd(declared, derivative)


def _register_autograd(declared: Op, derivative: Callable, setup: Callable | None = None) -> None:
    name = f"{declared.namespace}::{declared.name}"
    torch.library.register_autograd(name, derivative, setup_context=setup, lib=_Transformable(declared))


class _Transformable:
    """The library that register_autograd gets: it puts the reference before the autograd kernel, where that would fail.

    An autograd kernel knows neither forward-mode AD, whose tangents it drops without a word, nor torch.func's grad, jvp
    and vmap over them. The reference is PyTorch and knows all of them; a derivative of an op that has none raises.
    """

    def __init__(self, declared: Op):
        self.declared = declared

    def impl(self, name: str, autograd_kernel: Callable, key: str, **options) -> None:
        declared = self.declared

        def kernel(keyset, *args, **kwargs):
            transformed = torch._C._functorch.peek_interpreter_stack() is not None
            if not (transformed or any(map(_has_tangent, args))):
                return autograd_kernel(keyset, *args, **kwargs)
            out = declared.reference(*args, **kwargs)
            if not declared.has_derivative and any(map(_is_differentiated, out if isinstance(out, tuple) else (out,))):
                raise RuntimeError(f"{declared.namespace}::{name} has no derivative")
            return out

        _libraries[declared.namespace][0].impl(name, kernel, key, **options)


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and unpack_dual(value).tangent is not None


def _is_differentiated(value: Tensor) -> bool:
    return value.requires_grad or _has_tangent(value)


def _bump_versions(declared: Op, library) -> None:
    """So that autograd notices when a tensor saved for backward is changed by an in-place op."""
    below = torch._C._after_ADInplaceOrView_keyset
    positions = [list(declared.signature.parameters).index(n) for n in declared.mutates]

    def kernel(keyset, *args, **kwargs):
        declared.overload.redispatch(keyset & below, *args, **kwargs)
        for position in positions:
            changed = args[position]
            torch.autograd.graph.increment_version(changed if isinstance(changed, Tensor) else list(changed))

    library.impl(declared.name, kernel, "ADInplaceOrView", with_keyset=True)


def _register_autocast(declared: Op, library) -> None:
    for key, device in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
        exclude = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*args, _exclude=exclude, _device=device, **kwargs):
            values = dict(zip(declared.signature.parameters, args)) | kwargs
            castable = {n: v for n, v in values.items() if _is_castable(v, _device) and not has_own_dtype(n, values)}
            if declared.autocast == "lower":
                target = torch.get_autocast_dtype(_device)
            elif declared.autocast == "float32":
                target = torch.float32
            elif castable:
                target = functools.reduce(torch.promote_types, (t.dtype for t in castable.values()))
            with torch._C._ExcludeDispatchKeyGuard(_exclude):
                return declared.overload(**values | {n: t.to(target) for n, t in castable.items()})

        library.impl(declared.name, kernel, key)

    def has_own_dtype(name: str, values: dict[str, Any]) -> bool:  # statistics stay float32
        spec = declared.shapes.get(name)
        return spec is not None and _shapes.parse(_shapes.resolve(spec, values))[1] is not None


def _is_castable(a: Any, device: str) -> bool:
    return isinstance(a, Tensor) and a.device.type == device and a.dtype in _FLOATING
