"""Memory for weights: one block for all tensors, on huge pages where the system has them (fewer TLB misses)."""

import ctypes
import math

import torch
from torch import Tensor

from .extension import _C

ALIGNMENT = 64
HUGE_PAGE = 2 << 20


def empty(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Uninitialised CPU tensors by name: each its own storage, 64-byte aligned, side by side in memory.

    Below the size of a huge page, or without the C++ extension, PyTorch allocates each.
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
    """The memory of a contiguous CPU tensor, writable; it must not outlive the tensor."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")
