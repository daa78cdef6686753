"""The backward pass of two linear layers with an activation between them.

The gradient before the activation is dy W^T act'(preactivation): the kernel of products reads the preactivation after
its last step and multiplies, so that the gradient behind the activation is never in memory.
"""

from ..ops.mlp import WANT, split_wants
from .common import objection
from .linear import FORMS, gradients, is_slower, matrix, product, strided, turned


def mlp_backward(dy, x, weight_in, weight_out, preactivation, hidden, bias_in=None, activation="gelu_tanh", want=WANT):
    outer, inner = split_wants(want)
    rows_dy = matrix(dy)
    _, dweight_out, dbias_out = gradients(rows_dy, matrix(hidden), weight_out, False, outer)
    dx = dweight_in = dbias_in = None
    if inner:
        before = matrix(preactivation.contiguous())
        dbefore = (dy.new_empty(preactivation.shape), *before[1:])
        product(
            rows_dy, turned(strided(weight_out)), dbefore, form=FORMS[activation], preactivation=before[0],
            backward=True,
        )  # fmt: skip
        dx, dweight_in, dbias_in = gradients(dbefore, matrix(x), weight_in, False, inner)
    none = dy.new_empty(0)
    dx = none if dx is None else dx.view(x.shape)
    return dx, *(none if found is None else found for found in (dweight_in, dweight_out, dbias_in, dbias_out))


def supports(dy, x, weight_in, weight_out, preactivation, hidden, bias_in=None, activation="gelu_tanh", want=WANT):
    return objection("mlp", dy, has_products=True)


def slower(dy, x, weight_in, weight_out, preactivation, hidden, bias_in=None, activation="gelu_tanh", want=WANT):
    return is_slower(x, weight_out, False)


KERNELS = {"mlp_backward": (mlp_backward, supports, slower)}
