import torch
import torch.nn.functional as F
from torch import Tensor

from ..op import op
from .common import widen


def _integers(high):
    return lambda shape, case, g: torch.randint(0, case[high], shape, generator=g)


CASES = [
    dict(B=1, T=1, C=768, V=1000, P=1024, start=37),
    dict(B=4, T=512, C=768, V=50257, P=1024),
    dict(B=1, T=16, C=1600, V=1000, P=1024, positions=True),
    dict(B=2, T=5, C=770, V=100, P=8, positions=True, token_types=True),
    dict(B=2, T=3, C=5, V=7, P=4, start=1),
    dict(B=2, T=3, C=5, V=7, P=4, positions=True, token_types=True),
    dict(B=0, T=3, C=768, V=10, P=8),
]
MAKE = dict(tokens=_integers("V"), positions=_integers("P"), token_types=_integers("V"))


def _positions(positions: Tensor | None, start: int, T: int, device: torch.device) -> Tensor:
    return torch.arange(start, start + T, device=device) if positions is None else positions


def _fused(tokens, wte, wpe, positions=None, token_types=None, start=0):
    y = F.embedding(tokens, wte) + F.embedding(_positions(positions, start, tokens.shape[1], tokens.device), wpe)
    return y if token_types is None else y + F.embedding(token_types, wte)


def _naive(tokens, wte, wpe, positions=None, token_types=None, start=0):
    y = wte[tokens] + wpe[_positions(positions, start, tokens.shape[1], tokens.device)]
    return y if token_types is None else y + wte[token_types]


@op(
    shapes=dict(tokens="B T: int64", wte="V C", wpe="P C", positions="B|1 T: int64", token_types="B T: int64"),
    cases=CASES,
    make=MAKE,
    flops=lambda n: n["B"] * n["T"] * n["C"],
    values=dict(tokens="[0, V)", positions="[0, P) else start + T", token_types="[0, V)"),
    fused=_fused,
    naive=_naive,
)
def embedding(
    tokens: Tensor,
    wte: Tensor,
    wpe: Tensor,
    positions: Tensor | None = None,
    token_types: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """y = wte[tokens] + wpe[positions] (+ wte[token_types]), summed in float32 and rounded once.

    Args: tokens, token_types (B, T), int64 in [0, V); wte (V, C); wpe (P, C); positions (B, T) or (1, T), int64 in
    [0, P); without them start, start + 1, ... Returns: (B, T, C) in wte's dtype.
    Errors: a token or position out of range.
    """
    y = widen(F.embedding(tokens, wte))
    y = y + widen(F.embedding(_positions(positions, start, tokens.shape[1], tokens.device), wpe))
    if token_types is not None:
        y = y + widen(F.embedding(token_types, wte))
    return y.to(wte.dtype).contiguous()


def _fused_backward(dy, tokens, V, P, positions=None, token_types=None, start=0):
    B, T, C = dy.shape
    rows = dy.reshape(-1, C)

    def scatter(count: int, *indices: Tensor) -> Tensor:
        if dy.dtype not in (torch.bfloat16, torch.float16):  # PyTorch's op would sum 16-bit numbers in 16 bits
            parts = [torch.ops.aten.embedding_dense_backward(dy, index, count, -1, False) for index in indices]
            return parts[0] if len(parts) == 1 else parts[0] + parts[1]
        used, where = torch.cat([index.reshape(-1) for index in indices]).unique(return_inverse=True)
        sums = rows.new_zeros(len(used), C, dtype=torch.float32)
        sums.index_add_(0, where, rows.float() if len(indices) == 1 else rows.float().repeat(2, 1))
        return rows.new_zeros(count, C).index_copy_(0, used, sums.to(dy.dtype))

    dwte = scatter(V, tokens, *([] if token_types is None else [token_types]))
    if positions is not None:
        return dwte, scatter(P, positions.expand(B, T))
    dwpe = rows.new_zeros(P, C)
    dwpe[start : start + T] = dy.sum(0)
    return dwte, dwpe


@op(
    shapes=dict(dy="B T C", tokens="B T: int64", positions="B|1 T: int64", token_types="B T: int64"),
    returns="dwte dwpe",
    cases=CASES,
    make=MAKE,
    flops=lambda n: 2 * n["B"] * n["T"] * n["C"],
    derivative_of=embedding,
    fused=_fused_backward,
)
def embedding_backward(
    dy: Tensor,
    tokens: Tensor,
    V: int,
    P: int,
    positions: Tensor | None = None,
    token_types: Tensor | None = None,
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Gradients of embedding: rows of dy summed into the rows they came from, in float32, in a fixed order.

    Args: dy (B, T, C); the rest as for embedding, V and P the numbers of rows. Returns: dwte (V, C), dwpe (P, C).
    """
    B, T, C = dy.shape
    wide = widen(dy)
    positions = _positions(positions, start, T, dy.device).expand(B, T)

    def scatter(rows: int, *indices: Tensor) -> Tensor:
        out = wide.new_zeros(rows, C)
        for index in indices:
            out.index_add_(0, index.reshape(-1), wide.reshape(-1, C))
        return out.to(dy.dtype)

    return scatter(V, tokens, *([] if token_types is None else [token_types])), scatter(P, positions)


@embedding.backward("tokens positions token_types wte wpe", through=[embedding_backward])
def _(saved, grad):
    dwte, dwpe = embedding_backward(
        grad.y, saved.tokens, saved.wte.shape[0], saved.wpe.shape[0], saved.positions, saved.token_types, saved.start
    )
    return dict(wte=dwte, wpe=dwpe)
