"""The names of dtypes, without PyTorch's prefix; this file does not import PyTorch."""

from typing import Any


def dtype_name(dtype: Any) -> str:
    """``"float32"`` for ``torch.float32`` and for its names ``"torch.float32"`` and ``"float32"``."""
    return str(dtype).removeprefix("torch.")
