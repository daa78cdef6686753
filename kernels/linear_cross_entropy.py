"""cross_entropy(x @ weight^T, targets) in chunks of rows. Gradients of the logits are written over the logits.

gpt2fast/head_and_loss.py loops over the chunks, so that the logits of only one chunk are in memory. The products are
those of ``linear``: PyTorch's, except where a GPU has measured the Triton kernel to be faster. The kernel of this file
does the rest. A program has one row of logits. It reads the row once for the loss and, if gradients are wanted, a
second time to write the gradient over it.
"""

from functools import partial

import triton
import triton.language as tl

from gpt2fast import head_and_loss

from .common import objection
from .cross_entropy import LOG2E, _add_tile, _total_of_rows
from .linear import is_slower, prepare

BLOCK, WARPS = 4096, 8  # columns of a tile; warps


@triton.jit(do_not_specialize=["V", "ignore_index"])
def loss_and_gradient_kernel(
    logits_ptr, targets_ptr, loss_ptr, lse_ptr, dloss_ptr, stride_logits_r, stride_dloss, V, ignore_index,
    label_smoothing, SMOOTHING: tl.constexpr, GRADIENT: tl.constexpr, SCALED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The loss of each row, and its gradient where GRADIENT is set (times dloss where SCALED is set).

    A row has ``stride_logits_r`` columns in memory, a multiple of 16 bytes. The first V columns are logits; the
    gradient of the other columns is 0.
    """
    r = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + r * stride_logits_r
    lane = tl.arange(0, BLOCK_V)
    target = tl.load(targets_ptr + r)
    known = (target >= 0) & (target < V)
    at_target = tl.load(row_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    peak = tl.full([BLOCK_V], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    plain = tl.zeros([BLOCK_V], tl.float32)
    for first in tl.range(0, V, BLOCK_V):
        x = tl.load(row_ptr + first + lane, mask=first + lane < stride_logits_r, other=0.0)
        peak, total, plain = _add_tile(peak, total, plain, x, first + lane < V, SMOOTHING)
    top = tl.max(peak, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total_of_row = tl.sum(total * tl.exp2((peak - shift) * LOG2E), 0)
    log_total = tl.log(total_of_row)
    # The loss is a sum of differences from the greatest logit, which keep their digits however large the logits are.
    loss = (shift - at_target) + log_total
    if SMOOTHING:
        mean = tl.sum(plain, 0) / V
        loss = (1 - label_smoothing) * loss + label_smoothing * (shift - mean + log_total)
    tl.store(loss_ptr + r, tl.where(target == ignore_index, 0.0, loss))
    tl.store(lse_ptr + r, shift + log_total)
    if GRADIENT:
        scale = tl.load(dloss_ptr + r * stride_dloss) if SCALED else 1.0
        scale = tl.where(target == ignore_index, 0.0, scale)
        uniform = label_smoothing / V
        inverse = 1 / total_of_row
        for first in tl.range(0, V, BLOCK_V):
            inside = first + lane < stride_logits_r
            x = tl.load(row_ptr + first + lane, mask=inside, other=0.0).to(tl.float32)
            p = tl.exp2((x - top) * LOG2E) * inverse - uniform
            p = tl.where(first + lane == target, p - (1 - label_smoothing), p)
            p = tl.where(first + lane < V, scale * p, 0.0)
            tl.store(row_ptr + first + lane, p.to(logits_ptr.dtype.element_ty), mask=inside)


def row(logits, targets, loss, lse, dloss, stride_dloss, V, ignore_index, label_smoothing, gradients):
    """Launches the kernel for a chunk of logits: the ``row`` that gpt2fast/head_and_loss.py describes."""
    loss_and_gradient_kernel[(logits.shape[0],)](
        logits, targets, loss, lse, loss if dloss is None else dloss, logits.stride(0), stride_dloss, V, ignore_index,
        label_smoothing, label_smoothing > 0, gradients, dloss is not None, BLOCK,
        num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip


def _objection(x, weight):
    if found := objection("linear cross entropy", x, has_products=True):
        return found
    return None if len(weight) < 2**31 - BLOCK else f"it covers up to 2^31 - {BLOCK} columns"


def supports(x, weight, targets, ignore_index=-100, label_smoothing=0.0, reduction="mean", keep="none"):
    return _objection(x, weight)


def supports_backward(
    dloss, x, weight, targets, lse, ignore_index=-100, label_smoothing=0.0, reduction="mean", want="dx dweight"
):
    return _objection(x, weight)


_product = head_and_loss.product_of("triton", prepare, is_slower)
linear_cross_entropy = partial(head_and_loss.linear_cross_entropy, _product, row, _total_of_rows)
linear_cross_entropy_backward = partial(head_and_loss.linear_cross_entropy_backward, _product, row)
KERNELS = {
    "linear_cross_entropy": (linear_cross_entropy, supports),
    "linear_cross_entropy_backward": (linear_cross_entropy_backward, supports_backward),
}
