"""The backward pass of two linear layers with an activation between them. Its products are those of linear.py."""

from functools import partial

from .. import products
from ..ops.mlp import WANT
from .common import objection
from .linear import is_slower, prepare


def supports(dy, x, weight_in, weight_out, preactivation, hidden, bias_in=None, activation="gelu_tanh", want=WANT):
    return objection("mlp", dy, has_products=True)


def slower(dy, x, weight_in, weight_out, preactivation, hidden, bias_in=None, activation="gelu_tanh", want=WANT):
    return is_slower(x, weight_out, False)


mlp_backward = partial(products.mlp_backward, prepare)
KERNELS = {"mlp_backward": (mlp_backward, supports, slower)}
