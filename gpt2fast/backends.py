"""Which implementation of an op runs: C++ kernels at the dispatcher's CPU key, references below, overlays above.

``use_backend("reference")`` or ``GPT2FAST_BACKEND=reference`` puts an overlay in place; as a context manager it is
taken away again. A backend is a function that registers its kernels on a torch.library.Library.
"""

import os
import warnings
from collections.abc import Callable

import torch

from .op import NAMESPACE, OPS

_extension_error: str | None = None
try:
    from . import _C
except ImportError as error:  # reported by status(); raised when the backend is asked for by name
    _C = None
    _extension_error = str(error)

_active: tuple[str, torch.library.Library | None] = ("auto", None)


def _reference(library: torch.library.Library) -> None:
    for declared in OPS.values():
        if declared.namespace == NAMESPACE and not declared.mutates:
            for key in ("CPU", "CUDA"):
                library.impl(declared.name, declared.reference, key, allow_override=True)


def _cpu(library: torch.library.Library) -> None:
    _C.set_strict(True)


def _cpu_reason() -> str | None:
    if _C is not None:
        return None
    return f"gpt2fast._C is not built or does not load ({_extension_error}); pip install -e . --no-build-isolation"


# name -> (what registers it, why it cannot be used or None, what it is)
BACKENDS: dict[str, tuple[Callable, Callable[[], str | None], str]] = {
    "reference": (_reference, lambda: None, "plain PyTorch, on any device"),
    "cpu": (_cpu, _cpu_reason, "C++ kernels; what they do not cover raises"),
}


class use_backend:  # noqa: N801
    """Runs every op on one backend from now on, or inside a ``with`` block.

    ``"auto"``: the kernels where they cover a call, the references elsewhere. Any other name of ``BACKENDS`` is strict.
    Raises ValueError for an unknown name, RuntimeError with the reason for one that cannot be used here.
    """

    def __init__(self, name: str):
        if name != "auto" and name not in BACKENDS:
            choices = ", ".join(["auto", *BACKENDS])
            raise ValueError(f"gpt2fast: backend must be one of {choices}, got {name!r}")
        if name != "auto" and (reason := BACKENDS[name][1]()):
            raise RuntimeError(f"gpt2fast: backend {name!r} cannot be used: {reason}")
        self.previous = _active[0]
        _set(name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        _set(self.previous)


def _set(name: str) -> None:
    global _active
    if _active[1] is not None:
        _active[1]._destroy()
    if _C is not None:
        _C.set_strict(False)
    library = None
    if name != "auto":
        library = torch.library.Library(NAMESPACE, "IMPL")
        with warnings.catch_warnings():  # an overlay is meant to stand above the kernels
            warnings.filterwarnings("ignore", r"(?s).*Overriding a previously registered kernel")
            BACKENDS[name][0](library)
    _active = (name, library)


def active() -> str:
    """The name given to the last ``use_backend`` in force, ``"auto"`` without one."""
    return _active[0]


def status() -> dict[str, str | None]:
    """Per backend the reason why it cannot be used here, None where it can."""
    return {name: reason() for name, (_, reason, _) in BACKENDS.items()}


def isa() -> str | None:
    """The CPU instruction set in use, None without the extension."""
    return None if _C is None else _C.cpu_isa()


def uncovered(op: str, dtype: torch.dtype, head_size: int = 64) -> str | None:
    """Why the active backend's kernel for ``op`` does not cover such a call (it runs the reference then), or None."""
    if _active[0] == "reference":
        return "backend 'reference' is in force"
    if reason := _cpu_reason():
        return reason
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", "CPU"):
        return "the CPU backend has no kernel for it"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "the kernels cover float32, bfloat16 and float16 only"
    if "attention" in op and not 1 <= head_size <= 256:
        return "the kernels cover head sizes 1 to 256 only"
    return None


def _start() -> None:
    if _C is not None and os.environ.get("GPT2FAST_CPU_ISA"):
        _C.cpu_isa()  # a wrong name fails here, not in the first op
    if name := os.environ.get("GPT2FAST_BACKEND"):
        use_backend(name)
