"""linear_cross_entropy and its gradients, by products of matrices and csrc/cuda/linear_cross_entropy.cu.

gpt2fast/head_and_loss.py puts them together.
"""

from functools import partial

from .. import head_and_loss
from .cross_entropy import MOST_COLUMNS as MOST_OF_A_ROW
from .cross_entropy import total_of_rows
from .library import DTYPES, call, objection
from .linear import is_slower, prepare

SOURCE = "linear_cross_entropy.cu"
MOST_COLUMNS = MOST_OF_A_ROW - head_and_loss.ALIGNED  # leaves room for the columns that pad a row


def row(logits, targets, loss, lse, dloss, stride_dloss, V, ignore_index, label_smoothing, gradients):
    """``row`` of head_and_loss.py: passes the fields of LinearCrossEntropyArgs in csrc/ops.h, in their order."""
    call(
        SOURCE, "gpt2fast_linear_cross_entropy", logits, targets, loss, lse, dloss, logits.shape[0], V,
        logits.stride(0), stride_dloss, ignore_index, float(label_smoothing), int(gradients), DTYPES[logits.dtype],
    )  # fmt: skip


def _objection(x, weight):
    if found := objection("linear cross entropy", x):
        return found
    return None if len(weight) <= MOST_COLUMNS else f"linear cross entropy in CUDA covers up to {MOST_COLUMNS} columns"


def supports(x, weight, targets, ignore_index=-100, label_smoothing=0.0, reduction="mean", keep="none"):
    return _objection(x, weight)


def supports_backward(
    dloss, x, weight, targets, lse, ignore_index=-100, label_smoothing=0.0, reduction="mean", want="dx dweight"
):
    return _objection(x, weight)


_product = head_and_loss.product_of("cuda", prepare, is_slower)
linear_cross_entropy = partial(head_and_loss.linear_cross_entropy, _product, row, total_of_rows)
linear_cross_entropy_backward = partial(head_and_loss.linear_cross_entropy_backward, _product, row)
KERNELS = {
    "linear_cross_entropy": (linear_cross_entropy, supports),
    "linear_cross_entropy_backward": (linear_cross_entropy_backward, supports_backward),
}
