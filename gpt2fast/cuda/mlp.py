"""mlp_backward by the products of csrc/cuda/linear.cu. gpt2fast/products.py puts them together."""

from functools import partial

from .. import products
from ..ops.mlp import WANT
from .library import objection
from .linear import is_slower, prepare


def supports(dy, x, weight_in, weight_out, preactivation, hidden, bias_in=None, activation="gelu_tanh", want=WANT):
    return objection("mlp", dy)


def slower(dy, x, weight_in, weight_out, preactivation, hidden, bias_in=None, activation="gelu_tanh", want=WANT):
    return is_slower(x, weight_out, False)


mlp_backward = partial(products.mlp_backward, prepare)
KERNELS = {"mlp_backward": (mlp_backward, supports, slower)}
