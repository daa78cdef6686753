"""SwiGLU in a package of its own: an op with kernels in Triton and in CUDA C++, its derivative in PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2fast import op
from gpt2fast.ops.common import widen


@op(
    shapes=dict(gate="... C", up="... C"),
    cases=[dict(B=2, T=9, C=512), dict(B=1, T=1, C=1376), dict(B=2, T=3, C=5), dict(B=0, T=3, C=5)],
    baseline=lambda gate, up: F.silu(gate) * up,
    namespace="examples",
)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y = silu(gate) up, silu(x) = x sigmoid(x). Args: gate, up (..., C), of one dtype. Returns: y (..., C)."""
    wide = widen(gate)
    return (wide * torch.sigmoid(wide) * widen(up)).to(gate.dtype).contiguous()


@swiglu.backward("gate up")
def _(saved, grad):
    gate, up, dy = widen(saved.gate), widen(saved.up), widen(grad.y)
    s = torch.sigmoid(gate)
    dgate = dy * up * s * (1 + gate * (1 - s))
    return dict(gate=dgate.to(saved.gate.dtype), up=(dy * gate * s).to(saved.up.dtype))


swiglu.kernels("triton", "swiglu.triton_kernels")
swiglu.kernels("cuda", "swiglu.cuda_kernels")
