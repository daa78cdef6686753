"""Attention of a few new tokens (T of them) over a KV cache. Row b of the batch has lengths[b] keys, the new ones last.

The formula is that of kernels/attention.py. A program has one head of one row, all of its T queries, and SPLIT keys of
the cache, so that even a batch of one row fills the device. It writes the peak, total and sums of its keys, and a
second kernel joins the parts in order. If there is only one part, the program writes the output itself.

The floor is memory traffic: the keys and values of the cache are read once. docs/kernels.md counts 1.01 to 1.03 times
the least bytes. The points at which the keys are split do not depend on the batch, so the bits of a row do not either.
"""

import torch
import triton
import triton.language as tl

from ..tensors import dense_heads, empty_as
from .attention import LOG2E, load_rows, objection, precision
from .tiles import tiles

SPLIT = 128  # keys of a program
MOST_TOKENS = 16  # the largest T: all queries of a head are one tile


@triton.jit(do_not_specialize=["H", "T", "S", "window"])
def decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, starts_ptr, out_ptr, sums_ptr, peak_ptr, total_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    H, T, S, window, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT_S: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_WINDOW: tl.constexpr, ALONE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Query t of row b sees the keys from starts[b] up to lengths[b] - T + t, and with a window the last ``window``.

    ALONE: one program has all keys of a head and writes the output itself.
    """
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
        # The parts have the order (split, row, token, head): programs of the second kernel read neighbouring numbers.
        row = (split * (tl.num_programs(0) // H) + b) * T + t
        row = row.to(tl.int64) * H + h
        tl.store(sums_ptr + row[:, None] * D + d[None, :], sums, mask=stored)
        tl.store(peak_ptr + row, peak, mask=t < T)
        tl.store(total_ptr + row, total, mask=t < T)


@triton.jit(do_not_specialize=["rows", "splits"])
def decode_attention_join_kernel(
    sums_ptr, peak_ptr, total_ptr, out_ptr, rows, splits, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Joins the parts. A program has one head of one token.

    With w = e^(peak - greatest peak) of each part, out is the sum of w sums, divided by the sum of w total.
    """
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
    """(BLOCK_S, num_warps, num_stages) for a head padded to ``block_d`` columns. ``wide``: the dtype is float32."""
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
