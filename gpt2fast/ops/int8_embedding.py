import torch
import torch.nn.functional as F
from torch import Tensor

from ..op import op
from ..packing import pack_int8, packed_shape, unpack_rows_int8
from .common import widen
from .embedding import CASES, MAKE


def _with_blocks(cases: list[dict]) -> list[dict]:
    return [case | dict(zip("JG", packed_shape(case["V"], case["C"], 8))) for case in cases]


@op(
    shapes=dict(
        tokens="B T: int64",
        wte="J G 512: uint8",
        scale="V: float32",
        wpe="P C",
        positions="B|1 T: int64",
        token_types="B T: int64",
    ),
    cases=_with_blocks(CASES),
    make=MAKE
    | dict(
        wte=lambda shape, case, g: pack_int8(torch.randn(case["V"], case["C"], generator=g))[0],
        scale=lambda shape, case, g: (0.5 + torch.rand(shape, generator=g)) / 40,
    ),
    flops=lambda n: n["B"] * n["T"] * n["C"],
    values=dict(tokens="[0, V)", positions="[0, P) else start + T", token_types="[0, V)"),
    derivative=False,
)
def int8_embedding(
    tokens: Tensor,
    wte: Tensor,
    scale: Tensor,
    wpe: Tensor,
    positions: Tensor | None = None,
    token_types: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """y = wte[tokens] + wpe[positions] (+ wte[token_types]) for a table wte packed in 8 bits; summed in float32.

    Args: tokens, token_types (B, T), int64 in [0, V); wte (ceil(V / 16), ceil(C / 32), 512) uint8 and scale (V,)
    float32 from ``packing.pack_int8``; wpe (P, C); positions (B, T) or (1, T), int64 in [0, P); without them start,
    start + 1, ... Returns: (B, T, C) in wpe's dtype. There is no derivative.
    Errors: a token or position out of range.
    """
    V, C = len(scale), wpe.shape[1]
    if wte.shape[:2] != packed_shape(V, C, 8)[:2]:
        J, G, _ = packed_shape(V, C, 8)
        raise ValueError(
            f"gpt2fast::int8_embedding: wte must have {J} blocks of 16 rows and {G} groups of 32 columns for {V} rows "
            f"and {C} columns, got {wte.shape[0]} and {wte.shape[1]}"
        )
    if positions is None:
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
    y = unpack_rows_int8(wte, scale, C, tokens) + widen(F.embedding(positions, wpe))
    if token_types is not None:
        y = y + unpack_rows_int8(wte, scale, C, token_types)
    return y.to(wpe.dtype).contiguous()
