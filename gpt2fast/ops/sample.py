import torch
from torch import Tensor

from ..op import op
from .common import uniform53, widen

CASES = [
    dict(B=1, T=4, V=50257),
    dict(B=4, T=16, V=50257, tokens=True, temperature=0.8, top_k=50, top_p=0.9, repetition_penalty=1.2),
    dict(B=2, T=4, V=50257, temperature=0.7, top_p=0.95),
    dict(B=3, T=5, V=1000, tokens=True, rows=True, min_p=0.05, repetition_penalty=0.9),
    dict(B=3, T=5, V=770, temperature=0.0, tokens=True, repetition_penalty=1.5),
    dict(B=2, T=3, V=7, top_k=3),
    dict(B=0, T=3, V=50257),
]
MAKE = dict(
    tokens=lambda shape, case, g: torch.randint(-1, case["V"], shape, generator=g),
    seed=lambda shape, case, g: torch.tensor([-8446744073709551616]),
    positions=lambda shape, case, g: torch.arange(shape[0]) + 5,
    rows=lambda shape, case, g: torch.arange(shape[0]) * 3,
    logits=lambda shape, case, g: 3 * torch.randn(shape, generator=g),
)
VALUES = dict(
    V="[1, inf)",
    logits="drawable if temperature",
    tokens="[0, V) or -1",
    temperature="[0, inf); 0: the likeliest token",
    top_k="[0, inf); 0: off",
    top_p="(0, 1]",
    min_p="[0, 1]",
    repetition_penalty="(0, inf)",
)


@op(
    shapes=dict(
        logits="B V", seed="1: int64", positions="B: int64", tokens="B T: int64", rows="B: int64"
    ),
    returns="out",
    cases=CASES,
    make=MAKE,
    flops=lambda n: 4 * n["B"] * n["V"],
    derivative=False,
    values=VALUES,  # no fused=: PyTorch has no such op, and another composition of its ops would draw other tokens
)  # fmt: skip
def sample(
    logits: Tensor,
    seed: Tensor,
    positions: Tensor,
    tokens: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Tensor:
    """Draws a token per row: repetition penalty, temperature, top-k, top-p, min-p (transformers' order), then one draw.

    Args: logits (B, V); seed (1,), positions and rows (B,), int64: the draw of a row is a function of (seed, rows[b],
    positions[b]), rows by default 0 ... B - 1; tokens (B, T), int64, the earlier ones, -1 for none; temperature 0
    takes the likeliest; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off.
    Returns: (B,) int64. Errors: no logits or NaN among them, a token or a parameter out of range.
    """
    B, V = logits.shape
    scores = widen(logits)
    if tokens is not None and repetition_penalty != 1:
        seen = torch.zeros(B, V + 1, dtype=torch.bool, device=logits.device)
        seen = seen.scatter(1, torch.where(tokens < 0, V, tokens), True)[:, :V]
        scores = torch.where(
            seen, torch.where(scores < 0, scores * repetition_penalty, scores / repetition_penalty), scores
        )
    if temperature == 0:
        return scores.argmax(-1)
    scores = scores / temperature
    if 0 < top_k < V:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ascending, order = scores.sort(dim=-1, stable=True)  # stable: among equal scores the first one is dropped first
        below = ascending.double().softmax(-1).cumsum(-1) <= 1 - top_p
        below = below & (torch.arange(V, device=logits.device) < V - 1)
        scores = scores.masked_fill(torch.zeros_like(below).scatter(1, order, below), -torch.inf)
    if min_p > 0:
        probabilities = scores.softmax(-1)
        scores = scores.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), -torch.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)).double().cumsum(-1)
    row = torch.arange(B, device=logits.device) if rows is None else rows
    uniform = uniform53(seed, positions, row)[:, None] * weights[:, -1:]
    return torch.searchsorted(weights, uniform, right=True)[:, 0].clamp(max=V - 1)
