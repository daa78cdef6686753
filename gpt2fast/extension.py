"""``_C`` is the extension with the C++ kernels and bindings, or None. Then ``error`` says why."""

import sys
import warnings
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent


def built_with() -> str | None:
    """The version of torch that the C++ kernels were built with, or None where they were not built."""
    path = _FOLDER / "_C.built_with"
    return path.read_text(encoding="utf-8") if path.is_file() else None


error: str | None = None
try:
    from . import _C
except ImportError as _error:  # backends.status() shows it, and use_backend("cpu") raises it
    _C = None
    error = str(_error)
    if any(_FOLDER.glob("_C.*.so")):  # without a built file, there is no reason to warn
        warnings.warn(
            f"gpt2fast: the C++ kernels do not load, PyTorch's own functions run instead ({error}). They were built "
            f"with torch {built_with()}, this is torch {torch.__version__} on Python {sys.version.split()[0]}. Build "
            "them again, in a checkout of the sources: pip install --no-build-isolation .",
            RuntimeWarning,
            stacklevel=2,
        )
