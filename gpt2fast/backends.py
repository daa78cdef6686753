"""Which implementation of an op runs. ``choose`` is the one place that decides; everything else asks it.

There are three kinds of implementation:

- *Kernels* are ours and belong to a backend: ``cpu`` (C++, at the dispatcher's CPU key), ``triton`` (``kernels/``) and
  ``cuda`` (CUDA C++, ``cuda/``).
- *Fused* is PyTorch's own fastest way that keeps the parity rule (``fused=`` of ``@op``; gpt2fast/testing/parity.py has
  the rule). It runs the calls that no kernel covers.
- The *reference* is the body of the declaration and the oracle of the tests. It runs on request, for meta tensors, and
  where there is no fused way.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import declaration
from .extension import _C
from .extension import error as _extension_error
from .kernel_sources import BACKENDS, BUILT_IN, OURS, Backend, Kernel, Kernels, fitting_kernel, register, unregister
from .kernel_sources import is_installed as _is_installed

if TYPE_CHECKING:
    from .op import Op

__all__ = [
    "BACKENDS", "BUILT_IN", "OURS", "Backend", "Choice", "Kernel", "Kernels", "active", "choose", "register",
    "unregister", "use_backend",
]  # fmt: skip


class Choice(NamedTuple):
    """The implementation that runs a call: ``"fused"``, ``"reference"`` or the name of a backend.

    ``objections`` says, for each backend that was asked before, why it does not run the call.
    """

    backend: str
    run: Callable
    objections: Mapping[str, str] = MappingProxyType({})

    @property
    def why(self) -> str | None:
        """Why no backend's kernel runs, or None where one does."""
        return "; ".join(dict.fromkeys(self.objections.values())) or None if self.backend in BUILT_IN else None


class _NativeKernels(Mapping):
    """The kernels at the dispatcher's CPU key: ours in C++, and those that other extensions registered there."""

    def __init__(self):
        self._found: dict[str, Kernel] = {}

    def __getitem__(self, name: str) -> Kernel:
        declared = _declared()[name]
        if not is_native(declared):
            raise KeyError(name)
        if name not in self._found:
            supports = functools.partial(_native_objection, declared)
            self._found[name] = Kernel(lambda *args, **kwargs: declared.overload(*args, **kwargs), supports)
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name, declared in _declared().items() if is_native(declared))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def declare(declared: "Op") -> None:
    """Gives the op's shapes and values to the C++ bindings, which check calls by them: csrc/torch/declaration.h."""
    if _C is not None and not any(callable(spec) or spec.startswith("each") for spec in declared.shapes.values()):
        _C.declare(declared.qualified, *declaration.rows(declared))


def _native_objection(declared: "Op", *args, **kwargs) -> str | None:
    """Why the C++ binding would not run a call, or None. A kernel without our binding covers all its op declares."""
    floating = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point())
    first = next(floating, None)
    return None if _C is None or first is None else _C.cpu_objection(declared.qualified, first)


def _cpu_reason() -> str | None:
    if _C is not None:
        return None
    return f"gpt2fast._C is not built or does not load ({_extension_error}); pip install -e . --no-build-isolation"


def _triton_reason() -> str | None:
    if not _is_installed("triton"):
        return "triton is not installed; pip install triton"
    if not _is_installed("gpt2fast.kernels"):
        return "gpt2fast is not installed, only imported from its sources; pip install -e . --no-build-isolation"
    if not _stands_for_cuda and not torch.cuda.is_available():
        return "there is no CUDA device, and no gpt2fast.testing.ptx.machine() runs"
    return None


def _cuda_reason() -> str | None:
    if BACKENDS["cuda"].kernels.others and (_stands_for_cuda or torch.cuda.is_available()):
        return None  # kernels of another package may be built where ours are not; their supports() tells
    return importlib.import_module("gpt2fast.cuda.library").reason()


for _backend in (
    Backend("cpu", ("cpu",), _cpu_reason, _NativeKernels(), "C++ kernels"),
    Backend("triton", ("cuda",), _triton_reason, Kernels("gpt2fast.kernels"), "Triton kernels"),
    Backend("cuda", ("cuda",), _cuda_reason, Kernels("gpt2fast.cuda"), "kernels in CUDA C++"),
):
    BACKENDS[_backend.name] = _backend

_active = "auto"
# The overlay hides native kernels from the dispatcher while another backend is in force: one library per namespace.
# ``_hidden`` says for each op whether there is a native kernel below the overlay.
_overlay: dict[str, torch.library.Library] | None = None
_hidden: dict[str, bool] = {}
_stands_for_cuda = False


def choose(declared: "Op", *args: Any, device: str | None = None, **kwargs: Any) -> Choice:
    """Chooses the implementation of ``declared`` for these arguments.

    ``device`` replaces the device of the tensors, which may then be meta tensors. Under ``use_backend``, raises
    RuntimeError where the named backend does not cover the call.
    """
    if _active == "reference":
        return Choice("reference", declared.reference, {"reference": "backend 'reference' is in force"})
    if _active == "fused":
        return _without_kernel(declared, {"fused": "backend 'fused' is in force"}, args, kwargs)
    device = device or _device(args, kwargs)
    if _stands_for_cuda and device == "cpu":
        device = "cuda"
    objections: dict[str, str] = {}
    for backend in BACKENDS.values() if _active == "auto" else (BACKENDS[_active],):
        if device not in backend.devices:
            objection = f"backend {backend.name!r} runs on {' and '.join(backend.devices)} tensors, got {device}"
            if _active == "auto":
                continue
        elif reason := backend.reason():
            objection = reason
        elif declared.key not in backend.kernels:
            if objections:  # a backend that has a kernel has given a better reason
                continue
            objection = f"the {backend.name} backend has no kernel for it"
            if declared.fused_calls and _active != "auto":
                return Choice("fused", declared.fused, {backend.name: objection})
        else:
            kernel = fitting_kernel(backend.name, backend.kernels, declared)
            try:
                objection = kernel.supports(*args, **kwargs)
                if objection is None and kernel.slower is not None and _active == "auto":
                    objection = kernel.slower(*args, **kwargs)
            except Exception as error:
                text = f"{declared.qualified}: supports() of backend {backend.name!r} raised {error!r}"
                raise RuntimeError(text) from error
            if objection is None:
                return Choice(backend.name, kernel.run, objections)
        objections[backend.name] = objection
    if _active != "auto":
        raise RuntimeError(f"{declared.qualified}: backend {_active!r} does not cover this call: {objections[_active]}")
    objections = objections or {device: f"no backend of ours runs on {device} tensors"}
    return _without_kernel(declared, objections, args, kwargs)


def _without_kernel(declared: "Op", objections: dict[str, str], args: Sequence, kwargs: dict) -> Choice:
    if declared.fused is None:
        return Choice("reference", declared.reference, objections)
    if declared.fused_unless is not None and (why := declared.fused_unless(*args, **kwargs)):
        return Choice("reference", declared.reference, objections | {"PyTorch": why})
    return Choice("fused", declared.fused, objections)


def records(args: Sequence) -> bool:
    """Whether autograd records the call on a CPU with AMX. PyTorch's products use AMX; our kernels do not."""
    return (
        _has_amx()
        and _active == "auto"
        and torch.is_grad_enabled()
        and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    )


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Tells the C++ kernels that ``records`` holds for the calls inside: PyTorch then runs bfloat16 ``linear``."""
    _C.set_recording_with_amx(True)
    try:
        yield
    finally:
        _C.set_recording_with_amx(False)


@functools.cache
def _has_amx() -> bool:
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return _C is not None and supported is not None and supported()


def run(declared: "Op", args: Sequence, kwargs: dict) -> Any:
    """Checks and runs a call where there is no native kernel, or the native kernel does not cover the call."""
    declared.check_call(*args, **kwargs)
    return run_chosen(choose(declared, *args, **kwargs).run, args, kwargs)


def run_chosen(function: Callable, args: Sequence, kwargs: dict | None = None) -> Any:
    """Runs a call that has been checked, on its own device. ``function`` is what ``choose`` has found to run."""
    kwargs = kwargs or {}
    for value in args:
        if isinstance(value, Tensor):
            if value.is_cuda and value.device.index != torch.cuda.current_device():
                with torch.cuda.device(value.device):  # kernels are launched on the current device
                    return function(*args, **kwargs)
            break
    return function(*args, **kwargs)


def _device(args: Sequence, kwargs: dict) -> str:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value.device.type
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            return _device(value[:1], {})
    raise ValueError("gpt2fast: an op must be given a tensor, got none")


class use_backend:  # noqa: N801
    """Runs every op of this process on one backend from now on, or inside a ``with`` block.

    ``"auto"`` runs our kernels where they cover a call, and PyTorch's fused ways elsewhere. ``"fused"`` and
    ``"reference"`` run no kernel of ours. With the name of a backend, a call that the backend does not cover raises
    RuntimeError, forward and backward.

    Raises ValueError for an unknown name, and RuntimeError with the reason where the backend cannot be used here. The
    earlier backend then stays in force. All threads share the setting, so that ``with`` blocks in several threads at a
    time may leave the wrong backend in force.
    """

    def __init__(self, name: str):
        names = ("auto", *BACKENDS, *BUILT_IN)
        if name not in names:
            raise ValueError(f"gpt2fast: backend must be one of {', '.join(names)}, got {name!r}")
        if name in BACKENDS and (reason := BACKENDS[name].reason()):
            raise RuntimeError(f"gpt2fast: backend {name!r} cannot be used: {reason}")
        self.previous = _active
        _set(name, _stands_for_cuda)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        _set(self.previous, _stands_for_cuda)


def cpu_stands_for_cuda(yes: bool) -> None:
    """Sets whether CPU tensors count as CUDA tensors. They do while ``ptx.machine()`` runs GPU kernels on the CPU."""
    _set(_active, yes)


def cpu_counts_as_cuda() -> bool:
    return _stands_for_cuda


def hides_native_kernels() -> bool:
    """Whether ``choose`` decides on every call with CPU tensors, because native kernels must not run now."""
    return _overlay is not None


def _set(name: str, stands_for_cuda: bool) -> None:
    """Puts a backend in force.

    The dispatcher calls native kernels directly, without ``choose``. Where they must not run, an overlay at their
    dispatch key calls ``choose`` instead.
    """
    global _active, _stands_for_cuda, _overlay
    wanted = stands_for_cuda or name not in ("auto", "cpu")
    if wanted and _overlay is None:
        _overlay = {}
        for declared in _declared().values():
            hide_native_kernel(declared)
    if not wanted and _overlay is not None:
        for library in _overlay.values():
            library._destroy()
        _overlay = None
        _hidden.clear()
    _active, _stands_for_cuda = name, stands_for_cuda


def hide_native_kernel(declared: "Op") -> None:
    """Makes the overlay, where there is one now, hide the native kernel of an op, so that ``choose`` decides."""
    if _overlay is None:
        return
    _hidden[declared.qualified] = is_native(declared)
    library = _overlay.get(declared.namespace) or torch.library.Library(declared.namespace, "IMPL")
    _overlay[declared.namespace] = library
    with warnings.catch_warnings():  # the overlay is meant to stand above the kernel
        warnings.filterwarnings("ignore", r"(?s).*Overriding a previously registered kernel")
        library.impl(declared.name, declared.choose_and_run, "CPU", allow_override=True)


def native_kernels_changed() -> None:
    """Makes the overlay again, where there is one now, after a library with native kernels was loaded."""
    name, stands_for_cuda = _active, _stands_for_cuda
    _set("auto", False)
    _set(name, stands_for_cuda)


def _declared() -> "dict[str, Op]":
    from .op import OPS  # imported here, because op.py imports this module

    return OPS


def is_native(declared: "Op") -> bool:
    """Whether the dispatcher has a CPU kernel for ``declared``, in C++ or an extension's own."""
    if declared.qualified in _hidden:
        return _hidden[declared.qualified]
    return torch._C._dispatch_has_kernel_for_dispatch_key(declared.qualified, "CPU")


def active() -> str:
    """The name of the backend in force, ``"auto"`` by default."""
    return _active


def status() -> dict[str, str | None]:
    """For each backend the reason why it cannot be used here, or None where it can."""
    return {name: backend.reason() for name, backend in BACKENDS.items()} | dict.fromkeys(BUILT_IN)


def isa() -> str | None:
    """The CPU instruction set in use, or None without the extension."""
    return None if _C is None else _C.cpu_isa()


def describe(choice: Choice) -> str:
    """A choice in words for reports: ``"cpu, avx512"``, ``"fused"``."""
    return f"cpu, {isa()}" if choice.backend == "cpu" and isa() else choice.backend


def start() -> None:
    """Applies ``GPT2FAST_CPU_ISA`` and ``GPT2FAST_BACKEND``; called once, after the ops are declared."""
    if _C is not None and os.environ.get("GPT2FAST_CPU_ISA"):
        _C.cpu_isa()  # a wrong name fails here, not in the first op
    if name := os.environ.get("GPT2FAST_BACKEND"):
        use_backend(name)
