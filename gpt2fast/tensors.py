"""Tensors as kernels for GPUs take them."""

from torch import Tensor


def dense_rows(x: Tensor) -> tuple[Tensor, int]:
    """x and its row stride: as it is where rows lie at one stride and are dense, else a contiguous copy."""
    if x.is_contiguous():
        return x, x.shape[-1]
    sizes, strides = x.shape, x.stride()
    stride = expected = None
    if strides[-1] == 1 or sizes[-1] == 1:
        for size, step in zip(reversed(sizes[:-1]), reversed(strides[:-1])):
            if size == 1:
                continue
            if stride is None:
                stride = step
            elif step != expected:
                return x.contiguous(), sizes[-1]
            expected = step * size
        return x, sizes[-1] if stride is None else stride
    return x.contiguous(), sizes[-1]
