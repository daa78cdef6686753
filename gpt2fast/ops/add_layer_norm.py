import torch.nn.functional as F
from torch import Tensor

from ..op import op
from .layer_norm import CASES, layer_norm, layer_norm_backward, too_short


def _fused_returns(x, residual, weight, bias, eps=1e-5):
    total = (x + residual).contiguous()
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps), total


def _naive(x, residual, weight, bias, eps=1e-5):
    total = x + residual
    return layer_norm.naive(total, weight, bias, eps), total


def _fused(x, residual, weight, bias, eps=1e-5):
    total = (x + residual).contiguous()
    y, mean, rstd = layer_norm.fused(total, weight, bias, eps)
    return y, total, mean, rstd


@op(
    shapes=dict(x="... C", residual="... C", weight="C", bias="C"),
    returns="y sum",
    saves="mean rstd",
    cases=CASES,
    flops=lambda n: 9 * n["B"] * n["T"] * n["C"],
    autocast="float32",
    fused=_fused,
    fused_returns=_fused_returns,
    fused_unless=lambda x, residual, weight, bias, eps=1e-5: too_short(x),
    baseline=_fused_returns,
    naive=_naive,
)
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum = x + residual and y = layer_norm(sum), in one pass over memory.

    Args: x, residual (..., C); weight, bias (C,), all of one dtype; eps is added to the variance.
    Returns: y and sum (..., C) in x's dtype. Kept for the backward pass: mean and
    rstd (...), float32, of the rounded sum.
    """
    total = (x + residual).contiguous()
    y, mean, rstd = layer_norm.reference(total, weight, bias, eps)
    return y, total, mean, rstd


@add_layer_norm.backward("sum weight mean rstd", through=[layer_norm_backward])
def _(saved, grad):
    dx, dweight, dbias = layer_norm_backward(grad.y, saved.sum, saved.weight, saved.mean, saved.rstd)
    dx = dx + grad.sum
    return dict(x=dx, residual=dx, weight=dweight, bias=dbias)
