import torch
import torch.nn.functional as F
from torch import Tensor

from ..op import op
from .common import widen

CASES = [
    dict(B=1, T=1, C=768),
    dict(B=4, T=1024, C=768),
    dict(B=1, T=64, C=1600),
    dict(B=2, T=5, C=770),
    dict(B=2, T=3, C=5),
    dict(B=0, T=3, C=768),
]


def _naive(x, weight, bias, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias


@op(
    shapes=dict(x="... C", weight="C", bias="C"),
    saves="mean rstd",
    cases=CASES,
    flops=lambda n: 8 * n["B"] * n["T"] * n["C"],
    autocast="float32",
    baseline=lambda x, weight, bias, eps=1e-5: F.layer_norm(x, x.shape[-1:], weight, bias, eps),
    naive=_naive,
)
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimension.

    Args: x (..., C); weight, bias (C,), all of one dtype (float32, bfloat16 or float16); eps is added to the variance.
    Returns: y (..., C) in x's dtype. Kept for the backward pass: mean and rstd (...), float32.
    Errors: ValueError for a wrong shape or device, TypeError for a wrong dtype. Source: Ba et al., arXiv:1607.06450.
    """
    wide = widen(x)
    mean = wide.mean(-1)
    centred = wide - mean[..., None]
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    y = centred * rstd[..., None] * widen(weight) + widen(bias)
    return y.to(x.dtype).contiguous(), mean.contiguous(), rstd.contiguous()


@op(
    shapes=dict(dy="... C", x="... C", weight="C", mean="...: float32", rstd="...: float32"),
    returns="dx dweight dbias",
    cases=CASES,
    make=dict(mean=lambda shape, case, g: torch.randn(shape, generator=g) * 0.1,
              rstd=lambda shape, case, g: torch.rand(shape, generator=g) + 0.5),
    flops=lambda n: 14 * n["B"] * n["T"] * n["C"],
    autocast="float32",
    derivative=False,
)  # fmt: skip
def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of layer_norm: with n = (x - mean) rstd and g = dy weight, dx = rstd (g - avg(g) - n avg(g n)).

    Args: dy, x (..., C); weight (C,); mean, rstd (...), float32. Returns: dx (..., C), dweight and dbias (C,).
    """
    wide, wide_dy, rstd = widen(x), widen(dy), rstd[..., None]
    normalised = (wide - mean[..., None]) * rstd
    g = wide_dy * widen(weight)
    dx = rstd * (g - g.mean(-1, keepdim=True) - normalised * (g * normalised).mean(-1, keepdim=True))
    leading = tuple(range(x.dim() - 1))
    dweight = (wide_dy * normalised).sum(leading) if leading else wide_dy * normalised
    dbias = wide_dy.sum(leading) if leading else wide_dy.clone()
    return dx.to(x.dtype).contiguous(), dweight.to(x.dtype), dbias.to(x.dtype)


@layer_norm.backward("x weight mean rstd")
def _(saved, grad):
    dx, dweight, dbias = layer_norm_backward(grad.y, saved.x, saved.weight, saved.mean, saved.rstd)
    return dict(x=dx, weight=dweight, bias=dbias)
