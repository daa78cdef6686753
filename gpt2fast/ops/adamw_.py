import torch
from torch import Tensor

from ..op import op
from .common import elements, philox, widen

CASES = [
    dict(each=[(768, 2304), (2304,), (768,)], step=1),
    dict(each=[(33, 5), (4099,), (1,), (0, 3), (2, 3, 4)], step=7, weight_decay=0.1, scale=True),
    dict(each=[(8,), (5000,)], step=1000, beta1=0.8, beta2=0.95, eps=1e-3, lr=0.1),
    dict(each=[(70, 70), (5,)], step=3, seed=True),
    dict(each=[(300,), (7, 9)], step=1, first=True),
    dict(each=[(4,)], step=2, lr=0.0),
]


def _moment(shape, case, g):
    """Numbers of at least 0, as the second moment needs; 0 before the first step."""
    return torch.zeros(shape) if case.get("first") else torch.rand(shape, generator=g)


MAKE = dict(
    exp_avgs=_moment,
    exp_avg_sqs=_moment,
    step=lambda shape, case, g: torch.tensor(float(case["step"])),
    scale=lambda shape, case, g: torch.tensor(0.37),
    seed=lambda shape, case, g: torch.tensor([-8446744073709551616]),
)
VALUES = dict(lr="[0, inf)", beta1="[0, 1)", beta2="[0, 1)", eps="[0, inf)", weight_decay="[0, inf)")
ADAM = dict(
    weights="each", gradients="each", exp_avgs="each: float32", exp_avg_sqs="each: float32", step=": float32",
    scale=": float32", seed="1: int64",
)  # fmt: skip


def _rounded(x: Tensor, dtype: torch.dtype, seed: Tensor | None, tensor: int, step: Tensor) -> Tensor:
    """Rounds x to ``dtype``. With ``seed``, it rounds to bfloat16 up or down at random, so that the mean is x.

    Element e of a tensor uses the upper half of word e % 4 of the Philox block with counter (e / 4, tensor + 2^32
    step).
    """
    if seed is None or dtype != torch.bfloat16 or not x.numel():
        return x.to(dtype)
    high = tensor + (step.to(torch.int64) << 32)
    words = torch.stack(philox(seed, torch.arange(-(-x.numel() // 4), device=x.device), high), -1)
    noise = (words.flatten()[: x.numel()] >> 16).to(torch.int32).view(x.shape)
    bits = x.contiguous().view(torch.int32)
    up = ((bits + noise) & -65536).view(torch.float32)  # bfloat16 has only the upper 16 bits
    return torch.where(x.isfinite(), up, x).to(dtype)


def _fused(
    weights, gradients, exp_avgs, exp_avg_sqs, step, scale=None, seed=None, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8,
    weight_decay=0.01,
):  # fmt: skip
    if scale is not None:
        gradients = torch._foreach_mul(gradients, scale)
    torch._fused_adamw_(
        weights, gradients, exp_avgs, exp_avg_sqs, [], [step] * len(weights), lr=lr, beta1=beta1, beta2=beta2,
        weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip


def _fused_unless(
    weights, gradients, exp_avgs, exp_avg_sqs, step, scale=None, seed=None, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8,
    weight_decay=0.01,
):  # fmt: skip
    if not weights or weights[0].dtype != torch.float32:
        return "PyTorch's fused AdamW keeps moments in the weights' dtype, which is not float32 here"
    if not all(t.is_contiguous() for t in (*weights, *gradients, *exp_avgs, *exp_avg_sqs)):
        return "PyTorch's fused AdamW takes the numbers of dense tensors only for what they are"
    return None if weights[0].device.type in ("cpu", "cuda") else "PyTorch has no fused AdamW there"


@op(
    shapes=ADAM,
    mutates=("weights", "exp_avgs", "exp_avg_sqs"),
    cases=CASES,
    make=MAKE,
    values=VALUES,
    flops=lambda n: 14 * elements(n),
    fused=_fused,
    fused_unless=_fused_unless,
)
def adamw_(
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: Tensor,
    scale: Tensor | None = None,
    seed: Tensor | None = None,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> None:
    """One step of AdamW on many tensors at once: weights and both moments change in place, all is computed in float32.

    Args: weights and gradients, lists of tensors of one dtype; exp_avgs, exp_avg_sqs, lists of the moments, float32;
    step (), float32: the number of this step, from 1 on; scale (), float32: a factor on the gradients, such as that of
    ``gradient_norm``; seed (1,), int64: with it, weights in bfloat16 are rounded up or down at random, so that updates
    smaller than a rounding step are not lost on average. Other dtypes are rounded to the nearest.
    Source: Loshchilov and Hutter, 2019.
    """
    steps = step.double()
    correction1, correction2 = 1 - beta1**steps, (1 - beta2**steps).sqrt()
    for i, (weight, gradient, m, v) in enumerate(zip(weights, gradients, exp_avgs, exp_avg_sqs)):
        wide, g = widen(weight), widen(gradient)
        g = g if scale is None else g * scale
        m.copy_(m + (1 - beta1) * (g - m))
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        denominator = (v.sqrt() / correction2.to(v.dtype) + eps) * correction1.to(v.dtype)
        new = wide * (1 - lr * weight_decay) - lr * m / denominator
        weight.copy_(_rounded(new, weight.dtype, seed, i, step))
