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


def too_short(x: Tensor) -> str | None:
    """In a row of few columns, dx is a small difference of larger numbers. PyTorch's kernels lose too many digits."""
    short = x.shape[-1] <= 32
    return "PyTorch's gradients of rows of up to 32 columns break the parity rule" if short else None


def _naive(x, weight, bias, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias


def _wide_on_cpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Widens tensors on the CPU, where PyTorch would break the parity rule in two ways.

    Its statistics have the dtype of the weight, and 16-bit weight gradients are summed in 16 bits.
    """
    return tuple(map(widen, tensors)) if tensors[0].device.type == "cpu" else tensors


def _fused(x, weight, bias, eps=1e-5):
    y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], *_wide_on_cpu(weight, bias), eps)
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        mean = x.mean(-1, dtype=torch.float32)  # more exact than PyTorch's
    else:
        mean = mean.squeeze(-1)
    return y, mean, rstd.squeeze(-1)


def _fused_returns(x, weight, bias, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@op(
    shapes=dict(x="... C", weight="C", bias="C"),
    saves="mean rstd",
    cases=CASES,
    flops=lambda n: 8 * n["B"] * n["T"] * n["C"],
    autocast="float32",
    fused=_fused,
    fused_returns=_fused_returns,
    fused_unless=lambda x, weight, bias, eps=1e-5: too_short(x),
    baseline=_fused_returns,
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


def _fused_backward(dy, x, weight, mean, rstd):
    rows = (x.numel() // x.shape[-1], x.shape[-1])
    wide_dy, wide, weight = (t.contiguous() for t in _wide_on_cpu(dy, x, weight))
    wide_dy, wide = wide_dy.view(rows), wide.view(rows)
    mean, rstd = (t.reshape(-1, 1).contiguous() for t in (mean, rstd))
    # On the CPU, PyTorch adds up the rows of dweight one by one. More than some hundred rows lose too many digits.
    step = 512 if x.device.type == "cpu" else max(rows[0], 1)
    parts = [
        torch.ops.aten.native_layer_norm_backward(
            wide_dy[at : at + step], wide[at : at + step], rows[1:], mean[at : at + step], rstd[at : at + step],
            weight, weight, [True, True, True],
        )
        for at in range(0, max(rows[0], 1), step)
    ]  # fmt: skip
    if len(parts) == 1:
        dx, dweight, dbias = parts[0]
    else:
        dx = torch.cat([part[0] for part in parts])
        dweight, dbias = (torch.stack([part[i] for part in parts]).sum(0) for i in (1, 2))
    return dx.view(x.shape).to(x.dtype), dweight.to(x.dtype), dbias.to(x.dtype)


@op(
    shapes=dict(dy="... C", x="... C", weight="C", mean="...: float32", rstd="...: float32"),
    returns="dx dweight dbias",
    cases=CASES,
    flops=lambda n: 14 * n["B"] * n["T"] * n["C"],
    autocast="float32",
    derivative_of=layer_norm,
    fused=_fused_backward,
    fused_unless=lambda dy, x, weight, mean, rstd: too_short(x),
)
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


@layer_norm.backward("x weight mean rstd", through=[layer_norm_backward])
def _(saved, grad):
    dx, dweight, dbias = layer_norm_backward(grad.y, saved.x, saved.weight, saved.mean, saved.rstd)
    return dict(x=dx, weight=dweight, bias=dbias)
