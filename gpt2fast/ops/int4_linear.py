from torch import Tensor

from ..op import op
from ..packing import pack_int4, round_inputs, unpack_int4
from .int8_linear import SIZES, check_blocks, drawn_weight, finish, with_packed_sizes


@op(
    shapes=dict(x="... K", weight="J G 288: uint8", bias="N", residual="... N"),
    values=dict(activation="none | gelu_tanh | gelu_erf"),
    cases=with_packed_sizes(SIZES, 4),
    make=dict(weight=lambda shape, case, g: pack_int4(drawn_weight(case, g))),
    flops=lambda n: 2 * n["B"] * n["T"] * n["K"] * n["N"],
    derivative=False,
)
def int4_linear(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """y = activation(x^ @ W + bias) + residual for a weight packed in 4 bits; x^ is x rounded to 8 bits.

    Args: x (..., K), which is rounded in pieces of 128 inputs (``packing.round_inputs``); weight (ceil(N / 16),
    ceil(K / 32), 288) uint8 from ``packing.pack_int4``, with its scales; bias (N,); residual (..., N); activation
    ``"none"``, ``"gelu_tanh"`` or ``"gelu_erf"``.
    Returns: y (..., N) in x's dtype. Products and sums of a group are exact integers. There is no derivative.
    """
    check_blocks("gpt2fast::int4_linear", weight, len(bias), x.shape[-1], 4)
    rounded = round_inputs(x)
    product = rounded @ unpack_int4(weight, len(bias), x.shape[-1], rounded.dtype).t()
    return finish(product, bias, residual, activation, x.dtype)
