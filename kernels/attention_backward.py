"""The gradients of attention (kernels/attention.py). The probabilities are computed again from lse, tile by tile.

    p = e^(scale q k^T + bias - lse)      dp = dout v^T      delta = rowsum(dout out)      ds = p (dp - delta)
    dq = scale ds k                       dk = scale ds^T q                                dv = p^T dout

Dropout is applied to dp, and to the p of dv. There are three kernels, and all of them loop over tiles:
- attention_backward_q_kernel: a program holds a tile of queries and loops over keys. It writes dq, and for the other
  kernels delta and excess, the log2 of what a row's p sum to.
- attention_backward_kv_kernel: a program holds a tile of keys and loops over queries. It writes dk and dv.
- attention_backward_bias_kernel runs only if there is a bias. It writes dbias, which is ds summed over the axes along
  which bias broadcasts.

No program adds to what another one writes, so that the gradients have the same bits in every run. The price is that
the scores and dp are computed once in each kernel. docs/kernels.md counts the bytes and products.
"""

import torch
import triton
import triton.language as tl

from ..tensors import dense_heads, empty_as
from .attention import (
    LOG2E,
    arguments,
    kept_by_dropout,
    keys_of_tile,
    load_rows,
    objection,
    scores_of_tile,
    sees,
    usable_keys,
)
from .tiles import tiles


@triton.jit
def _add_keys(
    dq, total, q, dout, lse, delta, k_ptr, v_ptr, mask_ptr, bias_ptr, seed, stride_k_s, stride_v_s, stride_bias_t,
    stride_bias_s, row, t, start, d, T, S, window, scale, dropout_p,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds one tile of keys to dq (still without its scale) and to total, the sum of each row's p.

    EDGE: some query may not see some key of the tile, for another reason than the padding mask.
    """
    s = start + tl.arange(0, BLOCK_N)
    inside = usable_keys(s, T, S, mask_ptr, window, HAS_MASK, HAS_WINDOW)
    ALL_ROWS: tl.constexpr = not (EDGE or HAS_MASK)
    k = load_rows(k_ptr, s, stride_k_s, d, inside, D, BLOCK_D, ALL_ROWS)
    v = load_rows(v_ptr, s, stride_v_s, d, inside, D, BLOCK_D, ALL_ROWS)
    scores = scores_of_tile(q, k, bias_ptr, t, s, T, S, stride_bias_t, stride_bias_s, scale, HAS_BIAS, PRECISION)
    p = tl.exp2((scores - lse[:, None]) * LOG2E)
    if EDGE:
        p = tl.where(sees(t[:, None], s[None, :], T, S, window, CAUSAL, HAS_WINDOW) & inside[None, :], p, 0.0)
    elif HAS_MASK:
        p = tl.where(inside[None, :], p, 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        dp = tl.where(kept_by_dropout(seed, row, start, dropout_p, BLOCK_M, BLOCK_N), dp / (1 - dropout_p), 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION), total + tl.sum(p, 1)


@triton.jit(do_not_specialize=["H", "T", "S", "window"])
def attention_backward_q_kernel(
    dout_ptr, out_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, seed_ptr, lse_ptr, dq_ptr, delta_ptr, excess_ptr,
    stride_dout_b, stride_dout_t, stride_dout_h, stride_out_b, stride_out_t, stride_out_h,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_mask_b, stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s, H, T, S, window, scale, dropout_p,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_M)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // H, head % H
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    t = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    row = head * T + t
    q = load_rows(q_ptr + b * stride_q_b + h * stride_q_h, t, stride_q_t, d, t < T, D, BLOCK_D, False)
    dout_ptr += b * stride_dout_b + h * stride_dout_h
    dout = load_rows(dout_ptr, t, stride_dout_t, d, t < T, D, BLOCK_D, False)
    out = load_rows(out_ptr + b * stride_out_b + h * stride_out_h, t, stride_out_t, d, t < T, D, BLOCK_D, False)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + row, delta, mask=t < T)
    lse = tl.load(lse_ptr + row, mask=t < T, other=0.0)
    k_ptr += b * stride_k_b + h * stride_k_h
    v_ptr += b * stride_v_b + h * stride_v_h
    mask_ptr += b * stride_mask_b
    bias_ptr += b * stride_bias_b + h * stride_bias_h
    seed = tl.load(seed_ptr) if DROPOUT else 0
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    begin, clear, end = keys_of_tile(first, T, S, window, CAUSAL, HAS_WINDOW, BLOCK_M, BLOCK_N)
    if not HAS_WINDOW:
        for start in tl.range(begin, clear, BLOCK_N):
            dq, total = _add_keys(
                dq, total, q, dout, lse, delta, k_ptr, v_ptr, mask_ptr, bias_ptr, seed, stride_k_s, stride_v_s,
                stride_bias_t, stride_bias_s, row, t, start, d, T, S, window, scale, dropout_p, D, BLOCK_D, BLOCK_M,
                BLOCK_N, CAUSAL, HAS_WINDOW, HAS_MASK, HAS_BIAS, DROPOUT, PRECISION, False,
            )  # fmt: skip
    for start in tl.range(clear, end, BLOCK_N):
        dq, total = _add_keys(
            dq, total, q, dout, lse, delta, k_ptr, v_ptr, mask_ptr, bias_ptr, seed, stride_k_s, stride_v_s,
            stride_bias_t, stride_bias_s, row, t, start, d, T, S, window, scale, dropout_p, D, BLOCK_D, BLOCK_M,
            BLOCK_N, CAUSAL, HAS_WINDOW, HAS_MASK, HAS_BIAS, DROPOUT, PRECISION, True,
        )  # fmt: skip
    # The p of a row would sum to 1 if lse were exact. Where scores are large, lse has no digits left for the log of the
    # sum, and p is off by a common factor. Dividing by the sum of p corrects that.
    total = tl.where(total == 0, 1.0, total)
    tl.store(excess_ptr + row, tl.log2(total), mask=t < T)
    dq = dq * (scale / total)[:, None]
    tl.store(dq_ptr + ((b * T + t)[:, None] * H + h) * D + d[None, :], dq.to(dq_ptr.dtype.element_ty),
             mask=(t[:, None] < T) & (d[None, :] < D))  # fmt: skip


@triton.jit
def load_statistics(lse_ptr, delta_ptr, excess_ptr, row, inside, ALL_ROWS: tl.constexpr):
    """lse, delta and excess (see the top of this file) of the rows. They are zero for rows that are not ``inside``.

    Such rows add nothing, since their q and dout are zero too. ALL_ROWS: all rows are inside.
    """
    if ALL_ROWS:
        return tl.load(lse_ptr + row), tl.load(delta_ptr + row), tl.load(excess_ptr + row)
    lse = tl.load(lse_ptr + row, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
    return lse, delta, tl.load(excess_ptr + row, mask=inside, other=0.0)


@triton.jit
def _add_queries(
    dk, dv, k, v, dout_ptr, q_ptr, lse_ptr, delta_ptr, excess_ptr, bias_ptr, seed, stride_dout_t, stride_q_t,
    stride_bias_t, stride_bias_s, head, s, start, usable, first, d, T, S, window, scale, dropout_p,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds one tile of queries to dk (still without its scale) and dv.

    Scores and p have shape (keys, queries) here, so that ds^T q and p^T dout need no transposed operand. EDGE: some
    query may not see some key, for another reason than the padding mask.
    """
    t = first + tl.arange(0, BLOCK_M)
    row = head * T + t
    q = load_rows(q_ptr, t, stride_q_t, d, t < T, D, BLOCK_D, not EDGE)
    dout = load_rows(dout_ptr, t, stride_dout_t, d, t < T, D, BLOCK_D, not EDGE)
    lse, delta, excess = load_statistics(lse_ptr, delta_ptr, excess_ptr, row, t < T, not EDGE)
    scores = scores_of_tile(k, q, bias_ptr, s, t, S, T, stride_bias_s, stride_bias_t, scale, HAS_BIAS, PRECISION)
    p = tl.exp2((scores - lse[None, :]) * LOG2E - excess[None, :])
    if EDGE:
        p = tl.where(sees(t[None, :], s[:, None], T, S, window, CAUSAL, HAS_WINDOW) & usable[:, None], p, 0.0)
    elif HAS_MASK:
        p = tl.where(usable[:, None], p, 0.0)
    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    dropped = p
    if DROPOUT:
        kept = tl.trans(kept_by_dropout(seed, row, start, dropout_p, BLOCK_M, BLOCK_N))
        dropped = tl.where(kept, p / (1 - dropout_p), 0.0)
        dp = tl.where(kept, dp / (1 - dropout_p), 0.0)
    dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


@triton.jit(do_not_specialize=["H", "T", "S", "window"])
def attention_backward_kv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, seed_ptr, lse_ptr, delta_ptr, excess_ptr, dk_ptr, dv_ptr,
    stride_dout_b, stride_dout_t, stride_dout_h,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_mask_b, stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s, H, T, S, window, scale, dropout_p,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(S, BLOCK_N)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // H, head % H
    start = (tl.program_id(0) % tiles) * BLOCK_N
    s = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = usable_keys(s, T, S, mask_ptr + b * stride_mask_b, window, HAS_MASK, HAS_WINDOW)
    k = load_rows(k_ptr + b * stride_k_b + h * stride_k_h, s, stride_k_s, d, inside, D, BLOCK_D, False)
    v = load_rows(v_ptr + b * stride_v_b + h * stride_v_h, s, stride_v_s, d, inside, D, BLOCK_D, False)
    q_ptr += b * stride_q_b + h * stride_q_h
    dout_ptr += b * stride_dout_b + h * stride_dout_h
    bias_ptr += b * stride_bias_b + h * stride_bias_h
    seed = tl.load(seed_ptr) if DROPOUT else 0
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # The queries from begin to end see some key of the tile. In the tiles of queries from clear to whole, every query
    # sees every key, so that no comparison is needed.
    begin, clear, end = 0, 0, T
    if CAUSAL:
        begin = tl.maximum(0, start - (S - T)) // BLOCK_M * BLOCK_M
        clear = tl.cdiv(tl.maximum(0, start + BLOCK_N - 1 - (S - T)), BLOCK_M) * BLOCK_M
    if HAS_WINDOW:
        end = tl.minimum(T, tl.maximum(0, start + BLOCK_N - 1 + window - (S - T)))
        clear = end
    clear = tl.minimum(clear, end)
    whole = tl.maximum(clear, end // BLOCK_M * BLOCK_M)
    for first in tl.range(begin, clear, BLOCK_M):
        dk, dv = _add_queries(
            dk, dv, k, v, dout_ptr, q_ptr, lse_ptr, delta_ptr, excess_ptr, bias_ptr, seed, stride_dout_t,
            stride_q_t, stride_bias_t, stride_bias_s, head, s, start, inside, first, d, T, S, window, scale,
            dropout_p, D, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, HAS_WINDOW, HAS_MASK, HAS_BIAS, DROPOUT, PRECISION,
            True,
        )  # fmt: skip
    if not HAS_WINDOW:
        for first in tl.range(clear, whole, BLOCK_M):
            dk, dv = _add_queries(
                dk, dv, k, v, dout_ptr, q_ptr, lse_ptr, delta_ptr, excess_ptr, bias_ptr, seed, stride_dout_t,
                stride_q_t, stride_bias_t, stride_bias_s, head, s, start, inside, first, d, T, S, window, scale,
                dropout_p, D, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, HAS_WINDOW, HAS_MASK, HAS_BIAS, DROPOUT, PRECISION,
                False,
            )  # fmt: skip
        for first in tl.range(whole, end, BLOCK_M):
            dk, dv = _add_queries(
                dk, dv, k, v, dout_ptr, q_ptr, lse_ptr, delta_ptr, excess_ptr, bias_ptr, seed, stride_dout_t,
                stride_q_t, stride_bias_t, stride_bias_s, head, s, start, inside, first, d, T, S, window, scale,
                dropout_p, D, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, HAS_WINDOW, HAS_MASK, HAS_BIAS, DROPOUT, PRECISION,
                True,
            )  # fmt: skip
    at = ((b * S + s)[:, None] * H + h) * D + d[None, :]
    stored = (s[:, None] < S) & (d[None, :] < D)
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=stored)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["B", "H", "T", "S", "window"])
def attention_backward_bias_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, seed_ptr, lse_ptr, delta_ptr, excess_ptr, dbias_ptr,
    stride_dout_b, stride_dout_t, stride_dout_h,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_mask_b, stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s, H, T, S, window, scale, dropout_p, B,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SUM_B: tl.constexpr, SUM_H: tl.constexpr, SUM_T: tl.constexpr, SUM_S: tl.constexpr,
):  # fmt: skip
    """dbias is ds, summed over the axes along which bias broadcasts (SUM_B, SUM_H, SUM_T, SUM_S). A program holds one
    tile of dbias and loops in a fixed order over all tiles of ds that are added to it."""
    tiles_t = 1 if SUM_T else tl.cdiv(T, BLOCK_M)
    tiles_s = 1 if SUM_S else tl.cdiv(S, BLOCK_N)
    heads = 1 if SUM_H else H
    program = tl.program_id(0)
    tile_s, program = program % tiles_s, program // tiles_s
    tile_t, program = program % tiles_t, program // tiles_t
    own_h, own_b = program % heads, program // heads
    # One loop covers all summed axes. Tiles of keys change fastest, then tiles of queries, then heads, then batch.
    count_t = tl.cdiv(T, BLOCK_M) if SUM_T else 1
    count_s = tl.cdiv(S, BLOCK_N) if SUM_S else 1
    count_h = H if SUM_H else 1
    count_b = B if SUM_B else 1
    d = tl.arange(0, BLOCK_D)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in tl.range(0, count_b * count_h * count_t * count_s):
        t = (tile_t + i // count_s % count_t) * BLOCK_M + tl.arange(0, BLOCK_M)
        start = (tile_s + i % count_s) * BLOCK_N
        s = start + tl.arange(0, BLOCK_N)
        h = (own_h + i // (count_s * count_t) % count_h).to(tl.int64)
        b = (own_b + i // (count_s * count_t * count_h)).to(tl.int64)
        row = (b * H + h) * T + t
        inside = usable_keys(s, T, S, mask_ptr + b * stride_mask_b, window, HAS_MASK, HAS_WINDOW)
        q = load_rows(q_ptr + b * stride_q_b + h * stride_q_h, t, stride_q_t, d, t < T, D, BLOCK_D, False)
        k = load_rows(k_ptr + b * stride_k_b + h * stride_k_h, s, stride_k_s, d, inside, D, BLOCK_D, False)
        v = load_rows(v_ptr + b * stride_v_b + h * stride_v_h, s, stride_v_s, d, inside, D, BLOCK_D, False)
        dout_row = dout_ptr + b * stride_dout_b + h * stride_dout_h
        dout = load_rows(dout_row, t, stride_dout_t, d, t < T, D, BLOCK_D, False)
        lse, delta, excess = load_statistics(lse_ptr, delta_ptr, excess_ptr, row, t < T, False)
        bias_row = bias_ptr + b * stride_bias_b + h * stride_bias_h
        scores = scores_of_tile(q, k, bias_row, t, s, T, S, stride_bias_t, stride_bias_s, scale, HAS_BIAS, PRECISION)
        seen = sees(t[:, None], s[None, :], T, S, window, CAUSAL, HAS_WINDOW) & inside[None, :]
        p = tl.where(seen, tl.exp2((scores - lse[:, None]) * LOG2E - excess[:, None]), 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            dp = tl.where(kept_by_dropout(seed, row, start, dropout_p, BLOCK_M, BLOCK_N), dp / (1 - dropout_p), 0.0)
        dbias += p * (dp - delta[:, None])
    t = tile_t * BLOCK_M + tl.arange(0, BLOCK_M)
    s = tile_s * BLOCK_N + tl.arange(0, BLOCK_N)
    # dbias is contiguous and has shape (B or 1, H or 1, T or 1, S or 1).
    size_t = 1 if SUM_T else T
    size_s = 1 if SUM_S else S
    dbias_ptr += (own_b.to(tl.int64) * heads + own_h) * size_t * size_s
    if SUM_T:
        column = tl.sum(dbias, 0)
        if SUM_S:
            tl.store(dbias_ptr, tl.sum(column, 0).to(dbias_ptr.dtype.element_ty))
        else:
            tl.store(dbias_ptr + s, column.to(dbias_ptr.dtype.element_ty), mask=s < S)
    elif SUM_S:
        tl.store(dbias_ptr + t, tl.sum(dbias, 1).to(dbias_ptr.dtype.element_ty), mask=t < T)
    else:
        at = dbias_ptr + t.to(tl.int64)[:, None] * S + s[None, :]
        tl.store(at, dbias.to(dbias_ptr.dtype.element_ty), mask=(t[:, None] < T) & (s[None, :] < S))


@tiles("attention_backward_q_kernel")
def tile_of_queries(block_d, wide):
    """(BLOCK_M, BLOCK_N, num_warps, num_stages) of the kernel that holds queries.

    ``block_d``: the columns of a head, padded. ``wide``: the dtype is float32, whose bfloat16 parts fill the registers.
    """
    if wide:
        return {16: (64, 32, 4, 1), 32: (64, 32, 4, 1), 64: (32, 32, 4, 1), 128: (16, 32, 4, 1)}.get(
            block_d, (16, 16, 8, 1)
        )
    return (32, 32, 8, 1) if block_d > 128 else (64, 64, 4, 2 if block_d > 64 else 3)


@tiles("attention_backward_kv_kernel")
def tile_of_keys(block_d, wide):
    """The same for the kernel that holds keys."""
    if wide:
        return {16: (16, 32, 4, 1), 32: (16, 32, 4, 1), 64: (32, 32, 4, 1), 128: (16, 16, 4, 1)}.get(
            block_d, (16, 16, 8, 1)
        )
    return (32, 32, 8, 1) if block_d > 128 else (32, 64, 4, 2 if block_d > 64 else 3)


@tiles("attention_backward_bias_kernel")
def tile_of_bias(block_d, wide):
    """The same for the kernel that sums dbias."""
    if wide:
        return (32, 16, 4, 1) if block_d <= 64 else (16, 32, 8, 1) if block_d <= 128 else (16, 16, 8, 1)
    return (32, 32, 8, 1) if block_d > 128 else (64, 64, 4, 1)


def attention_backward(
    dout, q, k, v, out, lse, mask=None, bias=None, seed=None, causal=True, window=0, scale=None, dropout_p=0.0
):
    B, T, H, D = q.shape
    S = k.shape[1]
    dq, dk, dv = empty_as(q), empty_as(k), empty_as(v)
    dbias = q.new_empty(0) if bias is None else empty_as(bias)
    if 0 in (B, T, S, H):  # no query sees a key
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias.zero_()
    dout, out, q, k, v = dense_heads(dout, out, q, k, v)
    lse = lse.contiguous()
    delta, excess = torch.empty_like(lse), torch.empty_like(lse)
    optional, strides, sizes, words = arguments(q, k, v, mask, bias, seed, causal, window, scale, dropout_p)
    strides_dout = dout.stride()[:3]
    key = words[1], q.dtype == torch.float32
    M, N, warps, stages = tile_of_queries(*key)
    attention_backward_q_kernel[(-(-T // M) * B * H,)](
        dout, out, q, k, v, *optional, lse, dq, delta, excess, *strides_dout, *out.stride()[:3], *strides, *sizes,
        *words, M, N, num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip
    M, N, warps, stages = tile_of_keys(*key)
    attention_backward_kv_kernel[(-(-S // N) * B * H,)](
        dout, q, k, v, *optional, lse, delta, excess, dk, dv, *strides_dout, *strides, *sizes,
        *words, M, N, num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip
    if bias is not None:
        M, N, warps, stages = tile_of_bias(*key)
        summed = [size == 1 for size in bias.shape]
        tiles_of = [B, H, -(-T // M), -(-S // N)]
        programs = 1
        for count, is_summed in zip(tiles_of, summed):
            programs *= 1 if is_summed else count
        attention_backward_bias_kernel[(programs,)](
            dout, q, k, v, *optional, lse, delta, excess, dbias, *strides_dout, *strides, *sizes, B, *words,
            M, N, *summed, num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip
    return dq, dk, dv, dbias


def supports(
    dout, q, k, v, out, lse, mask=None, bias=None, seed=None, causal=True, window=0, scale=None, dropout_p=0.0
):
    return objection(q)


KERNELS = {"attention_backward": (attention_backward, supports)}
