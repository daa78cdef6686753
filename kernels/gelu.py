"""y = gelu(x), y = gelu(x + bias), and the gradient dx = dy gelu'(x). Arithmetic is float32; results are rounded once.

    gelu(x) = x (1 + tanh(u)) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3)        the tanh form
    gelu(x) = x (1 + erf(x / sqrt(2))) / 2                                    the exact form

A program has one tile of rows and columns. A contiguous x without a bias counts as one long row, whatever its shape.
The floor is memory traffic: each element is read once and written once. The kernels move no more than that, as counted
in docs/kernels.md.
"""

import functools
import math

import triton
import triton.language as tl

from ..tensors import dense_rows, empty_as
from .common import objection

# TILE: elements of a tile. WIDEST: the most columns of a tile with several rows; at least 16 rows share a load of bias.
TILE, WIDEST, WARPS = 4096, 256, 4
LOG2E = tl.constexpr(1 / math.log(2))
TWICE_SLOPE = tl.constexpr(2 * math.sqrt(2 / math.pi))  # 2 u'(0)
TO_EXPONENT = tl.constexpr(2 * math.sqrt(2 / math.pi) / math.log(2))  # e^(2 u) = 2^(TO_EXPONENT (x + CUBIC x^3))
CUBIC = tl.constexpr(0.044715)
SQRT_HALF = tl.constexpr(math.sqrt(0.5))
DENSITY_AT_0 = tl.constexpr(1 / math.sqrt(2 * math.pi))
FLAT = tl.constexpr(10.0)  # above it the derivative is 1 in float32; below -FLAT its magnitude is less than 1e-20


@triton.jit
def _odds(x):
    """e^(-2 u), with u the argument of tanh. (1 + tanh(u)) / 2 is 1 / (1 + e^(-2 u)), which is accurate in
    both tails."""
    return tl.exp2(x * (-TO_EXPONENT - (TO_EXPONENT * CUBIC) * (x * x)))


@triton.jit
def _gelu(x, TANH: tl.constexpr):
    if TANH:
        y = x / (1.0 + _odds(x))
    else:
        y = x * (0.5 + 0.5 * tl.erf(x * SQRT_HALF))
    return y


@triton.jit
def _derivative(x, TANH: tl.constexpr):
    near = tl.where(x > FLAT, FLAT, x)  # powers of larger numbers would overflow, and infinity times 0 is NaN
    near = tl.where(x < -FLAT, -FLAT, near)
    if TANH:
        odds = _odds(near)
        share = 1.0 / (1.0 + odds)
        # share odds is 1 - share, but the difference would have no digits left where share is near 1.
        slope = near * (share * (share * odds)) * (TWICE_SLOPE + (3.0 * CUBIC * TWICE_SLOPE) * (near * near))
    else:
        share = 0.5 + 0.5 * tl.erf(near * SQRT_HALF)
        slope = near * DENSITY_AT_0 * tl.exp2((-0.5 * LOG2E) * (near * near))
    return tl.where(x < -FLAT, 0.0, share + slope)


@triton.jit
def _tile(R, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The rows and columns of this program's tile, and which of its elements exist. Programs go along a row first."""
    across = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    r = program // across * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    c = program % across * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return r, c, (r < R) & (c < C)


@triton.jit(do_not_specialize=["R"])
def gelu_kernel(
    x_ptr, bias_ptr, y_ptr, stride_x_r, R, C,
    HAS_BIAS: tl.constexpr, TANH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    r, c, inside = _tile(R, C, BLOCK_R, BLOCK_C)
    x = tl.load(x_ptr + r * stride_x_r + c, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(y_ptr + r * C + c, _gelu(x, TANH).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R"])
def gelu_backward_kernel(
    dy_ptr, x_ptr, dx_ptr, stride_dy_r, stride_x_r, R, C,
    TANH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    r, c, inside = _tile(R, C, BLOCK_R, BLOCK_C)
    dy = tl.load(dy_ptr + r * stride_dy_r + c, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + r * stride_x_r + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + r * C + c, (dy * _derivative(x, TANH)).to(dx_ptr.dtype.element_ty), mask=inside)


@functools.cache
def tile(R_is_one, C):
    """(BLOCK_R, BLOCK_C). One long row is cut into tiles of TILE elements; otherwise a tile has several rows."""
    if R_is_one:
        return 1, TILE
    block = min(triton.next_power_of_2(C), WIDEST)
    return TILE // block, block


def _launch(kernel, tensors, strides, R, C, *constants):
    if R and C:
        block_r, block_c = tile(R == 1, C)
        programs = -(-R // block_r) * -(-C // block_c)
        kernel[(programs,)](
            *tensors, *strides, R, C, *constants, block_r, block_c, num_warps=WARPS, enable_fp_fusion=True
        )


def _forward(x, bias, approximate):
    y = empty_as(x)
    if bias is None and x.is_contiguous():
        R, C, stride = 1, x.numel(), x.numel()
    else:
        C = x.shape[-1]
        R = x.numel() // max(C, 1)
        x, stride = dense_rows(x)
    parameters = x if bias is None else bias.contiguous()  # without a bias, a placeholder that the kernel does not read
    _launch(gelu_kernel, (x, parameters, y), (stride,), R, C, bias is not None, approximate == "tanh")
    return y


def gelu(x, approximate="tanh"):
    return _forward(x, None, approximate)


def bias_gelu(x, bias, approximate="tanh"):
    return _forward(x, bias, approximate)


def gelu_backward(dy, x, approximate="tanh"):
    dx = empty_as(x)
    if dy.is_contiguous() and x.is_contiguous():
        R, C, strides = 1, x.numel(), (x.numel(), x.numel())
    else:
        C = x.shape[-1]
        R = x.numel() // max(C, 1)
        (dy, stride_dy_r), (x, stride_x_r) = dense_rows(dy), dense_rows(x)
        strides = stride_dy_r, stride_x_r
    _launch(gelu_backward_kernel, (dy, x, dx), strides, R, C, approximate == "tanh")
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
