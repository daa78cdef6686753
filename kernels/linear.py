"""y = activation(x @ W + bias) + residual, and the gradients dx = dy W^T, dweight = x^T dy, dbias = sum of dy.

One kernel does all of this: out = a @ b for two matrices with any strides, a (M, K), b (K, N) and out (M, N).
gpt2fast/products.py says which strides make which gradient. A program has one tile of out and loops along K. Bias,
activation and residual are applied to the tile in float32, before it is rounded once. For dweight, the programs of the
first row or column of tiles also add up dy, which they read anyway: that is dbias.

By default PyTorch's product runs instead of this kernel; MEASURED_FASTER lists the exceptions.

The floor is 2 M K N operations where there are many rows, and reading the weight once where there are few. A tile reads
its rows of a and its columns of b, so that each matrix is asked for several times; neighbouring programs share these
reads in the L2 cache. docs/kernels.md counts the bytes and products; docs/how/linear.md explains the counts.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from .. import products
from .common import objection, precision
from .gelu import _derivative, _gelu
from .tiles import tiles

# Neighbouring programs take this many rows of tiles together, so that the columns of b that they share stay in the L2
# cache.
ROWS_OF_TILES = 8
# The sizes at which a GPU ran this kernel faster than PyTorch's product, as (compute capability, dtype, rows, K, N). No
# measurement has added one so far.
MEASURED_FASTER: frozenset[tuple] = frozenset()


@triton.jit
def _tile_of_program(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TOGETHER: tl.constexpr):
    """(row, column) of this program's tile of out: down ``TOGETHER`` rows of tiles, then on to the next column."""
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    first = program // (TOGETHER * across) * TOGETHER
    rows = tl.minimum(down - first, TOGETHER)
    inner = program % (TOGETHER * across)
    return first + inner % rows, inner // rows


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    a_ptr, b_ptr, bias_ptr, residual_ptr, out_ptr, preactivation_ptr, sums_ptr,
    stride_a_m, stride_a_k, stride_b_k, stride_b_n, stride_residual_m, stride_out_m, stride_out_n, M, K, N,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, FORM: tl.constexpr, KEEP: tl.constexpr,
    BACKWARD: tl.constexpr, SUMS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TOGETHER: tl.constexpr, ALIGNED_M: tl.constexpr,
):  # fmt: skip
    """out = activation(a @ b + bias) + residual, as gpt2fast/products.py describes.

    FORM: the activation, as in FORMS of activations.py. KEEP: the input of the activation is stored in preactivation.
    BACKWARD: out is a @ b times the derivative of the activation at preactivation.
    SUMS: 1 stores the sums of the columns of b, by the programs of the first row of tiles; 2 stores the sums of the
    rows of a, by the programs of the first column of tiles; 0 stores none.
    ALIGNED_M: M is a multiple of 16 and each column of a is contiguous, as in dweight. M is not specialised: where it
    is a number of rows, Triton would otherwise compile several versions of the kernel.
    """
    if ALIGNED_M:
        M = M // 16 * 16  # tells the compiler that M is a multiple of 16
    tile_m, tile_n = _tile_of_program(M, N, BLOCK_M, BLOCK_N, TOGETHER)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_at = a_ptr + m.to(tl.int64)[:, None] * stride_a_m + k.to(tl.int64)[None, :] * stride_a_k
    b_at = b_ptr + k.to(tl.int64)[:, None] * stride_b_k + n.to(tl.int64)[None, :] * stride_b_n
    step = tl.full([], BLOCK_K, tl.int64)
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sums_n = tl.zeros([BLOCK_N], tl.float32)
    sums_m = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        inside = k < K - start
        a = tl.load(a_at, mask=(m < M)[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_at, mask=inside[:, None] & (n < N)[None, :], other=0.0)
        product = tl.dot(a, b, product, input_precision=PRECISION)
        if SUMS == 1:
            if tile_m == 0:
                sums_n += tl.sum(b.to(tl.float32), 0)
        if SUMS == 2:
            if tile_n == 0:
                sums_m += tl.sum(a.to(tl.float32), 1)
        a_at += step * stride_a_k
        b_at += step * stride_b_k
    if SUMS == 1:
        if tile_m == 0:
            tl.store(sums_ptr + n, sums_n.to(sums_ptr.dtype.element_ty), mask=n < N)
    if SUMS == 2:
        if tile_n == 0:
            tl.store(sums_ptr + m, sums_m.to(sums_ptr.dtype.element_ty), mask=m < M)
    inside = (m < M)[:, None] & (n < N)[None, :]
    rows = m.to(tl.int64)[:, None]
    if HAS_BIAS:
        product += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if KEEP:
        before = product.to(preactivation_ptr.dtype.element_ty)
        tl.store(preactivation_ptr + rows * N + n[None, :], before, mask=inside)
    if BACKWARD:
        before = tl.load(preactivation_ptr + rows * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
        product *= _derivative(before, FORM == 1)
    elif FORM:
        product = _gelu(product, FORM == 1)
    if HAS_RESIDUAL:
        at = residual_ptr + rows * stride_residual_m + n[None, :]
        product += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = out_ptr + rows * stride_out_m + n.to(tl.int64)[None, :] * stride_out_n
    tl.store(at, product.to(out_ptr.dtype.element_ty), mask=inside)


@tiles("linear_kernel")
def tile(rows, wide):
    """(BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages). ``rows``: the ``rows_class`` of out's number of rows.

    ``wide``: the dtype is float32, whose products are six products of bfloat16 each.
    """
    if wide:
        return (16, 64, 32, 4, 1) if rows <= 16 else (64, 64, 32, 4, 1)
    if rows <= 16:
        return 16, 64, 128, 4, 4
    return (64, 64, 64, 4, 4) if rows <= 512 else (128, 128, 64, 8, 3)


def rows_class(rows):
    """16, 512 or 8192. Products with up to 16 rows, up to 512, and more than 512 have one tile each."""
    return 16 if rows <= 16 else 512 if rows <= 512 else 8192


def _nothing(*tensors, **named):
    """Launches nothing, for an ``out`` without elements."""


def prepare(dtype, a, b, out, stride_residual=0, form=0, backward=False, which=0):
    """A function that launches out = a @ b and what follows. It is the ``prepare`` of gpt2fast/products.py."""
    (M, K, *strides_a), (_, N, *strides_b) = a, b
    if not M or not N:
        return _nothing
    sizes = *strides_a, *strides_b, stride_residual, out.stride, out.step, M, K, N
    wide, rows, aligned = dtype == torch.float32, rows_class(M), a.stride == 1 and M % 16 == 0

    def launch(a, b, out, bias=None, residual=None, preactivation=None, sums=None):
        block_m, block_n, block_k, warps, stages = tile(rows, wide)
        # The kernel does not touch a tensor that is None, so ``out`` serves as a placeholder.
        linear_kernel[(-(-M // block_m) * -(-N // block_n),)](
            a, b, out if bias is None else bias, out if residual is None else residual, out,
            out if preactivation is None else preactivation, out if sums is None else sums, *sizes,
            bias is not None, residual is not None, form, preactivation is not None and not backward, backward, which,
            precision(a), block_m, block_n, block_k, ROWS_OF_TILES, aligned,
            num_warps=warps, num_stages=stages, enable_fp_fusion=True,
        )  # fmt: skip

    return launch


def is_slower(x, weight, transposed):
    return products.is_slower(MEASURED_FASTER, x, weight, transposed)


def supports(x, weight, bias=None, residual=None, activation="none", transposed=False, keep_preactivation=False):
    return objection("linear", x, has_products=True)


def slower(x, weight, bias=None, residual=None, activation="none", transposed=False, keep_preactivation=False):
    return is_slower(x, weight, transposed)


def supports_backward(dy, x, weight, transposed=False, want="dx dweight dbias"):
    return objection("linear", dy, has_products=True)


def slower_backward(dy, x, weight, transposed=False, want="dx dweight dbias"):
    return is_slower(x, weight, transposed)


linear, linear_backward = partial(products.linear, prepare), partial(products.linear_backward, prepare)
KERNELS = {
    "linear": (linear, supports, slower),
    "linear_backward": (linear_backward, supports_backward, slower_backward),
}
