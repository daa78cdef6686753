"""gradient_norm by csrc/cuda/gradient_norm.cu. The host does not wait for the result."""

import torch

from ..ops.gradient_norm import EPS
from ..tensor_lists import objection_to_lists, tables
from .library import DTYPES, call, objection

SOURCE = "gradient_norm.cu"
BLOCK = 8192  # numbers of a block: kNormNumbers in csrc/cuda/kernels.h


def gradient_norm(gradients, max_norm=1.0):
    found = tables(BLOCK, gradients)
    if found is None:
        gradients = [g.contiguous() for g in gradients]
        found = tables(BLOCK, gradients)
    norm, factor = (torch.empty((), dtype=torch.float32, device=gradients[0].device) for _ in range(2))
    squares = norm.new_empty(found.count)
    call(
        SOURCE, "gpt2fast_gradient_norm", found.tensors, found.programs, squares, norm, factor, found.count,
        int(found.aligned), float(max_norm), EPS, DTYPES[gradients[0].dtype],
    )  # fmt: skip
    return norm, factor


def supports(gradients, max_norm=1.0):
    return objection_to_lists("CUDA", objection, "a norm", gradients)


KERNELS = {"gradient_norm": (gradient_norm, supports)}
