"""adamw_ by csrc/cuda/adamw.cu: one launch for all tensors."""

import math

from ..tensor_lists import objection_to_lists, tables
from .library import DTYPES, call, objection

SOURCE = "adamw.cu"
BLOCK = 2048  # numbers of a block: kAdamwNumbers in csrc/cuda/kernels.h


def adamw_(
    weights, gradients, exp_avgs, exp_avg_sqs, step, scale=None, seed=None, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8,
    weight_decay=0.01,
):  # fmt: skip
    found = tables(BLOCK, weights, gradients, exp_avgs, exp_avg_sqs)
    if found is None:
        gradients = [g.contiguous() for g in gradients]
        found = tables(BLOCK, weights, gradients, exp_avgs, exp_avg_sqs)
    logs = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
    numbers = (lr, beta2, 1 - beta1, 1 - beta2, *logs, eps, 1 - lr * weight_decay)
    call(
        SOURCE, "gpt2fast_adamw_", found.tensors, found.programs, step, scale, seed, found.count, int(found.aligned),
        *map(float, numbers), DTYPES[weights[0].dtype],
    )  # fmt: skip


def supports(
    weights, gradients, exp_avgs, exp_avg_sqs, step, scale=None, seed=None, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8,
    weight_decay=0.01,
):  # fmt: skip
    return objection_to_lists("CUDA", objection, "AdamW", gradients, weights, exp_avgs, exp_avg_sqs)


KERNELS = {"adamw_": (adamw_, supports)}
