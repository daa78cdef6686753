"""linear and its gradients by csrc/cuda/linear.cu, which has one kernel for the product of any two matrices."""

from functools import partial

from .. import products
from .library import DTYPES, call, objection

SOURCE = "linear.cu"
# The products that measured faster than PyTorch's on a GPU: (compute capability, dtype, rows, K, N). None so far.
MEASURED_FASTER: frozenset[tuple] = frozenset()


def prepare(dtype, a, b, out, stride_residual=0, form=0, backward=False, which=0):
    """``prepare`` of gpt2fast/products.py. ``launch`` passes the fields of ProductArgs in csrc/ops.h, in order."""
    (M, K, *strides_a), (_, N, *strides_b) = a, b
    sizes = M, K, N, *strides_a, *strides_b, stride_residual, out.stride, int(backward), int(which == 2)

    def launch(a, b, out, bias=None, residual=None, preactivation=None, sums=None):
        call(
            SOURCE, "gpt2fast_product", a, b, bias, residual, out, preactivation, sums, *sizes, int(out.dtype != dtype),
            form, DTYPES[dtype],
        )  # fmt: skip

    return launch


def is_slower(x, weight, transposed):
    return products.is_slower(MEASURED_FASTER, x, weight, transposed)


def supports(x, weight, bias=None, residual=None, activation="none", transposed=False, keep_preactivation=False):
    return objection("linear", x)


def slower(x, weight, bias=None, residual=None, activation="none", transposed=False, keep_preactivation=False):
    return is_slower(x, weight, transposed)


def supports_backward(dy, x, weight, transposed=False, want="dx dweight dbias"):
    return objection("linear", dy)


def slower_backward(dy, x, weight, transposed=False, want="dx dweight dbias"):
    return is_slower(x, weight, transposed)


linear, linear_backward = partial(products.linear, prepare), partial(products.linear_backward, prepare)
KERNELS = {
    "linear": (linear, supports, slower),
    "linear_backward": (linear_backward, supports_backward, slower_backward),
}
