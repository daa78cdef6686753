"""The activation functions that a GPT-2 config may name. The linear op computes GELU; PyTorch computes the others."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

FUSED = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
}
# The activations of the linear op: their numbers, as in Activation of csrc/ops.h, and PyTorch's name of each GELU.
FORMS = dict(none=0, gelu_tanh=1, gelu_erf=2)
APPROXIMATE = dict(gelu_tanh="tanh", gelu_erf="none")
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu_10": lambda x: F.gelu(x).clip(-10, 10),
}


def find(name: str) -> tuple[str | None, Callable[[Tensor], Tensor] | None]:
    """How to compute an activation: (the ``activation`` of ``ops.linear``, None), or (None, a function to apply after).

    Raises ValueError for an unknown name.
    """
    if name in FUSED:
        return FUSED[name], None
    if name in PLAIN:
        return None, PLAIN[name]
    known = ", ".join(sorted(FUSED | PLAIN))
    raise ValueError(f"gpt2fast.Config: activation_function must be one of {known}, got {name!r}")
