"""Converts tensors and numbers to the form that GPU kernels take."""

import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SEGMENT = 256  # embedding_backward sums up to this number of sorted rows at a time: kSegmentRows in csrc/cuda/kernels.h


def empty_as(x: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of x's shape and dtype. A call with a shape takes the host twice as long."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def dense_rows(x: Tensor) -> tuple[Tensor, int]:
    """x and its row stride. x is copied only where its rows are not dense or have no common stride."""
    if x.is_contiguous():
        return x, x.shape[-1]
    stride = row_stride(x.shape, x.stride())
    return (x.contiguous(), x.shape[-1]) if stride is None else (x, stride)


def row_stride(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """The common stride of the rows (..., K), or None where there is none or the rows are not dense."""
    columns, stride, expected = sizes[-1], None, None
    if 0 in sizes:
        return columns
    if strides[-1] != 1 and columns != 1:
        return None
    for size, step in zip(reversed(sizes[:-1]), reversed(strides[:-1])):
        if size == 1:
            continue
        if stride is None:
            stride = step
        elif step != expected:
            return None
        expected = step * size
    return columns if stride is None else stride


def dense_heads(*tensors: Tensor) -> list[Tensor]:
    """Returns the tensors (..., D). A tensor is copied if its last dimension is not dense."""
    return [x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors]


def dense_mask(mask: Tensor | None) -> tuple[Tensor | None, int]:
    """mask (B, S) with a dense last dimension, and the stride of its batch dimension."""
    if mask is None:
        return None, 0
    mask = mask if mask.stride(1) == 1 or mask.shape[1] == 1 else mask.contiguous()
    return mask, mask.stride(0)


def broadcast_strides(bias: Tensor | None) -> list[int]:
    """The strides of bias (B or 1, H or 1, T or 1, S or 1), 0 where it broadcasts."""
    return [0] * 4 if bias is None else [0 if n == 1 else step for n, step in zip(bias.shape, bias.stride())]


def float64_bits(x: float) -> int:
    """The bits of a float64 as an int64: a float argument would reach a kernel as float32."""
    return struct.unpack("q", struct.pack("d", x))[0]


def table_gradients(
    add_rows: Callable[..., None],
    dy: Tensor,
    tokens: Tensor,
    V: int,
    P: int,
    positions: Tensor | None,
    token_types: Tensor | None,
    start: int,
) -> tuple[Tensor, Tensor]:
    """Computes the outputs of embedding_backward by two calls of ``add_rows(row, source, dy, stride, out, parts)``.

    For every n, in this order, ``add_rows`` adds row ``source[n] % R`` of dy (R rows) to row ``row[n]`` of out, which
    is zeros before. ``row`` is sorted. ``parts`` is workspace: two rows in float32 for each segment of ``SEGMENT``
    sorted rows, or None where there is only one segment.
    """
    B, T, C = dy.shape
    dy, stride = dense_rows(dy)

    def gradient(rows: Tensor, count: int) -> Tensor:
        out = dy.new_zeros((count, C))
        if out.numel() and rows.numel():
            row, source = torch.sort(rows, stable=True)
            segments = -(-len(row) // SEGMENT)
            parts = dy.new_empty((2 * segments, C), dtype=torch.float32) if segments > 1 else None
            add_rows(row, source, dy, stride, out, parts)
        return out

    tokens = tokens.reshape(-1)
    if token_types is not None:
        tokens = torch.cat((tokens, token_types.reshape(-1)))
    if positions is None:
        positions = torch.arange(start, start + T, device=dy.device)
    return gradient(tokens, V), gradient(positions.expand(B, T).reshape(-1), P)
