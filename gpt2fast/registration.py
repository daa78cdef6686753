"""What ``@op`` registers with torch's dispatcher: an op's schema, derivative, autocast rule and version counters.

Each op has its own ``torch.library`` objects. A second declaration of a name therefore replaces that op and no other.
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
    """The libraries of one op: ``op`` has its schema and kernels, ``fallback`` the same as ``gpt2fast_fallback::name``,
    and ``derivative`` the autograd kernel."""

    schema: str
    op: Library
    fallback: Library
    derivative: Library
    declared: "Op | None" = None


_libraries: dict[str, Libraries] = {}  # the key is the qualified name


def define(namespace: str, name: str, schema: str) -> Libraries:
    """Defines an op in the dispatcher. It replaces an op that ``@op`` declared before under the same name.

    ``declared`` of the result is the ``Op`` of that earlier declaration, or None. Kernels that others registered with
    the dispatcher, ours in C++ included, stay in use. Where there is such a kernel for the CPU and it was made for
    another schema, this raises ValueError and changes nothing.
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
    """Makes torch.compile forget what it compiled for the old op, on disk too, where it knows ops by name only."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    import torch.compiler.config as config

    config.cache_key_tag = f"{config.cache_key_tag} {qualified} {uuid.uuid4().hex}".strip()


def refuse_backward(declared: "Op") -> None:
    """Registers a derivative that raises. Without it, autograd would treat the outputs as constants, and gradients
    would be lost without an error."""

    def derivative(ctx, *grads):
        raise RuntimeError(declared.lack)

    register_autograd(declared, derivative)


def register_autograd(declared: "Op", derivative: Callable, setup: Callable | None = None) -> None:
    """Registers the derivative of an op. It replaces the one that was registered before."""
    libraries = _libraries[declared.qualified]
    libraries.derivative._destroy()
    libraries.derivative = Library(declared.namespace, "FRAGMENT")
    torch.library.register_autograd(declared.qualified, derivative, setup_context=setup, lib=_Transformable(declared))


class _Transformable:
    """Stands for the library that torch.library.register_autograd registers its autograd kernel with.

    That kernel fails in two cases: it drops the tangents of forward-mode AD without an error, and it does not support
    the transformations of torch.func (grad, jvp, vmap). In these cases, the kernel registered here runs the reference
    instead. The reference consists of PyTorch operations, which support both. An op without a derivative raises.
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
    """Increments the version of tensors that the op changes in place.

    Autograd then notices where such a tensor was saved for a backward pass.
    """
    below = torch._C._after_ADInplaceOrView_keyset
    positions = [list(declared.signature.parameters).index(n) for n in declared.mutates]

    def kernel(keyset, *args, **kwargs):
        declared.overload.redispatch(keyset & below, *args, **kwargs)
        for position in positions:
            changed = args[position]
            torch.autograd.graph.increment_version(changed if isinstance(changed, Tensor) else list(changed))

    library.impl(declared.name, kernel, "ADInplaceOrView", with_keyset=True)


def register_autocast(declared: "Op", library: Library) -> None:
    """Registers the op's rule under autocast, for CPU and CUDA: its floating arguments are cast to one dtype."""
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
