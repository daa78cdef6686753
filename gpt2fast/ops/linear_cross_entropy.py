from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..op import op
from .common import multiply, wide_dtype
from .cross_entropy import REDUCTION, VALUES, cross_entropy, cross_entropy_backward, dloss_shape, targets_of_rows
from .linear import linear

GRADIENTS = dict(none="", dx="dx", dweight="dweight", both="dx dweight")  # what each value of ``keep`` computes
KEEP = " | ".join(GRADIENTS)
# The largest number of rows of a chunk, the rows whose logits are in memory at a time. With dweight it is larger,
# because each chunk reads and writes all of dweight.
MOST_ROWS = 4096  # with dweight
FEW_ROWS = 1024  # without dweight


def _weight(shape, case, g):
    """Random normals divided by sqrt(K), so that the logits are of order one."""
    return torch.randn(shape, generator=g) * case["K"] ** -0.5


CASES = [
    dict(R=24, K=40, V=50257, keep="both"),
    dict(R=5, K=96, V=50257),
    dict(R=2100, K=4, V=13, label_smoothing=0.1),
    dict(R=37, K=70, V=771, keep="both", reduction="sum", ignore_index=3),
    dict(R=37, K=64, V=129, reduction="none", label_smoothing=0.2),
    dict(R=5, K=33, V=64, keep="dx"),
    dict(R=3, K=5, V=7, keep="dweight", label_smoothing=0.1),
    dict(R=3, K=5, V=7, reduction="sum"),
    dict(R=3, K=5, V=7, reduction="none", keep="both"),
    dict(R=0, K=8, V=21, reduction="sum", keep="both"),
]


def chunks(rows: int, want: str) -> list[slice | None]:
    """Splits the rows into chunks of about the same size. A single chunk of all rows is None instead of a slice."""
    most = MOST_ROWS if "dweight" in want else FEW_ROWS
    if 0 < rows <= most:
        return [None]
    size = -(-rows // max(-(-rows // most), 1))
    return [slice(first, min(first + size, rows)) for first in range(0, rows, max(size, 1))]


def part(x: Tensor, rows: slice | None) -> Tensor:
    """These rows of x. For None it returns x itself: a view would cost the host as much time as a launch."""
    return x if rows is None else x[rows]


def accumulate(
    x: Tensor, weight: Tensor, want: str, dlogits_of: Callable[[slice | None], Tensor], product: Callable = multiply
) -> tuple[Tensor, Tensor]:
    """Computes dx (R, K) and dweight (V, K) in float32, over chunks of rows. Those not in ``want`` are (0,).

    ``dlogits_of`` is called for every chunk, even if no gradient is wanted. Where one is, it returns the gradients of
    the logits (rows, V) in x's dtype. x and weight are contiguous.
    """
    wanted, wide = want.split(), wide_dtype(x)
    dx = torch.empty_like(x, dtype=wide) if "dx" in wanted else x.new_empty(0, dtype=wide)
    dweight = torch.empty_like(weight, dtype=wide) if "dweight" in wanted else x.new_empty(0, dtype=wide)
    parts = chunks(x.shape[0], want)
    if not parts:
        dweight.zero_()
    for i, rows in enumerate(parts):
        dlogits = dlogits_of(rows)
        if "dx" in wanted:
            product(dlogits, weight, part(dx, rows))
        if "dweight" in wanted:
            product(dlogits.t(), part(x, rows), dweight, add=i > 0)
    return dx, dweight


def reduced(loss: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Reduces the losses of the rows (R,), which are 0 for ignored rows, as ``reduction`` says."""
    if reduction == "none":
        return loss
    return loss.sum() / (targets != ignore_index).sum() if reduction == "mean" else loss.sum()


def scaled(gradients, dloss, targets, ignore_index, reduction, dtype) -> list[Tensor]:
    """Converts gradients of the sum of the losses to those of their sum or mean, for ``dloss`` (), in ``dtype``."""
    if reduction == "mean":
        dloss = dloss / (targets != ignore_index).sum().clamp(min=1)  # if all rows are ignored, the gradients are 0
    return [torch.mul(g, dloss, out=g.new_empty(g.shape, dtype=dtype)) for g in gradients]


def _fused(x, weight, targets, ignore_index=-100, label_smoothing=0.0, reduction="mean", keep="none"):
    want = GRADIENTS[keep] if reduction != "none" else ""
    x, weight = x.contiguous(), weight.contiguous()
    loss, lse = (x.new_empty(len(x), dtype=wide_dtype(x)) for _ in range(2))

    def dlogits_of(rows: slice | None) -> Tensor | None:
        logits = linear(part(x, rows), weight, transposed=True)
        given = logits, part(targets, rows)
        found = cross_entropy.overload(*given, ignore_index, label_smoothing, "none")
        for whole, of_rows in zip((loss, lse), found):
            part(whole, rows).copy_(of_rows)
        if not want:
            return None
        ones = loss.new_ones(()).expand(len(logits))
        return cross_entropy_backward(ones, *given, part(lse, rows), ignore_index, label_smoothing, "none")

    gradients = accumulate(x, weight, want, dlogits_of)
    return reduced(loss, targets, ignore_index, reduction), lse, *gradients


def _naive(x, weight, targets, ignore_index=-100, label_smoothing=0.0, reduction="mean", keep="none"):
    return cross_entropy.naive(x @ weight.t(), targets, ignore_index, label_smoothing, reduction)


def _baseline(x, weight, targets, ignore_index=-100, label_smoothing=0.0, reduction="mean", keep="none"):
    return cross_entropy.baseline(F.linear(x, weight), targets, ignore_index, label_smoothing, reduction)


def _flops(n):
    products = 1 + len(GRADIENTS[n.get("keep", "none")].split())
    return 2 * products * n["R"] * n["K"] * n["V"]


def gradients_to_keep(x: Tensor, weight: Tensor) -> str:
    """The value of ``keep`` for the backward pass that may follow; ``"none"`` where none can follow."""
    if not torch.is_grad_enabled():
        return "none"
    if x.requires_grad:
        return "both" if weight.requires_grad else "dx"
    return "dweight" if weight.requires_grad else "none"


@op(
    shapes=dict(x="R K", weight="V K", targets="R: int64"),
    values=VALUES | dict(keep=KEEP),
    returns="loss",
    saves="lse dx dweight",
    cases=CASES,
    make=dict(weight=_weight, targets=targets_of_rows),
    flops=_flops,
    autocast="lower",
    fused=_fused,
    fused_calls=(linear, cross_entropy, cross_entropy_backward),
    baseline=_baseline,
    naive=_naive,
)
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    keep: str = "none",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cross_entropy(x @ weight^T, targets), a language model's head and loss, without all logits in memory at once.

    Args: x (R, K); weight (V, K); targets, ignore_index, label_smoothing and reduction as for cross_entropy;
    ``keep`` (``"none"``, ``"dx"``, ``"dweight"`` or ``"both"``): the gradients to compute while a chunk's logits are in
    memory. Without them, the backward pass computes the logits once more. With reduction ``"none"`` it always does.
    Returns: loss (R,) or (), float32. Kept for the backward pass, in float32: lse (R,), and dx (R, K), dweight (V, K)
    of the sum of the losses, or (0,). Source of computing gradients in the forward pass: Liger-Kernel (Hsu et al.,
    2024).
    """
    x, weight = x.contiguous(), weight.contiguous()
    logits = F.linear(x, weight)
    loss, lse = cross_entropy.reference(logits, targets, ignore_index, label_smoothing, reduction)
    dx, dweight = lse.new_empty(0), lse.new_empty(0)
    if keep != "none" and reduction != "none":
        dlogits = cross_entropy_backward.reference(
            lse.new_ones(()), logits, targets, lse, ignore_index, label_smoothing, "sum"
        )
        dx = (dlogits @ weight).to(lse.dtype) if keep in ("dx", "both") else dx
        dweight = (dlogits.t() @ x).to(lse.dtype) if keep in ("dweight", "both") else dweight
    return loss, lse, dx, dweight


def _fused_backward(
    dloss, x, weight, targets, lse, ignore_index=-100, label_smoothing=0.0, reduction="mean", want="dx dweight"
):
    x, weight = x.contiguous(), weight.contiguous()
    per_row = dloss if reduction == "none" else torch.ones_like(dloss).expand(len(x))

    def dlogits_of(rows: slice | None) -> Tensor:
        logits = linear(part(x, rows), weight, transposed=True)
        given = part(per_row, rows), logits, part(targets, rows), part(lse, rows)
        return cross_entropy_backward(*given, ignore_index, label_smoothing, "none")

    gradients = accumulate(x, weight, want, dlogits_of)
    if reduction == "none":
        return tuple(g.to(x.dtype) for g in gradients)
    return tuple(scaled(gradients, dloss, targets, ignore_index, reduction, x.dtype))


@op(
    shapes=dict(dloss=dloss_shape, x="R K", weight="V K", targets="R: int64", lse="R: float32"),
    values=dict(reduction=REDUCTION),
    returns="dx dweight",
    cases=[{k: v for k, v in c.items() if k != "keep"} for c in CASES[1:]],
    make=dict(weight=_weight, targets=targets_of_rows),
    flops=lambda n: 6 * n["R"] * n["K"] * n["V"],
    autocast="lower",
    derivative_of=linear_cross_entropy,
    fused=_fused_backward,
    fused_calls=(linear, cross_entropy_backward),
)
def linear_cross_entropy_backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    want: str = "dx dweight",
) -> tuple[Tensor, Tensor]:
    """dx = dlogits weight, dweight = dlogits^T x, dlogits as of cross_entropy; those not in ``want`` are (0,).

    Args: dloss (R,) or (), lse (R,), float32; the rest as for linear_cross_entropy.
    Returns: dx (R, K), dweight (V, K) in x's dtype.
    """
    x, weight, wanted = x.contiguous(), weight.contiguous(), want.split()
    logits = F.linear(x, weight)
    dlogits = cross_entropy_backward.reference(dloss, logits, targets, lse, ignore_index, label_smoothing, reduction)
    dx = (dlogits @ weight).contiguous() if "dx" in wanted else x.new_empty(0)
    dweight = (dlogits.t() @ x).contiguous() if "dweight" in wanted else x.new_empty(0)
    return dx, dweight


@linear_cross_entropy.backward("x weight targets lse dx dweight", through=[linear_cross_entropy_backward])
def _(saved, grad):
    want = [name for name in ("dx", "dweight") if name[1:] in saved.needs]
    how = saved.ignore_index, saved.label_smoothing, saved.reduction
    kept = saved.reduction != "none" and set(want) <= set(GRADIENTS[saved.keep].split())
    if kept and not torch.is_grad_enabled():  # second derivatives need their dependence on x and weight
        given = [getattr(saved, name) for name in want]
        found = scaled(given, grad.loss, saved.targets, saved.ignore_index, saved.reduction, saved.x.dtype)
        return {name[1:]: g for name, g in zip(want, found)}
    dx, dweight = linear_cross_entropy_backward(
        grad.loss, saved.x, saved.weight, saved.targets, saved.lse, *how, " ".join(want)
    )
    return dict(x=dx, weight=dweight)
