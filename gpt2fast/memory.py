"""Memory for weights: one mapping for all tensors, on huge pages where the system has them (fewer TLB misses)."""

import ctypes
import math
import mmap

import torch
from torch import Tensor

ALIGNMENT = 64
HUGE_PAGE = 2 << 20


def empty(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Uninitialised CPU tensors by name: each its own storage, 64-byte aligned, side by side in memory."""
    offsets, total = {}, 0
    for name, shape in shapes.items():
        offsets[name] = total
        total += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    if total < HUGE_PAGE or not hasattr(mmap, "MAP_PRIVATE"):
        return {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    mapping = mmap.mmap(-1, total + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without huge pages serves small ones
    start = -torch.frombuffer(mapping, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    return {
        name: torch.frombuffer(mapping, dtype=dtype, count=math.prod(shape), offset=start + offsets[name]).view(shape)
        if math.prod(shape)
        else torch.empty(shape, dtype=dtype)
        for name, shape in shapes.items()
    }


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable; it must not outlive the tensor."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")
