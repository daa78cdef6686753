"""Cross entropy of each row of logits (R, V) with label smoothing e, and its gradient.

    lse = log sum exp(logits)        loss = lse - (1 - e) logits[target] - e avg(logits)
    dlogits = dloss (softmax(logits) - (1 - e) onehot(target) - e / V)

A program has one row. The floor is memory traffic: each logit is read once forward; backward it is read once and its
gradient is written once. Forward, every lane keeps the greatest logit that it has seen and the sum of exponentials
relative to it. So one pass over the row is enough, and the lanes are joined once, at its end.
docs/kernels.md counts 1.00 to 1.01 times the least bytes.

A row of 50257 columns, as GPT-2 has, usually does not begin at an aligned address. The first and the last tile are
therefore partial, and all tiles between them are aligned.
"""

import torch
import triton
import triton.language as tl

from .common import objection

LOG2E = tl.constexpr(1.4426950408889634)
BLOCK, WARPS, ALIGNED = 4096, 8, 8  # columns of a tile; warps; a tile begins at a multiple of ALIGNED columns
# Above this |lse|, the rounding of lse to 24 bits may change e^(logit - lse) by more than 1.5e-5 of its value.
LARGE = tl.constexpr(256.0)


@triton.jit
def _add_tile(peak, total, plain, x, inside, SMOOTHING: tl.constexpr):
    x = x.to(tl.float32)
    seen = tl.where(inside, x, float("-inf"))
    new_peak = tl.maximum(peak, seen)
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    total = total * tl.exp2((peak - shift) * LOG2E) + tl.exp2((seen - shift) * LOG2E)
    if SMOOTHING:
        plain += tl.where(inside, x, 0.0)
    return new_peak, total, plain


@triton.jit(do_not_specialize=["V", "ignore_index"])
def cross_entropy_kernel(
    logits_ptr, targets_ptr, loss_ptr, lse_ptr, stride_logits_r, V, ignore_index, label_smoothing,
    SMOOTHING: tl.constexpr, BLOCK_V: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    row = r * stride_logits_r
    # The first tile begins at the last multiple of ALIGN columns up to the row's start. The ``before`` columns in front
    # of the row are masked and not read.
    before = (row % ALIGN).to(tl.int32)
    tile_ptr = logits_ptr + tl.multiple_of(row - before, ALIGN)
    lane = tl.arange(0, BLOCK_V)
    end = before + V
    peak = tl.full([BLOCK_V], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    plain = tl.zeros([BLOCK_V], tl.float32)
    inside = (lane >= before) & (lane < end)
    x = tl.load(tile_ptr + lane, mask=inside, other=0.0)
    peak, total, plain = _add_tile(peak, total, plain, x, inside, SMOOTHING)
    whole = tl.maximum(end // BLOCK_V * BLOCK_V, BLOCK_V)
    for first in tl.range(BLOCK_V, whole, BLOCK_V):
        x = tl.load(tile_ptr + first + lane)
        peak, total, plain = _add_tile(peak, total, plain, x, lane >= 0, SMOOTHING)
    if whole < end:
        inside = whole + lane < end
        x = tl.load(tile_ptr + whole + lane, mask=inside, other=0.0)
        peak, total, plain = _add_tile(peak, total, plain, x, inside, SMOOTHING)
    top = tl.max(peak, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    log_total = tl.log(tl.sum(total * tl.exp2((peak - shift) * LOG2E), 0))
    target = tl.load(targets_ptr + r)
    known = (target >= 0) & (target < V)
    # The loss is a sum of differences from the greatest logit, which keep their digits however large the logits are.
    loss = (shift - tl.load(logits_ptr + row + target, mask=known, other=float("nan")).to(tl.float32)) + log_total
    if SMOOTHING:
        mean = tl.sum(plain, 0) / V
        loss = (1 - label_smoothing) * loss + label_smoothing * (shift - mean + log_total)
    tl.store(loss_ptr + r, tl.where(target == ignore_index, 0.0, loss))
    tl.store(lse_ptr + r, shift + log_total)


@triton.jit
def _top_and_log2_total(tile_ptr, lane, before, end, BLOCK_V: tl.constexpr):
    """(top, log2 of the sum of e^(logit - top)) of a row, with top its greatest logit."""
    peak = tl.full([BLOCK_V], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    for first in tl.range(0, end, BLOCK_V):
        inside = (first + lane >= before) & (first + lane < end)
        x = tl.load(tile_ptr + first + lane, mask=inside, other=0.0)
        peak, total, _ = _add_tile(peak, total, total, x, inside, False)
    top = tl.max(peak, 0)
    return top, tl.log2(tl.sum(total * tl.exp2((peak - top) * LOG2E), 0))


@triton.jit
def _gradient(x, shift, log2_total, target, first, lane, before, scale, uniform, label_smoothing):
    p = tl.exp2((x.to(tl.float32) - shift) * LOG2E - log2_total) - uniform
    return scale * tl.where(first + lane - before == target, p - (1 - label_smoothing), p)


@triton.jit(do_not_specialize=["V", "ignore_index"])
def cross_entropy_backward_kernel(
    dloss_ptr, logits_ptr, targets_ptr, lse_ptr, count_ptr, dlogits_ptr, stride_dloss, stride_logits_r, V,
    ignore_index, label_smoothing, MEAN: tl.constexpr, DENSE: tl.constexpr, BLOCK_V: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """DENSE: logits is contiguous, as dlogits is, so that the tiles of both are aligned at the same columns."""
    r = tl.program_id(0).to(tl.int64)
    row = r * V
    before = (row % ALIGN).to(tl.int32)
    out_ptr = dlogits_ptr + tl.multiple_of(row - before, ALIGN)
    tile_ptr = logits_ptr + r * stride_logits_r - before
    if DENSE:
        tile_ptr = logits_ptr + tl.multiple_of(row - before, ALIGN)
    lane = tl.arange(0, BLOCK_V)
    end = before + V
    target = tl.load(targets_ptr + r)
    lse = tl.load(lse_ptr + r)
    scale = tl.load(dloss_ptr + r * stride_dloss)
    if MEAN:
        scale = scale / tl.load(count_ptr).to(tl.float32)
    scale = tl.where(target == ignore_index, 0.0, scale)
    uniform = label_smoothing / V
    # p = e^(x - lse). A large lse has no digits left for the log of the sum. The row is then read twice: first for its
    # greatest logit and the sum, which together stand for lse.
    shift = lse
    log2_total = 0.0
    if tl.abs(lse) > LARGE:
        shift, log2_total = _top_and_log2_total(tile_ptr, lane, before, end, BLOCK_V)
    inside = (lane >= before) & (lane < end)
    x = tl.load(tile_ptr + lane, mask=inside, other=0.0)
    dx = _gradient(x, shift, log2_total, target, 0, lane, before, scale, uniform, label_smoothing)
    tl.store(out_ptr + lane, dx.to(dlogits_ptr.dtype.element_ty), mask=inside)
    whole = tl.maximum(end // BLOCK_V * BLOCK_V, BLOCK_V)
    for first in tl.range(BLOCK_V, whole, BLOCK_V):
        x = tl.load(tile_ptr + first + lane)
        dx = _gradient(x, shift, log2_total, target, first, lane, before, scale, uniform, label_smoothing)
        tl.store(out_ptr + first + lane, dx.to(dlogits_ptr.dtype.element_ty))
    if whole < end:
        inside = whole + lane < end
        x = tl.load(tile_ptr + whole + lane, mask=inside, other=0.0)
        dx = _gradient(x, shift, log2_total, target, whole, lane, before, scale, uniform, label_smoothing)
        tl.store(out_ptr + whole + lane, dx.to(dlogits_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R", "ignore_index"])
def cross_entropy_sum_kernel(
    loss_ptr, targets_ptr, out_ptr, R, ignore_index, MEAN: tl.constexpr, BLOCK_R: tl.constexpr
):
    """One program adds up the losses of all rows in a fixed order. MEAN: divided by the number of rows that count."""
    lane = tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_R], tl.float32)
    count = tl.zeros([BLOCK_R], tl.int32)
    for first in tl.range(0, R, BLOCK_R):
        r = first + lane
        total += tl.load(loss_ptr + r, mask=r < R, other=0.0)
        if MEAN:
            targets = tl.load(targets_ptr + r, mask=r < R, other=0)
            count += ((targets != ignore_index) & (r < R)).to(tl.int32)
    loss = tl.sum(total, 0)
    if MEAN:
        loss = loss / tl.sum(count, 0).to(tl.float32)
    tl.store(out_ptr, loss)


def _dense_rows(logits):
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def cross_entropy(logits, targets, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    R, V = logits.shape
    loss, lse = logits.new_empty(R, dtype=torch.float32), logits.new_empty(R, dtype=torch.float32)
    logits, targets = _dense_rows(logits), targets.contiguous()
    if R:
        cross_entropy_kernel[(R,)](
            logits, targets, loss, lse, logits.stride(0), V, ignore_index, label_smoothing, label_smoothing > 0,
            BLOCK, ALIGNED, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return (loss if reduction == "none" else _total_of_rows(loss, targets, ignore_index, reduction)), lse


def _total_of_rows(loss, targets, ignore_index, reduction):
    total = loss.new_empty(())
    cross_entropy_sum_kernel[(1,)](
        loss, targets, total, loss.shape[0], ignore_index, reduction == "mean", 1024, num_warps=8, enable_fp_fusion=True
    )
    return total


def cross_entropy_backward(dloss, logits, targets, lse, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    R, V = logits.shape
    dlogits = logits.new_empty((R, V))
    if R:
        logits, targets = _dense_rows(logits), targets.contiguous()
        count = (targets != ignore_index).sum() if reduction == "mean" else targets
        stride = dloss.stride(0) if reduction == "none" else 0
        cross_entropy_backward_kernel[(R,)](
            dloss, logits, targets, lse.contiguous(), count, dlogits, stride, logits.stride(0), V, ignore_index,
            label_smoothing, reduction == "mean", logits.is_contiguous(), BLOCK, ALIGNED, num_warps=WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
    return dlogits


def _objection(logits):
    if found := objection("cross entropy", logits):
        return found
    return None if logits.shape[1] < 2**31 - BLOCK else f"it covers up to 2^31 - {BLOCK} columns"


def supports(logits, targets, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    return _objection(logits)


def supports_backward(dloss, logits, targets, lse, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    return _objection(logits)


KERNELS = {
    "cross_entropy": (cross_entropy, supports),
    "cross_entropy_backward": (cross_entropy_backward, supports_backward),
}
