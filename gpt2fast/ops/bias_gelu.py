import torch.nn.functional as F
from torch import Tensor

from ..op import op
from .common import widen
from .gelu import CASES, VALUES, gelu, gelu_backward


@op(
    shapes=dict(x="... C", bias="C"),
    values=VALUES,
    cases=CASES,
    flops=lambda n: 13 * n["B"] * n["T"] * n["C"],
    fused=lambda x, bias, approximate="tanh": F.gelu(x + bias, approximate=approximate).contiguous(),
    naive=lambda x, bias, approximate="tanh": gelu.naive(x + bias, approximate),
)
def bias_gelu(x: Tensor, bias: Tensor, approximate: str = "tanh") -> Tensor:
    """y = gelu(x + bias), in one pass over memory.

    Args: x (..., C); bias (C,), of x's dtype; approximate as for gelu. Returns: x's shape and dtype.
    """
    return F.gelu(widen(x) + widen(bias), approximate=approximate).to(x.dtype).contiguous()


@bias_gelu.backward("x bias", through=[gelu_backward])
def _(saved, grad):
    dx = gelu_backward(grad.y, saved.x + saved.bias, saved.approximate)
    dbias = dx.sum(tuple(range(dx.dim() - 1))) if "bias" in saved.needs and dx.dim() > 1 else dx
    return dict(x=dx, bias=dbias)
