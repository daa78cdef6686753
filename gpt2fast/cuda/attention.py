"""attention by csrc/cuda/attention.cu."""

import torch

from ..tensors import broadcast_strides, dense_heads, dense_mask, empty_as
from . import library
from .library import DTYPES, call

SOURCE = "attention.cu"
WIDEST = 256  # the largest head size: kLargestHead in csrc/cuda/attention.cuh


def arguments(q, k, v, mask, bias, out, lse, seed, causal, window, scale, dropout_p):
    """The fields of AttentionArgs in csrc/ops.h, in their order."""
    B, T, H, D = q.shape
    mask, stride_mask_b = dense_mask(mask)
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], stride_mask_b, *broadcast_strides(bias)
    scale = D**-0.5 if scale is None else float(scale)
    options = window, int(causal), scale, float(dropout_p), seed, DTYPES[q.dtype]
    return q, k, v, mask, bias, out, lse, B, T, k.shape[1], H, D, *strides, *options


def attention(q, k, v, mask=None, bias=None, seed=None, causal=True, window=0, scale=None, dropout_p=0.0):
    B, T, H, D = q.shape
    out, lse = empty_as(q), q.new_empty((B, H, T), dtype=torch.float32)
    q, k, v = dense_heads(q, k, v)
    given = arguments(q, k, v, mask, bias, out, lse, seed, causal, window, scale, dropout_p)
    call(SOURCE, "gpt2fast_attention", *given)
    return out, lse


def objection(q):
    if found := library.objection("attention", q):
        return found
    if not 1 <= q.shape[-1] <= WIDEST:
        return f"attention in CUDA covers head sizes of 1 to {WIDEST}, got {q.shape[-1]}"
    return None


def supports(q, k, v, mask=None, bias=None, seed=None, causal=True, window=0, scale=None, dropout_p=0.0):
    return objection(q)


KERNELS = {"attention": (attention, supports)}
