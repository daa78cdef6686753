"""One token per row of logits: the likeliest, or a draw after temperature, top-k, top-p and min-p. A program has a row.

The floor is one read of the logits. The greedy kernel reads them once. A draw reads them twice if there is a list (see
below), otherwise three times.

Top-k and top-p need a cut: the least score that survives. It is found without sorting.
1. One pass over the row gives each lane its greatest score. For top-k, take the k-th greatest of these: at least k
   scores reach it, so that all of the top k do, and few others.
2. A second pass copies the scores that may survive, in the order of the tokens, to a list in memory.
3. The cut in that list is found bit by bit. For each of 32 bits, the scores above or below a trial value are counted
   (top-k) or their weights are added up (top-p).
The token is then drawn from the list.
"""

import torch
import triton
import triton.language as tl

from ..tensors import float64_bits
from .common import objection, philox
from .cross_entropy import LOG2E, _dense_rows

BLOCK, WARPS = 4096, 8  # logits of a tile; if top_k is larger than that, every logit goes to the list
ALIGNED = 16  # a tile begins at a multiple of this many numbers
SIGN = tl.constexpr(0x80000000)


@triton.jit
def _aligned(row_ptr, row, ALIGN: tl.constexpr):
    """(the aligned pointer at or before ``row_ptr + row``, how many numbers lie between the two)."""
    before = (row % ALIGN).to(tl.int32)
    return row_ptr + tl.multiple_of(row - before, ALIGN), before


@triton.jit
def _scores(tile_ptr, at, first, before, end, temperature, BLOCK_V: tl.constexpr):
    """The numbers at ``at``, divided by temperature; -infinity for those outside of ``before`` to ``end``.

    ``at`` is ``first`` + lane. A tile that lies inside is read 16 bytes at a time. Other tiles are read number by
    number, since any of the numbers may be outside.
    """
    if (first >= before) & (first + BLOCK_V <= end):
        x = tl.load(tile_ptr + at).to(tl.float32)
    else:
        x = tl.load(tile_ptr + at, mask=(at >= before) & (at < end), other=float("-inf")).to(tl.float32)
    return tl.div_rn(x, temperature)


@triton.jit
def _order(x):
    """Maps float32 to uint32 in the same order. Both zeros map to one value, and NaN maps to the greatest."""
    x = tl.where(x == 0, 0.0, x)
    bits = x.to(tl.uint32, bitcast=True)
    bits = tl.where(bits >= SIGN, ~bits, bits | SIGN)
    return tl.where(x != x, 0xFFFFFFFF, bits)


@triton.jit
def _bit(i):
    return tl.full([], 1, tl.uint32) << i.to(tl.uint32)


@triton.jit
def _weights(x, top):
    return tl.exp2((x - top) * LOG2E).to(tl.float64)


@triton.jit
def _uniform(seed_ptr, low, high):
    """A float64 in [0, 1) from 53 bits of the Philox 4x32-10 block with counter (low, high), as in ``uniform53``."""
    seed = tl.load(seed_ptr)
    c0, c1 = low.to(tl.uint32), (low >> 32).to(tl.uint32)
    c2, c3 = high.to(tl.uint32), (high >> 32).to(tl.uint32)
    c0, c1, c2, c3 = philox(seed, c0, c1, c2, c3)
    bits = (c0.to(tl.int64) << 21) ^ (c1 >> 11).to(tl.int64)
    return bits.to(tl.float64) * 1.1102230246251565e-16


@triton.jit(do_not_specialize=["V", "T", "stride_tokens_t"])
def penalise_kernel(
    logits_ptr, tokens_ptr, out_ptr, stride_logits_b, stride_tokens_b, stride_tokens_t, V, T, penalty,
    BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Copies a row as float32 and applies the repetition penalty to the logits of earlier tokens.

    A token that occurs several times is penalised once, since the new value is always made from the original logit.
    """
    b = tl.program_id(0).to(tl.int64)
    row_ptr, row_out_ptr = logits_ptr + b * stride_logits_b, out_ptr + b * V
    lane = tl.arange(0, BLOCK_V)
    for first in tl.range(0, V, BLOCK_V):
        inside = first + lane < V
        x = tl.load(row_ptr + first + lane, mask=inside, other=0.0)
        tl.store(row_out_ptr + first + lane, x.to(tl.float32), mask=inside)
    tl.debug_barrier()
    t = tl.arange(0, BLOCK_T)
    for first in tl.range(0, T, BLOCK_T):
        at = tokens_ptr + b * stride_tokens_b + (first + t).to(tl.int64) * stride_tokens_t
        token = tl.load(at, mask=first + t < T, other=-1)
        inside = (token >= 0) & (token < V)
        x = tl.load(row_ptr + token, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(x < 0, x * penalty, tl.div_rn(x, penalty))
        tl.store(row_out_ptr + token, x, mask=inside)


@triton.jit(do_not_specialize=["V"])
def greedy_kernel(logits_ptr, out_ptr, stride_logits_b, V, BLOCK_V: tl.constexpr, ALIGN: tl.constexpr):
    """The token with the greatest logit; of equal ones, the first."""
    b = tl.program_id(0).to(tl.int64)
    tile_ptr, before = _aligned(logits_ptr, b * stride_logits_b, ALIGN)
    end = before + V
    lane = tl.arange(0, BLOCK_V)
    best = tl.zeros([BLOCK_V], tl.uint32)
    where = lane
    for first in tl.range(0, end, BLOCK_V):
        at = first + lane
        order = _order(_scores(tile_ptr, at, first, before, end, 1.0, BLOCK_V))
        better = (at >= before) & (at < end) & (order > best)
        best, where = tl.where(better, order, best), tl.where(better, at, where)
    most = tl.max(best.to(tl.int64), 0).to(tl.uint32)
    tl.store(out_ptr + b, (tl.min(tl.where(best == most, where, end), 0) - before).to(tl.int64))


@triton.jit
def _kth_of_lanes(order, k):
    """The greatest value that at least k of the lanes reach."""
    found = tl.full([], 0, tl.uint32)
    for i in tl.range(0, 32):
        trial = found | _bit(31 - i)
        found = tl.where(tl.sum((order >= trial).to(tl.int32), 0) >= k, trial, found)
    return found


@triton.jit
def _count(list_ptr, n, order, BLOCK_V: tl.constexpr):
    """How many of the n numbers of the list are at least ``order``, which is a value of ``_order``."""
    lane = tl.arange(0, BLOCK_V)
    count = tl.zeros([BLOCK_V], tl.int32)
    for first in tl.range(0, n, BLOCK_V):
        x = _scores(list_ptr, first + lane, first, 0, n, 1.0, BLOCK_V)
        count += ((first + lane < n) & (_order(x) >= order)).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _mass_below(list_ptr, n, order, top, BLOCK_V: tl.constexpr):
    """The sum of the weights of the list's numbers that are less than ``order``."""
    lane = tl.arange(0, BLOCK_V)
    mass = tl.zeros([BLOCK_V], tl.float64)
    for first in tl.range(0, n, BLOCK_V):
        x = _scores(list_ptr, first + lane, first, 0, n, 1.0, BLOCK_V)
        mass += tl.where(_order(x) < order, _weights(x, top), 0.0)
    return tl.sum(mass, 0)


@triton.jit
def _keep_top_k(list_ptr, n, k, BLOCK_V: tl.constexpr):
    """Sets the numbers of the list that are less than the k-th greatest to -infinity."""
    cut = tl.full([], 0, tl.uint32)
    for i in tl.range(0, 32):
        trial = cut | _bit(31 - i)
        cut = tl.where(_count(list_ptr, n, trial, BLOCK_V) >= k, trial, cut)
    lane = tl.arange(0, BLOCK_V)
    for first in tl.range(0, n, BLOCK_V):
        inside = first + lane < n
        x = _scores(list_ptr, first + lane, first, 0, n, 1.0, BLOCK_V)
        tl.store(list_ptr + first + lane, float("-inf"), mask=inside & (_order(x) < cut))


@triton.jit
def _keep_top_p(list_ptr, n, top, dropped, share, BLOCK_V: tl.constexpr):
    """Sets the least numbers of the list to -infinity, as many as together have at most ``share`` of the total weight.

    Equal scores are taken in the order of their tokens. ``dropped`` is the weight of the scores that are not in the
    list; they are less than all scores in it.
    """
    limit = (dropped + _mass_below(list_ptr, n, 0xFFFFFFFF, top, BLOCK_V)) * share
    cut = tl.full([], 0, tl.uint32)
    below = dropped
    for i in tl.range(0, 32):
        trial = cut | _bit(31 - i)
        mass = dropped + _mass_below(list_ptr, n, trial, top, BLOCK_V)
        fits = (mass <= limit) & (trial <= _order(top))
        cut, below = tl.where(fits, trial, cut), tl.where(fits, mass, below)
    most = _count(list_ptr, n, _order(top), BLOCK_V)
    lane = tl.arange(0, BLOCK_V)
    alike = tl.full([], 0, tl.int32)
    for first in tl.range(0, n, BLOCK_V):
        inside = first + lane < n
        x = _scores(list_ptr, first + lane, first, 0, n, 1.0, BLOCK_V)
        order = _order(x)
        ties = (inside & (order == cut)).to(tl.int32)
        rank = alike + tl.cumsum(ties, 0)  # of equal scores the first go first; the last of the greatest always stays
        fits = below + rank.to(tl.float64) * _weights(x, top) <= limit
        goes = (order < cut) | ((ties > 0) & fits & ((cut < _order(top)) | (rank < most)))
        tl.store(list_ptr + first + lane, float("-inf"), mask=inside & goes)
        alike += tl.sum(ties, 0)


@triton.jit
def _draw(tile_ptr, before, end, temperature, top, uniform, min_p, BLOCK_V: tl.constexpr):
    """The first place, counted from ``before``, at which the running sum of the weights exceeds ``uniform`` times their
    total. Weights below min_p, of which the greatest is 1, count as 0."""
    lane = tl.arange(0, BLOCK_V)
    mass = tl.zeros([BLOCK_V], tl.float64)
    for first in tl.range(0, end, BLOCK_V):
        w = _weights(_scores(tile_ptr, first + lane, first, before, end, temperature, BLOCK_V), top)
        mass += tl.where(w >= min_p, w, 0.0)
    wanted = uniform * tl.sum(mass, 0)
    sum_before = tl.full([], 0.0, tl.float64)
    place = tl.full([], 0, tl.int32)
    for first in tl.range(0, end, BLOCK_V):
        at = first + lane
        w = _weights(_scores(tile_ptr, at, first, before, end, temperature, BLOCK_V), top)
        w = tl.where(w >= min_p, w, 0.0)
        passed = (sum_before + tl.cumsum(w, 0) <= wanted) & (at >= before) & (at < end)
        place += tl.sum(passed.to(tl.int32), 0)
        sum_before += tl.sum(w, 0)
    return tl.minimum(place, end - before - 1)


@triton.jit(do_not_specialize=["V", "top_k", "share_bits"])
def sample_kernel(
    logits_ptr, seed_ptr, positions_ptr, rows_ptr, out_ptr, list_ptr, ids_ptr, stride_logits_b, stride_list_b, V,
    temperature, top_k, share_bits, min_p,
    HAS_ROWS: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK_V: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    tile_ptr, before = _aligned(logits_ptr, b * stride_logits_b, ALIGN)
    end = before + V
    lane = tl.arange(0, BLOCK_V)
    best = tl.full([BLOCK_V], float("-inf"), tl.float32)
    for first in tl.range(0, end, BLOCK_V):
        best = tl.maximum(best, _scores(tile_ptr, first + lane, first, before, end, temperature, BLOCK_V))
    top = tl.max(best, 0)
    high = b
    if HAS_ROWS:
        high = tl.load(rows_ptr + b)
    uniform = _uniform(seed_ptr, tl.load(positions_ptr + b), high)
    if not (TOP_K or TOP_P):
        place = _draw(tile_ptr, before, end, temperature, top, uniform, min_p, BLOCK_V)
        tl.store(out_ptr + b, place.to(tl.int64))
    else:
        share = tl.full([], share_bits, tl.int64).to(tl.float64, bitcast=True)
        bound = tl.full([], 0, tl.uint32)
        if TOP_K:
            if top_k <= BLOCK_V:
                bound = _kth_of_lanes(_order(best), top_k)
        else:  # the greatest weight is 1, so that the weights below share / V together are less than share of the total
            bound = _order(top + tl.log((share / V).to(tl.float32)) - 0.01)
        list_ptr += b * stride_list_b
        ids_ptr += b * stride_list_b
        n = tl.full([], 0, tl.int32)
        dropped = tl.zeros([BLOCK_V], tl.float64)
        for first in tl.range(0, end, BLOCK_V):
            at = first + lane
            x = _scores(tile_ptr, at, first, before, end, temperature, BLOCK_V)
            stays = (at >= before) & (at < end) & (_order(x) >= bound)
            place = n + tl.cumsum(stays.to(tl.int32), 0) - 1
            tl.store(list_ptr + place, x, mask=stays)
            tl.store(ids_ptr + place, at - before, mask=stays)
            n += tl.sum(stays.to(tl.int32), 0)
            if not TOP_K:
                dropped += tl.where(stays, 0.0, _weights(x, top))
        tl.debug_barrier()
        if TOP_K:
            _keep_top_k(list_ptr, n, top_k, BLOCK_V)
        if TOP_P:
            _keep_top_p(list_ptr, n, top, tl.sum(dropped, 0), share, BLOCK_V)
        place = _draw(list_ptr, 0, n, 1.0, top, uniform, min_p, BLOCK_V)
        tl.store(out_ptr + b, tl.load(ids_ptr + place).to(tl.int64))


def sample(
    logits, seed, positions, tokens=None, rows=None, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
    repetition_penalty=1.0,
):  # fmt: skip
    B, V = logits.shape
    out = positions.new_empty(B)
    if not B:
        return out
    if tokens is not None and repetition_penalty != 1:
        changed = logits.new_empty((B, V), dtype=torch.float32)
        logits = _dense_rows(logits)
        penalise_kernel[(B,)](
            logits, tokens, changed, logits.stride(0), *tokens.stride(), V, tokens.shape[1], repetition_penalty,
            BLOCK, 256, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        logits = changed
    logits = _dense_rows(logits)
    if temperature == 0:
        greedy_kernel[(B,)](logits, out, logits.stride(0), V, BLOCK, ALIGNED, num_warps=WARPS, enable_fp_fusion=True)
        return out
    has_top_k, has_top_p = 0 < top_k < V, top_p < 1
    kept = -(-V // ALIGNED) * ALIGNED if has_top_k or has_top_p else 0
    list_, ids = (logits.new_empty((B, kept), dtype=dtype) for dtype in (torch.float32, torch.int32))
    sample_kernel[(B,)](
        logits, seed, positions.contiguous(), out if rows is None else rows.contiguous(), out, list_, ids,
        logits.stride(0), kept, V, temperature, top_k, float64_bits(1 - top_p), min_p, rows is not None, has_top_k,
        has_top_p, BLOCK, ALIGNED, num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def supports(
    logits, seed, positions, tokens=None, rows=None, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
    repetition_penalty=1.0,
):  # fmt: skip
    if found := objection("sample", logits):
        return found
    return None if logits.shape[1] < 2**31 - BLOCK else f"it covers up to 2^31 - {BLOCK} columns"


KERNELS = {"sample": (sample, supports)}
