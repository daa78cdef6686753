"""RMSNorm in a package of its own: an op, its gradient, and kernels of both in Triton and in CUDA C++."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2fast import op
from gpt2fast.ops.common import widen

CASES = [dict(B=2, T=7, C=768), dict(B=1, T=1, C=1600), dict(B=2, T=3, C=5), dict(B=0, T=3, C=5)]


@op(
    shapes=dict(x="... C", weight="C"),
    saves="rstd",
    cases=CASES,
    autocast="float32",
    baseline=lambda x, weight, eps=1e-6: F.rms_norm(x, x.shape[-1:], weight, eps),
    namespace="examples",
)
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args: x (..., C); weight (C,), of x's dtype; eps is added to the mean.
    Returns: y (..., C) in x's dtype. Kept for the backward pass: rstd = 1 / sqrt(mean(x^2) + eps), (...), float32.
    """
    wide = widen(x)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = wide * rstd[..., None] * widen(weight)
    return y.to(x.dtype).contiguous(), rstd.contiguous()


@op(
    shapes=dict(dy="... C", x="... C", weight="C", rstd="...: float32"),
    returns="dx dweight",
    cases=CASES,
    autocast="float32",
    derivative_of=rms_norm,
    namespace="examples",
)
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rms_norm: with n = x rstd and g = dy weight, dx = rstd (g - n mean(g n)) and dweight = sum of dy n.

    Args: dy, x (..., C); weight (C,); rstd (...), float32. Returns: dx (..., C), dweight (C,).
    """
    n, g = widen(x) * rstd[..., None], widen(dy) * widen(weight)
    dx = rstd[..., None] * (g - n * (g * n).mean(-1, keepdim=True))
    dweight = (widen(dy) * n).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype).contiguous(), dweight.to(x.dtype)


@rms_norm.backward("x weight rstd", through=[rms_norm_backward])
def _(saved, grad):
    dx, dweight = rms_norm_backward(grad.y, saved.x, saved.weight, saved.rstd)
    return dict(x=dx, weight=dweight)


# The modules are imported when their first kernel is wanted: without triton and without nvcc this package still works.
for declared in (rms_norm, rms_norm_backward):
    declared.kernels("triton", "rms_norm.triton_kernels")
    declared.kernels("cuda", "rms_norm.cuda_kernels")
