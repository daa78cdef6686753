import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..op import op
from .common import widen

CASES = [
    dict(B=1, T=1, C=3072, approximate="tanh"),
    dict(B=4, T=1024, C=3072, approximate="tanh"),
    dict(B=1, T=128, C=3072, approximate="none"),
    dict(B=1, T=16, C=6400, approximate="tanh"),
    dict(B=2, T=5, C=770, approximate="none"),
    dict(B=2, T=3, C=5, approximate="tanh"),
    dict(B=2, T=3, C=5, approximate="none"),
    dict(B=0, T=3, C=768, approximate="tanh"),
]
VALUES = dict(approximate="tanh | none")


def gelu_derivative(x: Tensor, approximate: str) -> Tensor:
    """d gelu(x) / dx, elementwise, in x's dtype."""
    if approximate == "none":
        cdf = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    t = torch.tanh(inner)
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)


def _naive(x, approximate="tanh"):
    if approximate == "none":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@op(
    shapes=dict(x="... C"),
    values=VALUES,
    cases=CASES,
    flops=lambda n: 12 * n["B"] * n["T"] * n["C"],
    fused=lambda x, approximate="tanh": F.gelu(x, approximate=approximate).contiguous(),
    fused_is_differentiable=lambda x, approximate="tanh": True,
    naive=_naive,
)
def gelu(x: Tensor, approximate: str = "tanh") -> Tensor:
    """Gaussian error linear unit: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), or x/2 (1 + erf(x / sqrt 2)).

    Args: x (..., C); approximate ``"tanh"`` (GPT-2's ``gelu_new``) or ``"none"`` (erf), as in PyTorch.
    Returns: x's shape and dtype. Source: Hendrycks and Gimpel, arXiv:1606.08415.
    """
    return F.gelu(widen(x), approximate=approximate).to(x.dtype).contiguous()


@op(
    shapes=dict(dy="... C", x="... C"),
    values=VALUES,
    returns="dx",
    cases=[c for c in CASES if c["B"] < 4],
    flops=lambda n: 20 * n["B"] * n["T"] * n["C"],
    derivative_of=gelu,
    fused=lambda dy, x, approximate="tanh": torch.ops.aten.gelu_backward(dy, x, approximate=approximate).contiguous(),
)
def gelu_backward(dy: Tensor, x: Tensor, approximate: str = "tanh") -> Tensor:
    """dx = dy gelu'(x).

    Args: dy, x (..., C) of one dtype; approximate as for gelu. Returns: x's shape and dtype.
    """
    return (widen(dy) * gelu_derivative(widen(x), approximate)).to(x.dtype).contiguous()


@gelu.backward("x", through=[gelu_backward])
def _(saved, grad):
    return dict(x=gelu_backward(grad.y, saved.x, saved.approximate))
