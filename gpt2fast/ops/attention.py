import torch
import torch.nn.functional as F
from torch import Tensor

from ..op import op
from .common import dropout_kept, widen


def _mask(shape, case, g):
    """Row b hides its first b and its last b % 2 keys. Some rows have left padding, some right padding, some none."""
    B, S = shape
    key, row = torch.arange(S), torch.arange(B)[:, None]
    return (key >= row) & (key < S - row % 2)


CASES = [
    dict(B=1, T=1, S=128, H=12, D=64),
    dict(B=1, T=1024, S=1024, H=12, D=64),
    dict(B=2, T=130, S=130, H=12, D=64, mask=True),
    dict(B=1, T=65, S=65, H=25, D=64),
    dict(B=2, T=33, S=161, H=3, D=80, window=40),
    dict(B=2, T=40, S=17, H=2, D=96, causal=False, bias=True),
    dict(B=1, T=20, S=7, H=2, D=64),
    dict(B=3, T=9, S=70, H=2, D=33, mask=True, bias=True, scale=0.3),
    dict(B=1, T=10, S=10, H=1, D=256),
    dict(B=1, T=6, S=9, H=2, D=1),
    dict(B=2, T=70, S=70, H=2, D=64, dropout_p=0.2, seed=True),
    dict(B=2, T=3, S=4, H=2, D=3),
    dict(B=2, T=3, S=4, H=1, D=2, mask=True, bias=True, causal=False),
    dict(B=1, T=3, S=4, H=2, D=3, dropout_p=0.3, seed=True, window=2),
    dict(B=0, T=3, S=3, H=2, D=64),
]
MAKE = dict(mask=_mask, seed=lambda shape, case, g: torch.tensor([1234567890123]))
VALUES = dict(window="[0, inf); 0: unlimited", dropout_p="[0, 1)", seed="given if dropout_p")
SHAPES = dict(q="B T H D", k="B S H D", v="B S H D", mask="B S: bool", bias="B|1 H|1 T|1 S|1", seed="1: int64")


def _pairs(n) -> int:
    """The number of pairs of query and key that causal and window leave. Padding is not subtracted."""
    T, S = n["T"], n["S"]
    if not n.get("causal", True):
        return T * S
    return sum(min(max(S - T + i + 1, 0), n.get("window") or S) for i in range(T))


def visible(T: int, S: int, causal: bool, window: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """(B or 1, 1, T, S) bools: which keys each query sees. With causal, the last query sees the last key."""
    last = torch.arange(S - T, S, device=device)[:, None]
    key = torch.arange(S, device=device)
    seen = torch.ones(T, S, dtype=torch.bool, device=device)
    if causal:
        seen = seen & (key <= last)
    if window > 0:
        seen = seen & (key > last - window)
    seen = seen[None, None]
    return seen if mask is None else seen & mask[:, None, None, :]


def zero_unseen(seen: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Sets the rows of (B, S, H, D) tensors to 0 for keys that no query sees, so that a NaN there has no effect.

    To hide the scores is not enough: 0 * NaN is NaN.
    """
    unseen = ~seen.any(2).transpose(1, 2)[..., None]  # (B or 1, S, 1, 1)
    return [t.masked_fill(unseen, 0) for t in tensors]


def _scores(q, k, seen, bias, scale) -> Tensor:
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + widen(bias)
    return scores.masked_fill(~seen, -torch.inf)


def _softmax(scores: Tensor, nothing: Tensor) -> Tensor:
    """Softmax over the keys. Rows that see nothing are 0; their softmax and its derivative would be NaN.

    This is not computed as exp(scores - lse). Where lse is large, the error of its rounding is too large for that.
    """
    return torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)


def _baseline(q, k, v, mask=None, bias=None, seed=None, causal=True, window=0, scale=None, dropout_p=0.0):
    T, S = q.shape[1], k.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if mask is None and bias is None and not window and (T == S or not causal or T == 1):
        plain = causal and T > 1
        out = F.scaled_dot_product_attention(q, k, v, is_causal=plain, scale=scale, dropout_p=dropout_p)
        return out.transpose(1, 2)
    seen = visible(T, S, causal, window, mask, q.device)
    added = torch.zeros((), dtype=q.dtype, device=q.device) if bias is None else bias
    added = added.masked_fill(~seen, -torch.inf)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale, dropout_p=dropout_p)
    return out.transpose(1, 2)


def _naive(q, k, v, mask=None, bias=None, seed=None, causal=True, window=0, scale=None, dropout_p=0.0):
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias
    scores = scores.masked_fill(~visible(q.shape[1], k.shape[1], causal, window, mask, q.device), -torch.inf)
    return torch.einsum("bhts,bshd->bthd", F.dropout(scores.softmax(-1), dropout_p), v)


def _sdpa_arguments(q, k, v, mask, bias, causal, window):
    """The arguments of PyTorch's flash attention for the CPU: q, k, v (B, H, T, D), is_causal and attn_mask.

    The last dimension of q, k and v is dense.
    """
    T, S = q.shape[1], k.shape[1]
    plain = mask is None and bias is None and window == 0
    added = None
    if not plain or (causal and T != S and T > 1):  # with is_causal, PyTorch's first query sees the first key
        seen = visible(T, S, causal, window, mask, q.device)
        k, v = zero_unseen(seen, k, v) if mask is not None or window > 0 or T > S else (k, v)
        added = torch.zeros((), dtype=q.dtype, device=q.device) if bias is None else bias
        added = added.masked_fill(~seen, -torch.inf).expand(*q.shape[:1], q.shape[2], T, S)
    q, k, v = ((t if t.stride(-1) == 1 else t.contiguous()).transpose(1, 2) for t in (q, k, v))
    return q, k, v, causal and added is None and T > 1, added


def _fused_unless(q, k, v, mask=None, bias=None, seed=None, causal=True, window=0, scale=None, dropout_p=0.0):
    if q.device.type != "cpu":
        return "PyTorch's fused attention is taken on the CPU only"
    if dropout_p > 0:
        return "PyTorch's fused attention has no dropout on the CPU"
    return "there is nothing to attend to" if 0 in (*q.shape, *k.shape) else None


def _flash(q, k, v, mask, bias, causal, window, scale):
    """out (B, T, H, D) and lse of PyTorch's flash attention for the CPU, in the dtype of q, k and v."""
    q, k, v, is_causal, added = _sdpa_arguments(q, k, v, mask, bias, causal, window)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, attn_mask=added, scale=scale
    )
    if added is not None:
        nothing = (added == -torch.inf).all(-1)
        lse = lse.masked_fill(nothing, torch.finfo(torch.float32).min)
        out = out.masked_fill(nothing[..., None], 0)
    return out.transpose(1, 2), lse


def _fused(q, k, v, mask=None, bias=None, seed=None, causal=True, window=0, scale=None, dropout_p=0.0):
    dtype, bias = q.dtype, None if bias is None else widen(bias)
    q, k, v = map(widen, (q, k, v))  # in 16 bits, PyTorch's exponential is too inexact for the parity rule of lse
    out, lse = _flash(q, k, v, mask, bias, causal, window, scale)
    return out.to(dtype).contiguous(), lse.contiguous()


def _fused_returns(q, k, v, mask=None, bias=None, seed=None, causal=True, window=0, scale=None, dropout_p=0.0):
    return _flash(q, k, v, mask, bias, causal, window, scale)[0].contiguous()


@op(
    shapes=SHAPES,
    values=VALUES,
    returns="out",
    saves="lse",
    cases=CASES,
    make=MAKE,
    flops=lambda n: 4 * n["B"] * n["H"] * n["D"] * _pairs(n),
    autocast="lower",
    fused=_fused,
    fused_returns=_fused_returns,
    fused_unless=_fused_unless,
    baseline=_baseline,
    naive=_naive,
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    causal: bool = True,
    window: int = 0,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """out = softmax(scale q k^T + bias) v over the keys that each query sees; our kernels hold no T x S matrix.

    Args: q (B, T, H, D); k, v (B, S, H, D), any strides; mask (B, S) bool, False hides a key (padding); bias
    (B or 1, H or 1, T or 1, S or 1), added; causal: query i sees keys up to S - T + i; window > 0: only the last
    ``window`` of those, itself included; scale: 1 / sqrt(D) by default; dropout_p of the probabilities are dropped by
    the Philox stream of seed (1,), int64.
    Returns: out (B, T, H, D) contiguous, zeros for a query that sees nothing. Kept for the backward pass: lse
    (B, H, T), float32, the log of the sum of exponentials (the least float32 for a query that sees nothing).
    Source: Dao, arXiv:2307.08691.
    """
    B, T, H, D = q.shape
    S = k.shape[1]
    seen = visible(T, S, causal, window, mask, q.device)
    k, v = zero_unseen(seen, k, v)
    scores = _scores(widen(q), widen(k), seen, bias, scale)
    lowest = torch.finfo(torch.float32).min
    if S == 0:
        return q.new_zeros(B, T, H, D), scores.new_full((B, H, T), lowest)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    lse = torch.logsumexp(scores.masked_fill(nothing, lowest), dim=-1).clamp(min=lowest)
    probabilities = _softmax(scores, nothing)
    if dropout_p > 0:
        kept = dropout_kept(seed, dropout_p, B, H, T, S)
        probabilities = torch.where(kept, probabilities / (1 - dropout_p), 0.0)
    out = torch.einsum("bhts,bshd->bthd", probabilities, widen(v))
    return out.to(q.dtype).contiguous(), lse.contiguous()


LARGE = 256  # above this lse, e^(score - lse) has an error of more than 1.5e-5, because lse is rounded to 24 bits
# The exponential of PyTorch's fused way has an error of up to 20 ulp. It averages out in sums of many terms only, that
# is for more than this number of pairs of query and key.
FEW = 1024


def _fused_unless_backward(
    dout, q, k, v, out, lse, mask=None, bias=None, seed=None, causal=True, window=0, scale=None, dropout_p=0.0
):
    if bias is not None:
        return "PyTorch's fused attention gives no gradient of a bias"
    if window > 0:
        return "PyTorch's fused gradients under a window break the parity rule"  # dq by a fifth
    if why := _fused_unless(q, k, v, dropout_p=dropout_p):
        return why
    few = q.shape[1] * k.shape[1] <= FEW
    return f"PyTorch's fused gradients of up to {FEW} pairs of query and key break the parity rule" if few else None


def _fused_backward(
    dout, q, k, v, out, lse, mask=None, bias=None, seed=None, causal=True, window=0, scale=None, dropout_p=0.0
):
    if lse.abs().masked_fill(lse == torch.finfo(torch.float32).min, 0).max() > LARGE:  # PyTorch uses lse
        return attention_backward.reference(dout, q, k, v, out, lse, mask, None, None, causal, window, scale)
    q, k, v, is_causal, added = _sdpa_arguments(q, k, v, mask, bias, causal, window)
    dout, out = (t.contiguous().transpose(1, 2) for t in (dout, out))
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse.contiguous(), 0.0, is_causal, attn_mask=added, scale=scale
    )
    return (*(g.transpose(1, 2).contiguous() for g in gradients), q.new_empty(0))


@op(
    shapes=dict(dout="B T H D", **SHAPES, out="B T H D", lse="B H T: float32"),
    values=VALUES,
    returns="dq dk dv dbias",
    cases=CASES,
    make=MAKE,
    flops=lambda n: 10 * n["B"] * n["H"] * n["D"] * _pairs(n),
    autocast="lower",
    derivative_of=attention,
    fused=_fused_backward,
    fused_unless=_fused_unless_backward,
)
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    causal: bool = True,
    window: int = 0,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of attention, from out and lse: the probabilities are computed again, dropout regenerated from seed.

    Args: dout, out (B, T, H, D); lse (B, H, T), float32; the rest as for attention.
    Returns: dq (B, T, H, D), dk and dv (B, S, H, D), dbias in bias' shape, (0,) without one.
    """
    B, T, H, D = q.shape
    S = k.shape[1]
    seen = visible(T, S, causal, window, mask, q.device)
    wide_q, wide_dout = widen(q), widen(dout)
    wide_k, wide_v = map(widen, zero_unseen(seen, k, v))
    scores = _scores(wide_q, wide_k, seen, bias, scale)
    probabilities = _softmax(scores, (scores == -torch.inf).all(-1, keepdim=True))
    dprobabilities = torch.einsum("bthd,bshd->bhts", wide_dout, wide_v)
    dropped = probabilities
    if dropout_p > 0:
        kept = dropout_kept(seed, dropout_p, B, H, T, S)
        dropped = torch.where(kept, probabilities / (1 - dropout_p), 0.0)
        dprobabilities = torch.where(kept, dprobabilities / (1 - dropout_p), 0.0)
    dv = torch.einsum("bhts,bthd->bshd", dropped, wide_dout)
    delta = (wide_dout * widen(out)).sum(-1).transpose(1, 2)[..., None]
    dscores = probabilities * (dprobabilities - delta)
    dbias = q.new_empty(0)
    if bias is not None:
        dbias = dscores.sum_to_size(bias.shape).to(bias.dtype).contiguous()
    dscores = dscores * (D**-0.5 if scale is None else scale)
    dq = torch.einsum("bhts,bshd->bthd", dscores, wide_k)
    dk = torch.einsum("bhts,bthd->bshd", dscores, wide_q)
    return (*(g.to(q.dtype).contiguous() for g in (dq, dk, dv)), dbias)


@attention.backward("q k v mask bias seed out lse", through=[attention_backward])
def _(saved, grad):
    dq, dk, dv, dbias = attention_backward(
        grad.out, saved.q, saved.k, saved.v, saved.out, saved.lse, saved.mask, saved.bias, saved.seed,
        saved.causal, saved.window, saved.scale, saved.dropout_p,
    )  # fmt: skip
    return dict(q=dq, k=dk, v=dv, bias=dbias)
