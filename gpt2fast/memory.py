"""Memory for weights: one block for all tensors. It is on huge pages, if the system has them, for fewer TLB misses."""

import ctypes
import math

import torch
from torch import Tensor

from .extension import _C

ALIGNMENT = 64
HUGE_PAGE = 2 << 20


def empty(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Uninitialised CPU tensors by name, next to each other in memory and aligned to 64 bytes.

    Each has its own storage. PyTorch allocates them one by one where all together are smaller than a huge page, or
    without the C++ extension.
    """
    offsets, total = {}, 0
    for name, shape in shapes.items():
        offsets[name] = total // dtype.itemsize
        total += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    if total < HUGE_PAGE or _C is None:
        return {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    block = _C.huge_empty(total).view(dtype)
    # DLPack gives each tensor a storage of its own, which keeps the block alive.
    return {
        name: torch.from_dlpack(block.narrow(0, offsets[name], math.prod(shape)).view(shape))
        if math.prod(shape)
        else torch.empty(shape, dtype=dtype)
        for name, shape in shapes.items()
    }


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable. It must not be used after the tensor is gone."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")
