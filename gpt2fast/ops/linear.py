import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import APPROXIMATE
from ..op import op
from .common import widen
from .gelu import gelu, gelu_backward

WEIGHT = "N K if transposed else K N"
CASES = [
    dict(B=1, T=1, K=768, N=2304, bias=True),
    dict(B=1, T=512, K=768, N=3072, bias=True, activation="gelu_tanh"),
    dict(B=1, T=512, K=3072, N=768, bias=True, residual=True),
    dict(B=1, T=1, K=768, N=50257, transposed=True),
    dict(B=8, T=1, K=768, N=3072, bias=True, activation="gelu_tanh", keep_preactivation=True),
    dict(B=1, T=7, K=1600, N=4800, bias=True),
    dict(B=1, T=130, K=1600, N=1600, bias=True, residual=True, transposed=True),
    dict(B=2, T=5, K=770, N=771, bias=True, activation="gelu_erf", residual=True, keep_preactivation=True),
    dict(B=2, T=5, K=770, N=33, activation="gelu_erf", transposed=True),
    dict(B=2, T=3, K=5, N=4, bias=True, residual=True, activation="gelu_tanh", keep_preactivation=True),
    dict(B=2, T=3, K=5, N=4, bias=True, activation="gelu_erf"),
    dict(B=2, T=3, K=5, N=4, residual=True, transposed=True),
    dict(B=0, T=3, K=768, N=768, bias=True),
]


def _scaled(shape, case, g):
    """Random normals divided by sqrt(K), so that the outputs are of order one."""
    return torch.randn(shape, generator=g) * case["K"] ** -0.5


def activate(y: Tensor, activation: str) -> Tensor:
    return y if activation == "none" else F.gelu(y, approximate=APPROXIMATE[activation])


ALIGNED = 8  # columns of 16 bits in the 16 bytes that the matrix units of a GPU read at a time
FEW_ROWS = 16  # up to this number of rows, the CPU adds the bias in a separate step
MANY_ROWS = 128  # from this number of rows on, a padded copy of the weight costs less than an unaligned product


def _missing(x: Tensor, columns: int) -> int:
    """The number of columns to add to a product of 16-bit numbers on a GPU: 7 for GPT-2's vocabulary of 50257.

    Where rows are not aligned, cuBLAS has no kernel for the newer matrix units and takes one that is several times
    slower.
    """
    many = x.device.type == "cuda" and x.element_size() == 2 and x.numel() >= MANY_ROWS * x.shape[-1]
    return -columns % ALIGNED if many else 0


def _adds_bias_roughly(x: Tensor) -> bool:
    """Whether MKL's addmm may be less exact. On some CPUs it has twice the error of MKL's plain product.

    That is so for up to 9 rows, or for the last ones of a few more rows.
    """
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() <= FEW_ROWS * x.shape[-1]


def _before(x, weight, bias, transposed):
    """x @ W + bias, in x's dtype."""
    x, weight = x.contiguous(), weight.contiguous()  # the reference says why
    if transposed and (missing := _missing(x, weight.shape[0])):
        wider = F.pad(weight, (0, 0, 0, missing)), None if bias is None else F.pad(bias, (0, missing))
        return F.linear(x, *wider)[..., : weight.shape[0]].contiguous()
    if transposed:
        return F.linear(x, weight, bias)
    if bias is None:
        return x @ weight
    if _adds_bias_roughly(x):
        return x @ weight + bias
    return torch.addmm(bias, x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])


def _fused(x, weight, bias=None, residual=None, activation="none", transposed=False, keep_preactivation=False):
    before = _before(x, weight, bias, transposed)
    y = activate(before, activation)
    kept = before if keep_preactivation and activation != "none" else x.new_empty(0)
    return (y if residual is None else y + residual).contiguous(), kept.contiguous()


def _fused_returns(x, weight, bias=None, residual=None, activation="none", transposed=False, keep_preactivation=False):
    y = activate(_before(x, weight, bias, transposed), activation)
    return (y if residual is None else y + residual).contiguous()


def _fused_backward(dy, x, weight, transposed=False, want="dx dweight dbias"):
    wanted, none = want.split(), dy.new_empty(0)
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if "dbias" in wanted else none
    N = dy.shape[-1]
    if transposed and (missing := _missing(x, N)):
        dy = F.pad(dy, (0, missing))
        weight = F.pad(weight, (0, 0, 0, missing)) if "dx" in wanted else weight
    rows_dy, rows_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dx = (dy @ weight if transposed else F.linear(dy, weight)).contiguous() if "dx" in wanted else none
    first, second = (rows_dy, rows_x) if transposed else (rows_x, rows_dy)
    dweight = none
    if "dweight" in wanted:
        dweight = (first.t() @ second)[: weight.shape[0] if not transposed else N].contiguous()
    return dx, dweight, dbias


def _fused_is_differentiable(
    x, weight, bias=None, residual=None, activation="none", transposed=False, keep_preactivation=False
):
    """PyTorch's autograd would keep the preactivation in any case, and would not choose the padding anew."""
    return (activation == "none" or keep_preactivation) and not _missing(x, weight.shape[0 if transposed else 1])


def _naive(x, weight, bias=None, residual=None, activation="none", transposed=False, keep_preactivation=False):
    y = x @ (weight.t() if transposed else weight)
    y = y if bias is None else y + bias
    y = y if activation == "none" else gelu.naive(y, APPROXIMATE[activation])
    return y if residual is None else y + residual


@op(
    shapes=dict(x="... K", weight=WEIGHT, bias="N", residual="... N"),
    values=dict(activation="none | gelu_tanh | gelu_erf"),
    saves="preactivation",
    cases=CASES,
    make=dict(weight=_scaled),
    flops=lambda n: 2 * n["B"] * n["T"] * n["K"] * n["N"],
    autocast="lower",
    fused=_fused,
    fused_returns=_fused_returns,
    fused_is_differentiable=_fused_is_differentiable,
    naive=_naive,
)
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    transposed: bool = False,
    keep_preactivation: bool = False,
) -> tuple[Tensor, Tensor]:
    """y = activation(x @ W + bias) + residual, accumulated in float32.

    Args: x (..., K); weight (K, N), GPT-2's Conv1D, or (N, K), torch.nn.Linear's, with ``transposed``; bias (N,);
    residual (..., N); activation ``"none"``, ``"gelu_tanh"`` or ``"gelu_erf"``; ``keep_preactivation`` keeps
    x @ W + bias for the backward pass, which otherwise computes it again.
    Returns: y (..., N) in x's dtype. Kept for the backward pass: preactivation (..., N), or (0,).
    """
    x, weight = (
        x.contiguous(),
        weight.contiguous(),
    )  # PyTorch's AMX product also reads the gaps between rows, where a NaN would spoil the result
    wide = F.linear(x, weight) if transposed else x @ weight
    if bias is not None:
        wide = widen(wide) + widen(bias)
    y = activate(widen(wide), activation)
    if residual is not None:
        y = y + widen(residual)
    kept = wide.to(x.dtype) if keep_preactivation and activation != "none" else x.new_empty(0)
    return y.to(x.dtype).contiguous(), kept.contiguous()


@op(
    shapes=dict(dy="... N", x="... K", weight=WEIGHT),
    returns="dx dweight dbias",
    cases=[{k: v for k, v in c.items() if k in ("B", "T", "K", "N", "transposed")} for c in CASES],
    make=dict(weight=_scaled),
    flops=lambda n: 4 * n["B"] * n["T"] * n["K"] * n["N"],
    autocast="lower",
    derivative_of=linear,
    fused=_fused_backward,
)
def linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, transposed: bool = False, want: str = "dx dweight dbias"
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x @ W + bias: dx = dy W^T, dweight = x^T dy, dbias = sum of dy; those not in ``want`` are (0,).

    Args: dy (..., N); x (..., K); weight as for linear. Returns: dx (..., K), dweight like weight, dbias (N,).
    """
    wanted, none = want.split(), dy.new_empty(0)
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    rows_dy, rows_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dx = (dy @ weight if transposed else F.linear(dy, weight)).contiguous() if "dx" in wanted else none
    if "dweight" not in wanted:
        dweight = none
    else:
        dweight = (rows_dy.t() @ rows_x if transposed else rows_x.t() @ rows_dy).contiguous()
    dbias = widen(rows_dy).sum(0).to(dy.dtype) if "dbias" in wanted else none
    return dx, dweight, dbias


@linear.backward("x weight bias preactivation", through=[linear_backward, gelu_backward])
def _(saved, grad):
    dy = grad.y
    if saved.activation != "none":
        before = saved.preactivation
        if not saved.keep_preactivation or torch.is_grad_enabled():  # second derivatives need its dependence on x
            before = linear(saved.x, saved.weight, saved.bias, transposed=saved.transposed)
        dy = gelu_backward(dy, before, APPROXIMATE[saved.activation])
    want = " ".join("d" + n for n in ("x", "weight", "bias") if n in saved.needs)
    dx, dweight, dbias = linear_backward(dy, saved.x, saved.weight, saved.transposed, want)
    return dict(x=dx, weight=dweight, bias=dbias, residual=grad.y)
