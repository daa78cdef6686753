"""What ``@op`` registers with torch's dispatcher: an op's schema, derivative, autocast rule and version counters.

Each op has ``torch.library`` objects of its own, so that declaring a name again replaces that op and no other.
"""

import functools
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.library import Library

from . import backends
from . import shapes as _shapes

if TYPE_CHECKING:
    from .op import Op

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Libraries:
    """Of one op: its schema and kernels, the same as ``gpt2fast_fallback::name``, and its derivative."""

    schema: str
    op: Library
    fallback: Library
    derivative: Library
    declared: "Op | None" = None


_libraries: dict[str, Libraries] = {}  # by qualified name


def define(namespace: str, name: str, schema: str) -> Libraries:
    """Defines an op in the dispatcher, in the place of one that ``@op`` declared before under the same name.

    ``declared`` of what is returned is the ``Op`` of that earlier declaration, or None. Kernels at the dispatcher's
    keys that others registered, ours in C++ too, go on applying. ValueError where there are some, for the CPU, and the
    schema is not the one they were made for: nothing is changed then.
    """
    qualified = f"{namespace}::{name}"
    before = _libraries.get(qualified)
    if before is not None:
        declared = before.declared
        if declared is not None and schema != before.schema and backends.is_native(declared):
            raise ValueError(
                f"{qualified}: a kernel at the dispatcher's CPU key was made for the schema {before.schema}, so that "
                f"the op must have it when it is declared again, got {schema}; give the new op another name"
            )
        for library in (before.derivative, before.fallback, before.op):
            library._destroy()
        _forget(qualified)
    found = Libraries(schema, *(Library(n, "FRAGMENT") for n in (namespace, f"{namespace}_fallback", namespace)))
    for library in (found.op, found.fallback):
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    if before is not None:
        found.declared = before.declared
    _libraries[qualified] = found
    return found


def _forget(qualified: str) -> None:
    """What torch.compile made for the old op: its cache on disk knows ops by their names."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    import torch.compiler.config as config

    config.cache_key_tag = f"{config.cache_key_tag} {qualified} {uuid.uuid4().hex}".strip()


def refuse_backward(declared: "Op") -> None:
    """Without this, autograd would see constants and training would silently lose gradients."""

    def derivative(ctx, *grads):
        raise RuntimeError(declared.lack)

    register_autograd(declared, derivative)


def register_autograd(declared: "Op", derivative: Callable, setup: Callable | None = None) -> None:
    """Registers the derivative of an op, in the place of one registered before."""
    libraries = _libraries[declared.qualified]
    libraries.derivative._destroy()
    libraries.derivative = Library(declared.namespace, "FRAGMENT")
    torch.library.register_autograd(declared.qualified, derivative, setup_context=setup, lib=_Transformable(declared))


class _Transformable:
    """The library that register_autograd gets: it puts the reference before the autograd kernel, where that would fail.

    An autograd kernel knows neither forward-mode AD, whose tangents it drops without a word, nor torch.func's grad, jvp
    and vmap over them. The reference is PyTorch and knows all of them; a derivative of an op that has none raises.
    """

    def __init__(self, declared: "Op"):
        self.declared = declared

    def impl(self, name: str, autograd_kernel: Callable, key: str, **options) -> None:
        declared = self.declared

        def kernel(keyset, *args, **kwargs):
            transformed = torch._C._functorch.peek_interpreter_stack() is not None
            if not (transformed or any(map(_has_tangent, args))):
                if not backends.records(args):
                    return autograd_kernel(keyset, *args, **kwargs)
                with backends.recording():
                    return autograd_kernel(keyset, *args, **kwargs)
            out = declared.reference(*args, **kwargs)
            if not declared.has_derivative and any(map(_is_differentiated, out if isinstance(out, tuple) else (out,))):
                raise RuntimeError(declared.lack)
            return out

        _libraries[declared.qualified].derivative.impl(name, kernel, key, **options)


def _has_tangent(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_tangent, value))
    return isinstance(value, Tensor) and unpack_dual(value).tangent is not None


def _is_differentiated(value: Tensor) -> bool:
    return value.requires_grad or _has_tangent(value)


def bump_versions(declared: "Op", library: Library) -> None:
    """So that autograd notices when a tensor saved for backward is changed by an in-place op."""
    below = torch._C._after_ADInplaceOrView_keyset
    positions = [list(declared.signature.parameters).index(n) for n in declared.mutates]

    def kernel(keyset, *args, **kwargs):
        declared.overload.redispatch(keyset & below, *args, **kwargs)
        for position in positions:
            changed = args[position]
            torch.autograd.graph.increment_version(changed if isinstance(changed, Tensor) else list(changed))

    library.impl(declared.name, kernel, "ADInplaceOrView", with_keyset=True)


def register_autocast(declared: "Op", library: Library) -> None:
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
    return isinstance(a, Tensor) and a.device.type == device and a.dtype in FLOATING
