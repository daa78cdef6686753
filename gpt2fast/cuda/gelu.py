"""gelu, bias_gelu and their gradient by csrc/cuda/gelu.cu."""

from ..activations import APPROXIMATE, FORMS
from ..tensors import dense_rows, empty_as
from .library import DTYPES, call, objection

SOURCE = "gelu.cu"
FORM_OF = {approximate: FORMS[name] for name, approximate in APPROXIMATE.items()}


def _forward(x, bias, approximate):
    y = empty_as(x)
    C = x.shape[-1]
    x, stride = dense_rows(x)
    bias = None if bias is None else bias.contiguous()
    R = x.numel() // max(C, 1)
    call(SOURCE, "gpt2fast_gelu", x, bias, y, R, C, stride, FORM_OF[approximate], DTYPES[x.dtype])
    return y


def gelu(x, approximate="tanh"):
    return _forward(x, None, approximate)


def bias_gelu(x, bias, approximate="tanh"):
    return _forward(x, bias, approximate)


def gelu_backward(dy, x, approximate="tanh"):
    dx = empty_as(x)
    C = x.shape[-1]
    (dy, stride_dy), (x, stride_x) = dense_rows(dy), dense_rows(x)
    form, R = FORM_OF[approximate], x.numel() // max(C, 1)
    call(SOURCE, "gpt2fast_gelu_backward", dy, x, dx, R, C, stride_dy, stride_x, form, DTYPES[x.dtype])
    return dx


def supports(x, approximate="tanh"):
    return objection("GELU", x)


def supports_bias(x, bias, approximate="tanh"):
    return objection("GELU", x)


def supports_backward(dy, x, approximate="tanh"):
    return objection("GELU", x)


KERNELS = {
    "gelu": (gelu, supports),
    "bias_gelu": (bias_gelu, supports_bias),
    "gelu_backward": (gelu_backward, supports_backward),
}
