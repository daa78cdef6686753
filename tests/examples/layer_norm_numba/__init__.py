"""A backend of one's own: numba, with a kernel of gpt2fast's layer_norm for CPU tensors.

Importing this registers it; ``gpt2fast.use_backend("numba")`` runs it, ``gpt2fast.backends.unregister("numba")`` takes
it away again. numba is imported by the first call.
"""

import importlib.util

import torch

from gpt2fast import ops
from gpt2fast.backends import Backend, register


def reason():
    return None if importlib.util.find_spec("numba") else "numba is not installed; pip install numba"


def layer_norm(x, weight, bias, eps=1e-5):
    from .rows import normalise

    wide = x.float().reshape(-1, x.shape[-1]).contiguous()  # numba has no 16-bit numbers
    y, mean, rstd = torch.empty_like(wide), wide.new_empty(len(wide)), wide.new_empty(len(wide))
    tensors = (wide, weight.float().contiguous(), bias.float().contiguous(), y, mean, rstd)
    normalise(*(t.detach().numpy() for t in tensors), eps)
    return y.to(x.dtype).view(x.shape), mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])


def supports(x, weight, bias, eps=1e-5):
    return "layer_norm in numba computes in float32, got float64" if x.dtype == torch.float64 else None


register(Backend("numba", ("cpu",), reason, what="loops in Python that numba compiles"))
ops.layer_norm.kernel("numba", layer_norm, supports)
