import torch
import torch.nn.functional as F
from torch import Tensor

from ..op import op
from .common import widen

REDUCTION = "none | mean | sum"
VALUES = dict(targets="[0, V) or ignore_index", label_smoothing="[0, 1]", reduction=REDUCTION)


def targets_of_rows(shape, case, g):
    """Random targets; every third row is ignored."""
    targets = torch.randint(0, case["V"], shape, generator=g)
    return torch.where(torch.arange(shape[0]) % 3 == 2, case.get("ignore_index", -100), targets)


CASES = [
    dict(R=1, V=50257),
    dict(R=128, V=50257),
    dict(R=64, V=50257, reduction="sum", label_smoothing=0.1),
    dict(R=33, V=771, reduction="none", label_smoothing=0.2, ignore_index=3),
    dict(R=4, V=7, reduction="mean", label_smoothing=0.1),
    dict(R=4, V=7, reduction="none"),
    dict(R=4, V=7, reduction="sum", ignore_index=2),
    dict(R=0, V=50257, reduction="sum"),
]


def _baseline(logits, targets, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    return F.cross_entropy(
        logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
    )


def _naive(logits, targets, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    log_probabilities = logits - logits.logsumexp(1, keepdim=True)
    counts = targets != ignore_index
    at_target = log_probabilities.gather(1, torch.where(counts, targets, 0)[:, None])[:, 0]
    loss = -(1 - label_smoothing) * at_target
    if label_smoothing > 0:
        loss = loss - label_smoothing * log_probabilities.mean(1)
    loss = torch.where(counts, loss, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / counts.sum() if reduction == "mean" else loss.sum()


@op(
    shapes=dict(logits="R V", targets="R: int64"),
    returns="loss",
    saves="lse",
    cases=CASES,
    make=dict(targets=targets_of_rows),
    flops=lambda n: 4 * n["R"] * n["V"],
    autocast="widest",
    values=VALUES,  # no fused=: F.cross_entropy returns no lse, and computing that costs as much as the reference
    baseline=_baseline,
    naive=_naive,
)
def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """loss = lse - (1 - e) logits[target] - e mean(logits) per row, e the label smoothing; lse = log sum exp(logits).

    Args: logits (R, V); targets (R,), int64 in [0, V) or ignore_index (loss 0, not counted); label_smoothing in [0, 1];
    reduction ``"none"``, ``"mean"`` over the rows that count (NaN without any, as in PyTorch) or ``"sum"``.
    Returns: loss (R,) or (), float32. Kept for the backward pass: lse (R,), float32.
    """
    wide = widen(logits)
    lse = torch.logsumexp(wide, dim=1)
    counts = targets != ignore_index
    at_target = wide.gather(1, torch.where(counts, targets, 0)[:, None])[:, 0]
    loss = lse - (1 - label_smoothing) * at_target
    if label_smoothing > 0:
        loss = loss - label_smoothing * wide.mean(1)
    loss = torch.where(counts, loss, 0.0)
    if reduction == "mean":
        loss = loss.sum() / counts.sum()
    elif reduction == "sum":
        loss = loss.sum()
    return loss, lse


def dloss_shape(args):
    return "R: float32" if args.get("reduction", "mean") == "none" else ": float32"


def _fused_backward(dloss, logits, targets, lse, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    counts = targets != ignore_index
    scale = torch.where(counts, dloss / counts.sum() if reduction == "mean" else dloss, 0.0)[:, None]
    index = torch.where(counts, targets, 0)[:, None]
    dlogits = torch.softmax(logits, 1)
    p = dlogits.gather(1, index).to(lse.dtype)
    # At the target, p - 1 loses all digits where p is near 1. There, minus the sum of the other probabilities is used.
    others = dlogits.scatter_(1, index, 0.0).sum(1, keepdim=True, dtype=torch.float64).to(lse.dtype)
    at_target = label_smoothing * (1 - 1 / logits.shape[1]) - torch.where(p < 0.5, 1 - p, others)
    if label_smoothing > 0:
        dlogits -= label_smoothing / logits.shape[1]
    dlogits *= scale.to(logits.dtype)
    return dlogits.scatter_(1, index, (at_target * scale).to(logits.dtype)).contiguous()


@op(
    shapes=dict(dloss=dloss_shape, logits="R V", targets="R: int64", lse="R: float32"),
    returns="dlogits",
    cases=CASES,
    make=dict(targets=targets_of_rows),
    flops=lambda n: 4 * n["R"] * n["V"],
    derivative_of=cross_entropy,
    values=dict(reduction=REDUCTION),
    fused=_fused_backward,
)
def cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """dlogits = dloss (softmax(logits) - (1 - e) onehot(target) - e / V), 0 in ignored rows.

    Args: dloss (R,) or (), lse (R,), float32; the rest as for cross_entropy. Returns: (R, V) in logits' dtype.
    """
    wide, V = widen(logits), logits.shape[1]
    counts = targets != ignore_index
    scale = dloss / counts.sum() if reduction == "mean" else dloss
    scale = torch.where(counts, scale, 0.0)[:, None]
    # This is not computed as exp(logits - lse). Where lse is large, the error of its rounding is too large for that.
    dlogits = torch.softmax(wide, 1) - label_smoothing / V
    onehot = torch.arange(V, device=logits.device) == targets[:, None]
    dlogits = torch.where(onehot, dlogits - (1 - label_smoothing), dlogits)
    return (dlogits * scale).to(logits.dtype).contiguous()


@cross_entropy.backward("logits targets lse", through=[cross_entropy_backward])
def _(saved, grad):
    dlogits = cross_entropy_backward(
        grad.loss, saved.logits, saved.targets, saved.lse, saved.ignore_index, saved.label_smoothing, saved.reduction
    )
    return dict(logits=dlogits)
