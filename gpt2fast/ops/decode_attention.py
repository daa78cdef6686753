import torch
import torch.nn.functional as F
from torch import Tensor

from ..op import op
from .attention import attention, attention_backward, zero_unseen
from .common import aligned


def _lengths(shape, case, g):
    """A different number of keys for each row, between T and the capacity."""
    return torch.linspace(case["S"], max(case["T"], 1), shape[0]).long()


CASES = [
    dict(B=1, T=1, S=128, H=12, D=64),
    dict(B=8, T=1, S=512, H=12, D=64, starts=True),
    dict(B=1, T=1, S=1024, H=25, D=64),
    dict(B=3, T=4, S=70, H=3, D=80, window=9),
    dict(B=2, T=2, S=7, H=2, D=33, starts=True, scale=0.4),
    dict(B=2, T=2, S=4, H=2, D=3, starts=True),
    dict(B=0, T=1, S=8, H=2, D=64),
]


def _seen(q, k, lengths, starts, window) -> Tensor:
    """(B, 1, T, S) bools: which keys of the cache each query sees."""
    T, S = q.shape[1], k.shape[1]
    key = torch.arange(S, device=q.device)
    last = lengths[:, None, None] - T + torch.arange(T, device=q.device)[:, None]
    seen = key <= last
    if starts is not None:
        seen = seen & (key >= starts[:, None, None])
    if window > 0:
        seen = seen & (key > last - window)
    return seen[:, None]


def _for_attention(q, k, v, lengths, starts, window) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments for the op attention: k and v, with 0 where the cache is not in use, and a bias of 0 and -inf."""
    seen = _seen(q, k, lengths, starts, window)
    zero = torch.zeros((), dtype=q.dtype, device=q.device)
    return *zero_unseen(seen, k, v), zero.masked_fill(~seen, -torch.inf)


def _fused(q, k, v, lengths, starts=None, window=0, scale=None):
    T, even = q.shape[1], False
    if q.device.type == "cpu" and lengths.numel():  # on a GPU, the host would have to wait for the lengths
        shortest, longest = (int(n) for n in lengths.aminmax())
        k, v, even = k[:, :longest], v[:, :longest], shortest == longest
    seen = None
    if not (even and T == 1 and starts is None and window == 0):
        seen = _seen(q, k, lengths, starts, window)
        k, v = zero_unseen(seen, k, v)
    q, k, v = (t.transpose(1, 2) for t in aligned(q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).transpose(1, 2).contiguous()


def _fused_unless(q, k, v, lengths, starts=None, window=0, scale=None):
    return "there is nothing to attend to" if 0 in (*q.shape, *k.shape) else None


def _baseline(q, k, v, lengths, starts=None, window=0, scale=None):
    seen = _seen(q, k, lengths, starts, window)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).transpose(1, 2)


def _naive(q, k, v, lengths, starts=None, window=0, scale=None):
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~_seen(q, k, lengths, starts, window), -torch.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


@op(
    shapes=dict(q="B T H D", k="B S H D", v="B S H D", lengths="B: int64", starts="B: int64"),
    returns="out",
    cases=CASES,
    make=dict(lengths=_lengths, starts=lambda shape, case, g: torch.arange(shape[0]) % 2),
    flops=lambda n: 4 * n["B"] * n["H"] * n["T"] * n["S"] * n["D"],
    autocast="lower",
    values=dict(lengths="[0, S]", starts="[0, S]", window="[0, inf); 0: unlimited"),
    fused=_fused,
    fused_unless=_fused_unless,
    baseline=_baseline,
    naive=_naive,
)
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    starts: Tensor | None = None,
    window: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of the last T tokens over a KV cache in which row b holds ``lengths[b]`` keys, those T included.

    Args: q (B, T, H, D); k, v (B, S, H, D), any strides, S the cache's capacity; lengths (B,) int64 in [0, S]; starts
    (B,) int64, the number of leading keys that are padding; window and scale as for attention.
    Returns: out (B, T, H, D) contiguous, row by row the bits that attention gives.
    """
    k, v, hidden = _for_attention(q, k, v, lengths, starts, window)
    return attention.reference(q, k, v, bias=hidden, causal=False, scale=scale)[0]


@decode_attention.backward("q k v lengths starts", through=[attention, attention_backward])
def _(saved, grad):
    k, v, hidden = _for_attention(saved.q, saved.k, saved.v, saved.lengths, saved.starts, saved.window)
    as_called = dict(bias=hidden, causal=False, scale=saved.scale)
    out, lse = attention.overload(saved.q, k, v, **as_called)
    dq, dk, dv, _ = attention_backward(grad.out, saved.q, k, v, out, lse, **as_called)
    return dict(q=dq, k=dk, v=dv)
