"""scale_bias_add: y = x * scale + bias + residual in one pass over memory, as an op of gpt2fast."""

import torch
from torch import Tensor

from gpt2fast import op
from gpt2fast.build import load_extension  # [cpu]
from gpt2fast.ops.common import widen


@op(
    shapes=dict(x="... C", scale="C", bias="C", residual="... C"),
    cases=[dict(B=1, T=1, C=768), dict(B=4, T=256, C=1600), dict(B=2, T=3, C=5), dict(B=0, T=3, C=5)],
    flops=lambda n: 3 * n["B"] * n["T"] * n["C"],
    baseline=lambda x, scale, bias, residual: torch.addcmul(residual, x, scale) + bias,
    namespace="scale_bias_add",
)
def scale_bias_add(x: Tensor, scale: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """y = x * scale + bias + residual.

    Args: x and residual (..., C); scale and bias (C,); all of one dtype. Returns: y (..., C), of that dtype.
    """
    y = widen(x) * widen(scale) + widen(bias) + widen(residual)
    return y.to(x.dtype).contiguous()


@scale_bias_add.backward("x scale")
def _(saved, grad):
    dy, x = widen(grad.y), widen(saved.x)
    dscale, dbias = ((t.reshape(-1, t.shape[-1]).sum(0)) for t in (dy * x, dy))
    gradients = dict(x=dy * widen(saved.scale), scale=dscale, bias=dbias, residual=dy)
    return {name: gradient.to(saved.x.dtype) for name, gradient in gradients.items()}


load_extension("scale_bias_add._C")  # [cpu]
# The modules are imported when their kernel is first wanted.  # [gpu]
scale_bias_add.kernels("triton", "scale_bias_add.triton_kernels")  # [triton]
scale_bias_add.kernels("cuda", "scale_bias_add.cuda_kernels")  # [cuda]
