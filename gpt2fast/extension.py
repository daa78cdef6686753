"""``_C``, the C++ kernels and bindings, or None; ``error``, why it is None."""

import sys
import warnings
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent


def built_with() -> str | None:
    """The version of the torch that the C++ kernels were built with, None where they were not built."""
    path = _FOLDER / "_C.built_with"
    return path.read_text(encoding="utf-8") if path.is_file() else None


error: str | None = None
try:
    from . import _C
except ImportError as _error:  # in status(); raised when the backend is asked for by name
    _C = None
    error = str(_error)
    if any(_FOLDER.glob("_C.*.so")):  # a source tree without a build is so on purpose
        warnings.warn(
            f"gpt2fast: the C++ kernels do not load, PyTorch's own functions run instead ({error}). They were built "
            f"with torch {built_with()}, this is torch {torch.__version__} on Python {sys.version.split()[0]}. Build "
            "them again, in a checkout of the sources: pip install --no-build-isolation .",
            RuntimeWarning,
            stacklevel=2,
        )
