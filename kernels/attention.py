"""Attention: out = softmax(scale q k^T + bias) v over the keys that each query sees, and lse = log sum exp(scores).

q is (B, T, H, D), k and v are (B, S, H, D). The T x S matrix of scores is never in memory (FlashAttention-2, Dao,
arXiv:2307.08691). A program holds one tile of BLOCK_M queries of one head and loops over the tiles of BLOCK_N keys that
they see. For each query it keeps three things in float32: the greatest score so far (peak), the sum of e^(score - peak)
(total), and the sum of e^(score - peak) times the value (sums). A greater peak rescales both sums. At the end,
out = sums / total and lse = peak + log total.

The floor: q, k, v and out are moved once each, and each pair of a query and a key that it sees takes two products of D
multiplications. docs/kernels.md counts what the kernel moves and multiplies; docs/how/attention.md explains the counts.
"""

import torch
import triton
import triton.language as tl

from ..tensors import broadcast_strides, dense_heads, dense_mask, empty_as
from . import common
from .tiles import tiles

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the least float32: the lse of a query that sees nothing
WIDEST = 256  # the largest head size D


@triton.jit
def load_rows(ptr, rows, stride, d, inside, D: tl.constexpr, BLOCK_D: tl.constexpr, ALL_ROWS: tl.constexpr):
    """A tile (rows, BLOCK_D) of a tensor whose head dimension is dense. Rows that are not ``inside`` are zero.

    ALL_ROWS: all rows are inside, so that the load needs no comparison for them.
    """
    ptr += rows.to(tl.int64)[:, None] * stride + d[None, :]
    if ALL_ROWS:
        if D == BLOCK_D:
            return tl.load(ptr)
        return tl.load(ptr, mask=d[None, :] < D, other=0.0)
    return tl.load(ptr, mask=inside[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def usable_keys(s, T, S, mask_ptr, window, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Whether at least one query sees key s. Other keys are read as zero, so that even NaN in them has no effect."""
    usable = s < S
    if HAS_WINDOW:
        usable = usable & (s > S - T - window)
    if HAS_MASK:
        usable = usable & (tl.load(mask_ptr + s, mask=s < S, other=0) != 0)
    return usable


@triton.jit
def sees(t, s, T, S, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Whether query t sees key s, for t and s of shapes that broadcast. The padding mask is not looked at here."""
    seen = (t < T) & (s < S)
    if CAUSAL:
        seen = seen & (s <= S - T + t)
    if HAS_WINDOW:
        seen = seen & (s > S - T + t - window)
    return seen


@triton.jit
def keys_of_tile(first, T, S, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr):  # fmt: skip
    """(begin, clear, end) for the queries first to first + BLOCK_M - 1.

    They see no key before begin and none from end on. Each of them sees every key from begin to clear, so that those
    tiles need no comparisons. With a window, clear is begin: all tiles are compared.
    """
    begin, end, clear = 0, S, S
    if CAUSAL:
        end = tl.maximum(tl.minimum(S, S - T + first + BLOCK_M), 0)
        clear = tl.maximum(tl.minimum(S, S - T + first + 1), 0)
    if HAS_WINDOW:
        begin = tl.maximum(0, S - T + first - window + 1) // BLOCK_N * BLOCK_N
        clear = begin
    return begin, clear // BLOCK_N * BLOCK_N, end


@triton.jit
def kept_by_dropout(seed, row, start, dropout_p, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N): which probabilities dropout keeps, for the queries in ``row`` and the keys from ``start`` on.

    The row of a query is (b H + h) T + t. Key s takes word s % 4 of the Philox 4x32-10 block with counter (s / 4, row)
    and key ``seed``, as in csrc/math.h (Salmon et al., SC11). So the backward pass draws the same mask again.
    """
    row = row.to(tl.uint64)[:, None]
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.uint32)
    c0 = ((start // 4) + tl.arange(0, BLOCK_N // 4))[None, :].to(tl.uint32) + zero
    c1, c2, c3 = zero, row.to(tl.uint32) + zero, (row >> 32).to(tl.uint32) + zero
    c0, c1, c2, c3 = common.philox(seed, c0, c1, c2, c3)
    words = tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), [BLOCK_M, BLOCK_N])
    return (words >> 8).to(tl.float32) * 5.9604644775390625e-8 >= dropout_p


@triton.jit
def scores_of_tile(q, k, bias_ptr, t, s, T, S, stride_bias_t, stride_bias_s, scale, HAS_BIAS: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """scale q k^T + bias, of shape (queries, keys).

    If the caller exchanges q and k, t and s, T and S, and the two strides, the result has shape (keys, queries).
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if HAS_BIAS:
        at = bias_ptr + t.to(tl.int64)[:, None] * stride_bias_t + s.to(tl.int64)[None, :] * stride_bias_s
        scores += tl.load(at, mask=(t[:, None] < T) & (s[None, :] < S), other=0.0).to(tl.float32)
    return scores


@triton.jit
def _add_keys(
    peak, total, sums, q, k_ptr, v_ptr, mask_ptr, bias_ptr, seed, stride_k_s, stride_v_s, stride_bias_t, stride_bias_s,
    row, t, start, d, T, S, window, scale, dropout_p,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Adds one tile of keys to peak, total and sums, and returns their new values.

    EDGE: some query may not see some key of the tile, for another reason than the padding mask.
    """
    s = start + tl.arange(0, BLOCK_N)
    usable = usable_keys(s, T, S, mask_ptr, window, HAS_MASK, HAS_WINDOW)
    ALL_ROWS: tl.constexpr = not (EDGE or HAS_MASK)
    k = load_rows(k_ptr, s, stride_k_s, d, usable, D, BLOCK_D, ALL_ROWS)
    scores = scores_of_tile(q, k, bias_ptr, t, s, T, S, stride_bias_t, stride_bias_s, scale, HAS_BIAS, PRECISION)
    if EDGE:
        seen = sees(t[:, None], s[None, :], T, S, window, CAUSAL, HAS_WINDOW) & usable[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    elif HAS_MASK:
        scores = tl.where(usable[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # A row that has seen no key yet is shifted by 0, since (-inf) - (-inf) is NaN. The shift is subtracted before the
    # multiplication by log2(e), because the difference of two close numbers is exact, however large they are.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = tl.exp2((scores - shift[:, None]) * LOG2E)
    decay = tl.exp2((peak - shift) * LOG2E)
    total = total * decay + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(kept_by_dropout(seed, row, start, dropout_p, BLOCK_M, BLOCK_N), p, 0.0)
    v = load_rows(v_ptr, s, stride_v_s, d, usable, D, BLOCK_D, ALL_ROWS)
    sums = tl.dot(p.to(v.dtype), v, sums * decay[:, None], input_precision=PRECISION)
    return new_peak, total, sums


# Triton compiles no special versions for these sizes: prompts of all lengths run the same compiled kernel.
@triton.jit(do_not_specialize=["H", "T", "S", "window"])
def attention_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, bias_ptr, seed_ptr, out_ptr, lse_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_h, stride_v_b, stride_v_s, stride_v_h,
    stride_mask_b, stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s, H, T, S, window, scale, dropout_p,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_M)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // H, head % H
    # The last queries of a causal head see the most keys. Their programs start first, so that short ones run at the end
    # and no multiprocessor waits long for the last one.
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    t = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    row = head * T + t
    q = load_rows(q_ptr + b * stride_q_b + h * stride_q_h, t, stride_q_t, d, t < T, D, BLOCK_D, False)
    k_ptr += b * stride_k_b + h * stride_k_h
    v_ptr += b * stride_v_b + h * stride_v_h
    mask_ptr += b * stride_mask_b
    bias_ptr += b * stride_bias_b + h * stride_bias_h
    seed = tl.load(seed_ptr) if DROPOUT else 0
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, clear, end = keys_of_tile(first, T, S, window, CAUSAL, HAS_WINDOW, BLOCK_M, BLOCK_N)
    if not HAS_WINDOW:
        for start in tl.range(begin, clear, BLOCK_N):
            peak, total, sums = _add_keys(
                peak, total, sums, q, k_ptr, v_ptr, mask_ptr, bias_ptr, seed, stride_k_s, stride_v_s, stride_bias_t,
                stride_bias_s, row, t, start, d, T, S, window, scale, dropout_p, D, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL,
                HAS_WINDOW, HAS_MASK, HAS_BIAS, DROPOUT, PRECISION, False,
            )  # fmt: skip
    for start in tl.range(clear, end, BLOCK_N):
        peak, total, sums = _add_keys(
            peak, total, sums, q, k_ptr, v_ptr, mask_ptr, bias_ptr, seed, stride_k_s, stride_v_s, stride_bias_t,
            stride_bias_s, row, t, start, d, T, S, window, scale, dropout_p, D, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL,
            HAS_WINDOW, HAS_MASK, HAS_BIAS, DROPOUT, PRECISION, True,
        )  # fmt: skip
    some = tl.where(total == 0, 1.0, total)
    factor = 1 / some
    if DROPOUT:
        factor = factor / (1 - dropout_p)
    out = sums * factor[:, None]
    tl.store(out_ptr + ((b * T + t)[:, None] * H + h) * D + d[None, :], out.to(out_ptr.dtype.element_ty),
             mask=(t[:, None] < T) & (d[None, :] < D))  # fmt: skip
    tl.store(lse_ptr + row, tl.where(total == 0, LOWEST, peak + tl.log(some)), mask=t < T)


@tiles("attention_kernel")
def forward_tile(block_d, wide):
    """(BLOCK_M, BLOCK_N, num_warps, num_stages) for a head padded to ``block_d`` columns.

    ``wide``: the dtype is float32, whose products are six products of bfloat16 each and take more registers.
    """
    if wide:
        if block_d <= 64:
            return (64, 32, 4, 1) if block_d <= 32 else (32, 32, 4, 1)
        return (16, 32, 4, 1) if block_d <= 128 else (16, 16, 8, 1)
    return {128: (64, 64, 4, 2), 256: (64, 32, 4, 2)}.get(block_d, (64, 64, 4, 3))


def arguments(q, k, v, mask, bias, seed, causal, window, scale, dropout_p):
    """The arguments that forward and backward kernels share: (optional tensors, strides, sizes, compile-time words)."""
    B, T, H, D = q.shape
    S = k.shape[1]
    mask, stride_mask_b = dense_mask(mask)
    strides = [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], stride_mask_b, *broadcast_strides(bias)]
    # The kernel does not read a tensor that is missing, so any tensor serves as a placeholder.
    optional = [q if x is None else x for x in (mask, bias, seed)]
    sizes = (H, T, S, window, D**-0.5 if scale is None else scale, dropout_p)
    # D, BLOCK_D, CAUSAL, HAS_WINDOW, HAS_MASK, HAS_BIAS, DROPOUT and PRECISION are passed by position, which takes the
    # host half as long as passing them by name.
    words = (
        D, max(16, 1 << (D - 1).bit_length()), causal, window > 0, mask is not None, bias is not None, dropout_p > 0,
        precision(q),
    )  # fmt: skip
    return optional, strides, sizes, words


def attention(q, k, v, mask=None, bias=None, seed=None, causal=True, window=0, scale=None, dropout_p=0.0):
    B, T, H, D = q.shape
    out = empty_as(q)
    lse = q.new_empty((B, H, T), dtype=torch.float32)
    if out.numel():
        q, k, v = dense_heads(q, k, v)
        optional, strides, sizes, words = arguments(q, k, v, mask, bias, seed, causal, window, scale, dropout_p)
        M, N, warps, stages = forward_tile(words[1], q.dtype == torch.float32)
        attention_kernel[(-(-T // M) * B * H,)](
            q, k, v, *optional, out, lse, *strides, *sizes, *words, M, N, num_warps=warps, num_stages=stages,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def precision(q):
    """The input_precision of all products of attention. Heads of less than 16 columns do not use tensor cores."""
    return common.precision(q) if q.shape[-1] >= 16 else "ieee"


def objection(q):
    if found := common.objection("attention", q, has_products=True):
        return found
    if not 1 <= q.shape[-1] <= WIDEST:
        return f"attention in Triton covers head sizes of 1 to {WIDEST}, got {q.shape[-1]}"
    return None


def supports(q, k, v, mask=None, bias=None, seed=None, causal=True, window=0, scale=None, dropout_p=0.0):
    return objection(q)


KERNELS = {"attention": (attention, supports)}
