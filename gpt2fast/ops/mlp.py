import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..activations import APPROXIMATE
from ..op import op
from .common import widen
from .gelu import gelu, gelu_backward, gelu_derivative
from .linear import linear, linear_backward

WANT = "dx dweight_in dweight_out dbias_in dbias_out"
ACTIVATIONS = " | ".join(APPROXIMATE)
CASES = [
    dict(B=1, T=512, K=768, M=3072, N=768, bias_in=True, bias_out=True, residual=True, keep=True),
    dict(B=1, T=1, K=768, M=3072, N=768, bias_in=True, bias_out=True, residual=True),
    dict(B=2, T=65, K=70, M=130, N=50, bias_in=True, bias_out=True, activation="gelu_erf", keep=True),
    dict(B=2, T=5, K=24, M=40, N=33, bias_out=True, residual=True, keep=True),
    dict(B=2, T=3, K=5, M=7, N=4, bias_in=True, activation="gelu_erf"),
    dict(B=0, T=3, K=8, M=16, N=8, bias_in=True, bias_out=True, keep=True),
]


def _scaled(letter):
    """Random normals divided by the square root of a size, so that the outputs are of order one."""
    return lambda shape, case, g: torch.randn(shape, generator=g) * case[letter] ** -0.5


MAKE = dict(weight_in=_scaled("K"), weight_out=_scaled("M"))


def _fused(x, weight_in, weight_out, bias_in=None, bias_out=None, residual=None, activation="gelu_tanh", keep=False):
    hidden, before = linear.overload(x, weight_in, bias_in, None, activation, False, keep)
    return linear(hidden, weight_out, bias_out, residual), before, hidden if keep else x.new_empty(0)


def _naive(x, weight_in, weight_out, bias_in=None, bias_out=None, residual=None, activation="gelu_tanh", keep=False):
    hidden = linear.naive(x, weight_in, bias_in, activation=activation)
    return linear.naive(hidden, weight_out, bias_out, residual)


@op(
    shapes=dict(x="... K", weight_in="K M", weight_out="M N", bias_in="M", bias_out="N", residual="... N"),
    values=dict(activation=ACTIVATIONS),
    saves="preactivation hidden",
    cases=CASES,
    make=MAKE,
    flops=lambda n: 2 * n["B"] * n["T"] * n["M"] * (n["K"] + n["N"]),
    autocast="lower",
    fused=_fused,
    fused_calls=(linear,),
    naive=_naive,
)
def mlp(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    bias_in: Tensor | None = None,
    bias_out: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "gelu_tanh",
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = activation(x @ weight_in + bias_in) @ weight_out + bias_out + residual: two linear layers, one backward pass.

    Args: x (..., K); weight_in (K, M); weight_out (M, N), as GPT-2's Conv1D; bias_in (M,); bias_out (N,); residual
    (..., N); activation ``"gelu_tanh"`` or ``"gelu_erf"``; ``keep`` keeps what is before and after the activation for
    the backward pass, which otherwise computes it again.
    Returns: y (..., N) in x's dtype. Kept for the backward pass: preactivation and hidden (..., M), or (0,).
    """
    before = x.contiguous() @ weight_in.contiguous()
    if bias_in is not None:
        before = widen(before) + widen(bias_in)
    hidden = F.gelu(widen(before), approximate=APPROXIMATE[activation]).to(x.dtype)
    y = widen(hidden @ weight_out.contiguous())
    for other in (bias_out, residual):
        y = y if other is None else y + widen(other)
    kept = [before.to(x.dtype), hidden] if keep else [x.new_empty(0), x.new_empty(0)]
    return y.to(x.dtype).contiguous(), *(t.contiguous() for t in kept)


def split_wants(want: str) -> tuple[str, str]:
    """``want`` for the two calls of linear_backward: for the outer layer (without dx) and for the inner layer."""
    wanted = want.split()
    outer = [name.removesuffix("_out") for name in wanted if name.endswith("_out")]
    inner = [name.removesuffix("_in") for name in wanted if not name.endswith("_out")]
    return " ".join(outer), " ".join(inner)


def _fused_backward(
    dy, x, weight_in, weight_out, preactivation, hidden, bias_in=None, activation="gelu_tanh", want=WANT
):
    outer, inner = split_wants(want)
    dx, dweight_in, dbias_in = (dy.new_empty(0) for _ in range(3))
    dhidden, dweight_out, dbias_out = linear_backward(dy, hidden, weight_out, want="dx " * bool(inner) + outer)
    if inner:
        dbefore = gelu_backward(dhidden, preactivation, APPROXIMATE[activation])
        dx, dweight_in, dbias_in = linear_backward(dbefore, x, weight_in, want=inner)
    return dx, dweight_in, dweight_out, dbias_in, dbias_out


@op(
    shapes=dict(
        dy="... N", x="... K", weight_in="K M", weight_out="M N", preactivation="... M", hidden="... M", bias_in="M"
    ),
    values=dict(activation=ACTIVATIONS),
    returns=WANT,
    cases=[c | dict(keep=True, bias_in=True) for c in CASES],
    make=MAKE,
    flops=lambda n: 4 * n["B"] * n["T"] * n["M"] * (n["K"] + n["N"]),
    autocast="lower",
    derivative_of=mlp,
    fused=_fused_backward,
    fused_calls=(linear_backward, gelu_backward),
)
def mlp_backward(
    dy: Tensor,
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    preactivation: Tensor,
    hidden: Tensor,
    bias_in: Tensor | None = None,
    activation: str = "gelu_tanh",
    want: str = WANT,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of mlp; those not in ``want`` are (0,). Only gradients of gradients look at bias_in.

    Args: dy (..., N); preactivation and hidden (..., M), what mlp keeps; the rest as for mlp.
    Returns: dx (..., K), dweight_in (K, M), dweight_out (M, N), dbias_in (M,), dbias_out (N,).
    """
    wanted, none = want.split(), dy.new_empty(0)
    rows_dy, rows_x, rows_hidden = (t.reshape(-1, t.shape[-1]).contiguous() for t in (dy, x, hidden))
    slope = gelu_derivative(widen(preactivation), APPROXIMATE[activation])
    dbefore = (widen(dy.contiguous() @ weight_out.t()) * slope).to(dy.dtype)
    rows = dbefore.reshape(-1, dbefore.shape[-1])
    made = dict(
        dx=lambda: (dbefore @ weight_in.t()).contiguous(),
        dweight_in=lambda: rows_x.t() @ rows,
        dweight_out=lambda: rows_hidden.t() @ rows_dy,
        dbias_in=lambda: widen(rows).sum(0).to(dy.dtype),
        dbias_out=lambda: widen(rows_dy).sum(0).to(dy.dtype),
    )
    return tuple(compute() if name in wanted else none for name, compute in made.items())


@mlp.backward("x weight_in weight_out bias_in preactivation hidden", through=[mlp_backward])
def _(saved, grad):
    before, hidden = saved.preactivation, saved.hidden
    if not saved.keep:
        before = linear(saved.x, saved.weight_in, saved.bias_in)
        hidden = gelu(before, APPROXIMATE[saved.activation])
    names = ("x", "weight_in", "weight_out", "bias_in", "bias_out")
    want = " ".join(f"d{name}" for name in names if name in saved.needs)
    given = grad.y, saved.x, saved.weight_in, saved.weight_out, before, hidden, saved.bias_in
    return dict(zip(names, mlp_backward(*given, saved.activation, want)), residual=grad.y)


def trains_as_one(x: Tensor, residual: Tensor | None, weight_in: Tensor, weight_out: Tensor) -> bool:
    """Whether ``mlp`` should run instead of two calls of ``linear``, which compute the same.

    It should where gradients are enabled and a kernel of ours would run ``mlp_backward``. It should not under autocast,
    where the residual stream keeps its dtype.
    """
    if not torch.is_grad_enabled() or not (x.is_cuda or backends.cpu_counts_as_cuda()):
        return False
    if torch.is_autocast_enabled(x.device.type) or (residual is not None and residual.dtype != x.dtype):
        return False
    return backends.choose(mlp_backward, x, x, weight_in, weight_out, x, x).backend not in backends.BUILT_IN
