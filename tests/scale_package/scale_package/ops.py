from torch import Tensor

from gpt2fast import op


@op(
    shapes=dict(x="... C", scale="C", bias="C", residual="... C"),
    cases=[dict(B=2, T=7, C=768), dict(B=3, T=5, C=33), dict(B=1, T=1, C=1), dict(B=0, T=3, C=5)],
    derivative=False,
    namespace="scale_bias_add",
)
def scale_bias_add(x: Tensor, scale: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """y = x * scale + bias + residual."""
    y = x.float() * scale.float() + bias.float() + residual.float()
    return y.to(x.dtype).contiguous()


@op(
    shapes=dict(x="... C"),
    cases=[dict(B=2, T=7, C=8, factor=2.0)],
    values=dict(factor="[0, inf)"),
    mutates=["x"],
    namespace="scale_package",
)
def scale_(x: Tensor, factor: float, times: int | None = None) -> None:
    """x *= factor * times."""
    x.mul_(factor * (1 if times is None else times))


@op(
    shapes=dict(tokens="B T : int64"),
    cases=[dict(B=2, T=7)],
    returns="next after",
    derivative=False,
    namespace="scale_package",
)
def next_two(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """tokens + 1 and tokens + 2."""
    return tokens + 1, tokens + 2
