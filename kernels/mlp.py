"""The backward pass of two linear layers with an activation between them.

The gradient before the activation is dy W^T act'(preactivation): the kernel of products reads the preactivation after
its last step and multiplies, so that the gradient behind the activation is never in memory.
"""

import torch

from ..ops.mlp import WANT, split_wants
from .common import objection
from .linear import FORMS, _matrix, is_slower, linear_backward, product


def mlp_backward(dy, x, weight_in, weight_out, preactivation, hidden, bias_in=None, activation="gelu_tanh", want=WANT):
    outer, inner = split_wants(want)
    _, dweight_out, dbias_out = linear_backward(dy, hidden, weight_out, want=outer)
    dx, dweight_in, dbias_in = (dy.new_empty(0) for _ in range(3))
    if inner:
        dbefore = torch.empty_like(preactivation, memory_format=torch.contiguous_format)
        product(
            _matrix(dy), weight_out.t(), _matrix(dbefore), form=FORMS[activation],
            preactivation=preactivation.contiguous(), backward=True,
        )  # fmt: skip
        dx, dweight_in, dbias_in = linear_backward(dbefore, x, weight_in, want=inner)
    return dx, dweight_in, dweight_out, dbias_in, dbias_out


def supports(dy, x, weight_in, weight_out, preactivation, hidden, bias_in=None, activation="gelu_tanh", want=WANT):
    return objection("mlp", dy, has_products=True)


def slower(dy, x, weight_in, weight_out, preactivation, hidden, bias_in=None, activation="gelu_tanh", want=WANT):
    return is_slower(x, weight_out, False)


KERNELS = {"mlp_backward": (mlp_backward, supports, slower)}
