"""Attention of a few new tokens over a KV cache, row b of which holds lengths[b] keys.

A program has one head of one row and SPLIT keys of its cache, so that a single row fills a device too. It leaves the
weighted sum of its values, the greatest score and the sum of exponentials; a second kernel puts the parts together.
Where the keys are split does not depend on the batch, nor do the bits of a row.
"""

import torch
import triton
import triton.language as tl

from ..tensors import dense_heads, empty_as
from .attention import LOG2E, load_rows, objection, precision
from .tiles import tiles

SPLIT = 128  # keys of a program
MOST_TOKENS = 16


@triton.jit(do_not_specialize=["H", "T", "S", "window"])
def decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, starts_ptr, out_ptr, sums_ptr, peak_ptr, total_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    H, T, S, window, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT_S: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_WINDOW: tl.constexpr, ALONE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ALONE: one program has all keys, and writes the output itself."""
    split, head = tl.program_id(1), tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    t = tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    length = tl.minimum(tl.load(lengths_ptr + b), S).to(tl.int32)
    last = length - T + t
    begin, end = 0, length
    if HAS_STARTS:
        begin = tl.load(starts_ptr + b).to(tl.int32)
    low = begin
    if HAS_WINDOW:
        low = tl.maximum(low, length - T - window + 1)
    first = tl.maximum(split * SPLIT_S, low // BLOCK_S * BLOCK_S)
    end = tl.minimum(end, (split + 1) * SPLIT_S)
    q = load_rows(q_ptr + b * stride_q_b + h * stride_q_h, t, stride_q_t, d, t < T, D, BLOCK_D, False)
    k_ptr += b * stride_k_b + h * stride_k_h
    v_ptr += b * stride_v_b + h * stride_v_h
    peak = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    sums = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in tl.range(first, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        usable = (s >= low) & (s < end)
        k = load_rows(k_ptr, s, stride_k_s, d, usable, D, BLOCK_D, False)
        v = load_rows(v_ptr, s, stride_v_s, d, usable, D, BLOCK_D, False)
        seen = usable[None, :] & (s[None, :] <= last[:, None])
        if HAS_WINDOW:
            seen = seen & (s[None, :] > last[:, None] - window)
        scores = tl.where(seen, tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2((scores - shift[:, None]) * LOG2E)
        decay = tl.exp2((peak - shift) * LOG2E)
        total = total * decay + tl.sum(p, 1)
        sums = tl.dot(p.to(v.dtype), v, sums * decay[:, None], input_precision=PRECISION)
        peak = new_peak
    stored = (t[:, None] < T) & (d[None, :] < D)
    if ALONE:
        out = sums / tl.where(total == 0, 1.0, total)[:, None]
        at = ((b * T + t)[:, None] * H + h) * D + d[None, :]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=stored)
    else:
        # Parts lie as (split, row, token, head): the second kernel reads them side by side.
        row = (split * (tl.num_programs(0) // H) + b) * T + t
        row = row.to(tl.int64) * H + h
        tl.store(sums_ptr + row[:, None] * D + d[None, :], sums, mask=stored)
        tl.store(peak_ptr + row, peak, mask=t < T)
        tl.store(total_ptr + row, total, mask=t < T)


@triton.jit(do_not_specialize=["rows", "splits"])
def decode_attention_join_kernel(
    sums_ptr, peak_ptr, total_ptr, out_ptr, rows, splits, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """A program has one head of one token: out = sum of exp(peak - greatest peak) sums, over the sum of all."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    peak = tl.load(peak_ptr + row)
    total = tl.load(total_ptr + row)
    sums = tl.load(sums_ptr + row * D + d, mask=d < D, other=0.0)
    for split in tl.range(1, splits):
        at = split.to(tl.int64) * rows + row
        other = tl.load(peak_ptr + at)
        new_peak = tl.maximum(peak, other)
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        decay, gain = tl.exp2((peak - shift) * LOG2E), tl.exp2((other - shift) * LOG2E)
        total = total * decay + tl.load(total_ptr + at) * gain
        sums = sums * decay + tl.load(sums_ptr + at * D + d, mask=d < D, other=0.0) * gain
        peak = new_peak
    out = sums / tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


@tiles("decode_attention_kernel")
def tile(block_d, wide):
    """``wide``: float32."""
    return 64 if block_d <= 64 else 32, 4, 2


def decode_attention(q, k, v, lengths, starts=None, window=0, scale=None):
    B, T, H, D = q.shape
    S = k.shape[1]
    out = empty_as(q)
    if 0 in (B, T, H):
        return out
    if S == 0:
        return out.zero_()
    q, k, v = dense_heads(q, k, v)
    splits = -(-S // SPLIT)
    sums = peak = total = out
    if splits > 1:
        sums = q.new_empty((splits, B, T, H, D), dtype=torch.float32)
        peak, total = q.new_empty((2, splits, B, T, H), dtype=torch.float32)
    block_d = max(16, triton.next_power_of_2(D))
    block_s, warps, stages = tile(block_d, q.dtype == torch.float32)
    decode_attention_kernel[(B * H, splits)](
        q, k, v, lengths.contiguous(), lengths if starts is None else starts.contiguous(), out, sums, peak, total,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], H, T, S, window, D**-0.5 if scale is None else scale,
        D, block_d, MOST_TOKENS, block_s, SPLIT, starts is not None, window > 0, splits == 1,
        precision(q), num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        decode_attention_join_kernel[(B * T * H,)](
            sums, peak, total, out, B * T * H, splits, D, block_d, num_warps=1, enable_fp_fusion=True
        )
    return out


def supports(q, k, v, lengths, starts=None, window=0, scale=None):
    if q.shape[1] > MOST_TOKENS:
        return f"decode attention in Triton covers up to {MOST_TOKENS} new tokens, got {q.shape[1]}"
    return objection(q)


KERNELS = {"decode_attention": (decode_attention, supports)}
