"""cross_entropy and its gradient by csrc/cuda/cross_entropy.cu."""

import torch

from ..tensors import dense_rows
from .library import DTYPES, call, objection

SOURCE = "cross_entropy.cu"
MOST_COLUMNS = 2**31 - 1 - 16384  # kMostColumns in csrc/cuda/cross_entropy.cuh


def cross_entropy(logits, targets, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    R, V = logits.shape
    loss, lse = logits.new_empty(R, dtype=torch.float32), logits.new_empty(R, dtype=torch.float32)
    logits, stride = dense_rows(logits)
    targets = targets.contiguous()
    call(
        SOURCE, "gpt2fast_cross_entropy", logits, targets, loss, lse, R, V, stride, ignore_index,
        float(label_smoothing), DTYPES[logits.dtype],
    )  # fmt: skip
    if reduction == "none":
        return loss, lse
    return total_of_rows(loss, targets, ignore_index, reduction), lse


def total_of_rows(loss, targets, ignore_index, reduction):
    """The sum or the mean () of the rows' losses (R,)."""
    total, mean = loss.new_empty(()), int(reduction == "mean")
    call(SOURCE, "gpt2fast_cross_entropy_reduce", loss, targets, total, loss.shape[0], ignore_index, mean)
    return total


def cross_entropy_backward(dloss, logits, targets, lse, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    R, V = logits.shape
    dlogits = logits.new_empty((R, V))
    scale = dloss.new_empty(()) if reduction == "mean" else None  # workspace: the gradient of each row's loss
    stride_dloss = dloss.stride(0) if reduction == "none" else 0
    logits, stride = dense_rows(logits)
    call(
        SOURCE, "gpt2fast_cross_entropy_backward", dloss, logits, targets.contiguous(), lse.contiguous(), dlogits,
        scale, R, V, stride_dloss, stride, ignore_index, float(label_smoothing), int(reduction == "mean"),
        DTYPES[logits.dtype],
    )  # fmt: skip
    return dlogits


def _objection(logits):
    if found := objection("cross entropy", logits):
        return found
    return None if logits.shape[1] <= MOST_COLUMNS else f"cross entropy in CUDA covers up to {MOST_COLUMNS} columns"


def supports(logits, targets, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    return _objection(logits)


def supports_backward(dloss, logits, targets, lse, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    return _objection(logits)


KERNELS = {
    "cross_entropy": (cross_entropy, supports),
    "cross_entropy_backward": (cross_entropy_backward, supports_backward),
}
