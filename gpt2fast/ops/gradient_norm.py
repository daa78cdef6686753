import torch
from torch import Tensor

from ..op import op
from .common import elements, wide_dtype, widen

EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_
CASES = [
    dict(each=[(768, 2304), (2304,), (768,)], max_norm=1.0),
    dict(each=[(33, 5), (4099,), (1,), (0, 3)], max_norm=1e9),
    dict(each=[(4,)], max_norm=0.0),
]


def _fused(gradients, max_norm=1.0):
    # _foreach_norm is not used: on a CPU, its error grows with the number of elements.
    norm = torch.stack([widen(g).square().sum() for g in gradients]).sum().sqrt()
    return norm, (max_norm / (norm + EPS)).clamp(max=1.0)


@op(
    shapes=dict(gradients="each"),
    returns="norm factor",
    cases=CASES,
    values=dict(max_norm="[0, inf)"),
    flops=lambda n: 2 * elements(n),
    derivative=False,
    fused=_fused,
)
def gradient_norm(gradients: list[Tensor], max_norm: float = 1.0) -> tuple[Tensor, Tensor]:
    """The norm of many tensors as of one vector, and the factor that brings it down to ``max_norm``, at most 1.

    Args: gradients, a list of at least one tensor, of one dtype. Returns: norm and factor, both (), float32. They stay
    on the device, and the host does not wait for them: ``adamw_`` takes the factor as its ``scale``. The factor is that
    of clip_grad_norm_, max_norm / (norm + 1e-6).
    """
    total = sum(widen(g).double().square().sum() for g in gradients)
    norm = torch.as_tensor(total, device=gradients[0].device).sqrt().to(wide_dtype(gradients[0]))
    return norm, (max_norm / (norm + EPS)).clamp(max=1.0)
