"""decode_attention by csrc/cuda/decode_attention.cu, and the same over a cache in pages."""

import torch

from ..tensors import dense_heads, empty_as
from .attention import objection
from .library import DTYPES, call

SOURCE = "decode_attention.cu"
SPLIT = 64  # the number of keys of a block: kSplitKeys in csrc/cuda/kernels.h
MOST_TOKENS = 8  # the largest T: kMostNewTokens in csrc/cuda/kernels.h


def decode_attention(q, k, v, lengths, starts=None, window=0, scale=None):
    return _decode(q, k, v, k.shape[1], None, lengths, starts, window, scale)


def paged(q, k, v, table, lengths, starts=None, window=0, scale=None):
    """decode_attention over a cache in pages, k and v (pages, page size, H, D).

    ``table`` (B, places), int32 or int64, has the pages of each row: position p of row b is entry p % page size of page
    ``table[b, p // page size]``. The page size is a power of two.
    """
    return _decode(q, k, v, table.shape[1] * k.shape[1], table, lengths, starts, window, scale)


def _decode(q, k, v, S, table, lengths, starts, window, scale):
    B, T, H, D = q.shape
    out = empty_as(q)
    q, k, v = dense_heads(q, k, v)
    splits = -(-S // SPLIT)
    parts = q.new_empty(splits * B * T * H * (D + 2), dtype=torch.float32) if splits > 1 else None
    starts = None if starts is None else starts.contiguous()
    pages = 0, 1, 0
    if table is not None:
        table = table if table.stride(1) == 1 else table.contiguous()
        pages = table.stride(0), k.shape[1], int(table.dtype == torch.int64)
    tensors = q, k, v, lengths.contiguous(), starts, out, parts, table
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    options = window, D**-0.5 if scale is None else float(scale), DTYPES[q.dtype]
    call(SOURCE, "gpt2fast_decode_attention", *tensors, B, T, S, H, D, *strides, *pages, *options)
    return out


def supports(q, k, v, lengths, starts=None, window=0, scale=None):
    if q.shape[1] > MOST_TOKENS:
        return f"decode attention in CUDA covers up to {MOST_TOKENS} new tokens, got {q.shape[1]}"
    return objection(q)


KERNELS = {"decode_attention": (decode_attention, supports)}
