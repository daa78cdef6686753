import torch
from torch import Tensor

from ..op import op
from ..packing import pack_int8, packed_shape, round_inputs, unpack_int8
from .common import widen
from .linear import activate

SIZES = [
    dict(B=1, T=1, K=768, N=2304, bias=True),
    dict(B=8, T=1, K=768, N=3072, bias=True, activation="gelu_tanh"),
    dict(B=1, T=130, K=3072, N=768, bias=True, residual=True),
    dict(B=2, T=5, K=770, N=771, bias=True, activation="gelu_erf", residual=True),
    dict(B=1, T=7, K=1600, N=37, bias=True),
    dict(B=2, T=3, K=5, N=4, bias=True, residual=True, activation="gelu_tanh"),
    dict(B=0, T=3, K=768, N=768, bias=True),
]


def with_packed_sizes(cases: list[dict], bits: int) -> list[dict]:
    """The cases with the numbers of blocks J and groups G that N outputs and K inputs take."""
    return [case | dict(zip("JG", packed_shape(case["N"], case["K"], bits))) for case in cases]


def drawn_weight(case: dict, g: torch.Generator) -> Tensor:
    """A weight (N, K) of random normals divided by sqrt(K), so that the outputs are of order one."""
    return torch.randn(case["N"], case["K"], generator=g) * case["K"] ** -0.5


def check_blocks(op: str, weight: Tensor, N: int, K: int, bits: int) -> None:
    """Raises ValueError where a packed weight does not have the blocks and groups of N outputs and K inputs."""
    J, G, _ = packed_shape(N, K, bits)
    if weight.shape[:2] != (J, G):
        raise ValueError(
            f"{op}: weight must have {J} blocks of 16 outputs and {G} groups of 32 inputs for {N} outputs and {K} "
            f"inputs, got {weight.shape[0]} and {weight.shape[1]}"
        )


def finish(product: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, dtype: torch.dtype):
    """activation(product + bias) + residual, in product's dtype and then rounded to ``dtype``."""
    y = product if bias is None else product + widen(bias)
    y = activate(y, activation)
    return (y if residual is None else y + widen(residual)).to(dtype).contiguous()


@op(
    shapes=dict(x="... K", weight="J G 512: uint8", scale="N: float32", bias="N", residual="... N"),
    values=dict(activation="none | gelu_tanh | gelu_erf"),
    cases=with_packed_sizes([*SIZES, dict(B=1, T=1, K=768, N=50257)], 8),
    make=dict(
        weight=lambda shape, case, g: pack_int8(drawn_weight(case, g))[0],
        scale=lambda shape, case, g: (0.5 + torch.rand(shape, generator=g)) * case["K"] ** -0.5 / 40,
    ),
    flops=lambda n: 2 * n["B"] * n["T"] * n["K"] * n["N"],
    derivative=False,
)
def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """y = activation(x^ @ W + bias) + residual for a weight packed in 8 bits; x^ is x rounded to 8 bits.

    Args: x (..., K), which is rounded in pieces of 128 inputs (``packing.round_inputs``); weight (ceil(N / 16),
    ceil(K / 32), 512) uint8 and scale (N,) float32 from ``packing.pack_int8``; bias (N,); residual (..., N);
    activation ``"none"``, ``"gelu_tanh"`` or ``"gelu_erf"``.
    Returns: y (..., N) in x's dtype. Products and sums of a piece are exact integers. There is no derivative.
    """
    check_blocks("gpt2fast::int8_linear", weight, len(scale), x.shape[-1], 8)
    product = round_inputs(x) @ unpack_int8(weight, scale, x.shape[-1]).t()
    return finish(product, bias, residual, activation, x.dtype)
