"""Layer norm over the last dimension (C columns), of x or of x + residual, and its gradients.

    y = (x - mean) rstd weight + bias        mean = avg(x)        rstd = 1 / sqrt(avg((x - mean)^2) + eps)

The floor is memory traffic: x is read once and y is written once. To reach it, a program holds whole rows in registers.
It takes BLOCK_R rows at a time and walks over the rows in steps of the whole grid, so that it reads weight and bias
only once (for rows of up to 8192 columns). What the kernels move above the floor is mostly weight and bias.

Backward, with n = (x - mean) rstd and g = dy weight:

    dx = rstd (g - avg(g) - n avg(g n))      dweight = sum over rows of dy n      dbias = sum over rows of dy

The programs walk in the same way. Each writes dx and keeps its share of dweight and dbias in float32 registers. A
second kernel adds up the shares in a fixed order, without atomics. docs/how/layer_norm.md has the counted bytes.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from ..tensors import dense_rows, empty_as
from .common import objection

LONGEST = 16384  # columns; a longer row does not fit in the registers of one program


# R is not specialised: decoding one token and reading a prompt run the same compiled kernel.
@triton.jit(do_not_specialize=["R"])
def layer_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
    stride_x_r, stride_residual_r, R, C, eps,
    HAS_RESIDUAL: tl.constexpr, HOLD_PARAMETERS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK_C)[None, :]
    if HOLD_PARAMETERS:
        weight = tl.load(weight_ptr + c, mask=c < C, other=0.0)
        bias = tl.load(bias_ptr + c, mask=c < C, other=0.0)
    for first in range(tl.program_id(0) * BLOCK_R, R, tl.num_programs(0) * BLOCK_R):
        # The row is 64-bit: the product of row and stride passes 2^31 at 1.3 million rows of 1600 columns.
        r = first.to(tl.int64) + tl.arange(0, BLOCK_R)
        inside = (r[:, None] < R) & (c < C)
        x = tl.load(x_ptr + r[:, None] * stride_x_r + c, mask=inside, other=0.0)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + r[:, None] * stride_residual_r + c, mask=inside, other=0.0)
            # The sum is rounded first, then mean and rstd are taken of it: the backward pass reads the rounded sum.
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
            tl.store(sum_ptr + r[:, None] * C + c, x, mask=inside)
        x = x.to(tl.float32)
        mean = tl.div_rn(tl.sum(x, 1), tl.cast(C, tl.float32))
        # The variance is a second pass over registers. E[x^2] - mean^2 would need one pass only, but it loses all
        # digits where the mean is much larger than the spread.
        centred = tl.where(inside, x - mean[:, None], 0.0)
        variance = tl.div_rn(tl.sum(centred * centred, 1), tl.cast(C, tl.float32))
        rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
        if not HOLD_PARAMETERS:
            weight = tl.load(weight_ptr + c, mask=c < C, other=0.0)
            bias = tl.load(bias_ptr + c, mask=c < C, other=0.0)
        y = centred * rstd[:, None] * weight.to(tl.float32) + bias.to(tl.float32)
        tl.store(y_ptr + r[:, None] * C + c, y.to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(mean_ptr + r, mean, mask=r < R)
        tl.store(rstd_ptr + r, rstd, mask=r < R)


@triton.jit
def _add_pairs(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _load_rows(dy_ptr, x_ptr, weight, mean, rstd, inside):
    """(dy, n, g, sum of g, sum of g n), with n = (x - mean) rstd and g = dy weight; the sums are over each row."""
    dy = tl.load(dy_ptr, mask=inside, other=0.0).to(tl.float32)
    n = (tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
    g = dy * weight
    # One reduction makes both sums, which halves the number of barriers between warps.
    sum_g, sum_gn = tl.reduce((g, g * n), 1, _add_pairs, keep_dims=True)
    return dy, n, g, sum_g, sum_gn


@triton.jit(do_not_specialize=["R"])
def layer_norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, strips_ptr,
    stride_dy_r, stride_x_r, R, C,
    PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_C], tl.float32)
    for first in range(program * BLOCK_R, R, programs * BLOCK_R):
        r = (first.to(tl.int64) + tl.arange(0, BLOCK_R))[:, None]
        mean = tl.load(mean_ptr + r, mask=r < R, other=0.0)
        rstd = tl.load(rstd_ptr + r, mask=r < R, other=0.0)
        inside = (r < R) & (c < C)
        dy_row, x_row = dy_ptr + r * stride_dy_r, x_ptr + r * stride_x_r
        other_g, other_gn = 0.0, 0.0
        if PARTS == 2:
            # The program writes one half of the row, but it needs the sums of the whole row. It reads the other half
            # first, so that those registers are free again when it reads its own half and the weight.
            o = ((1 - tl.program_id(1)) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
            other_weight = tl.load(weight_ptr + o, mask=o < C, other=0.0).to(tl.float32)
            _, _, _, other_g, other_gn = _load_rows(dy_row + o, x_row + o, other_weight, mean, rstd, (r < R) & (o < C))
            weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        dy, n, g, sum_g, sum_gn = _load_rows(dy_row + c, x_row + c, weight, mean, rstd, inside)
        sum_g, sum_gn = sum_g + other_g, sum_gn + other_gn
        dx = rstd * (g - sum_g / C - n * (sum_gn / C))
        tl.store(dx_ptr + r * C + c, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dweight += tl.sum(dy * n, 0)
        dbias += tl.sum(dy, 0)
    # The strips are (2, P, C) in float32: first the shares of dweight of the P programs, then those of dbias.
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    strips_ptr += program.to(tl.int64) * C
    tl.store(strips_ptr + c, dweight, mask=c < C)
    tl.store(strips_ptr + programs.to(tl.int64) * C + c, dbias, mask=c < C)


@triton.jit(do_not_specialize=["P"])
def layer_norm_strips_kernel(
    strips_ptr, dweight_ptr, dbias_ptr, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Adds up the shares of all programs: program (i, 0) BLOCK_C columns of dweight, program (i, 1) those of dbias."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    strips_ptr += tl.program_id(1).to(tl.int64) * P * C
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, P, BLOCK_P):
        p = (first + tl.arange(0, BLOCK_P))[:, None]
        total += tl.load(strips_ptr + p.to(tl.int64) * C + c[None, :], mask=(p < P) & (c[None, :] < C), other=0.0)
    out_ptr = dweight_ptr if tl.program_id(1) == 0 else dbias_ptr
    tl.store(out_ptr + c, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=c < C)


@functools.cache
def forward_tile(C):
    """(BLOCK_R, BLOCK_C, num_warps, about how many programs fit into a multiprocessor's registers).

    The tile depends on the columns only, so that the bits of a row do not depend on the batch around it.
    """
    block = triton.next_power_of_2(C)
    if block <= 1024:
        # Four warps with eight columns a thread are as wide as a row of 1024. With two such rows, each thread has two
        # independent loads in flight, and the rows share the barriers of a sum. Four rows would need more than 64
        # registers a thread, so that fewer programs would fit.
        return min(2048 // block, 64), block, 4, 8
    if block <= 2048:
        return 1, block, 4, 6
    return 1, block, 8, {4096: 3, 8192: 2, 16384: 1}[block]


def hold_parameters(block):
    """Whether weight and bias stay in registers. A row of 16384 columns leaves no room for them."""
    return block <= 8192


@functools.cache
def backward_tile(C):
    """(PARTS, BLOCK_R, BLOCK_C, num_warps, about how many programs fit into a multiprocessor's registers).

    PARTS is the number of programs that share a row.
    """
    block = triton.next_power_of_2(C)
    if block <= 1024:
        # All warps lie along the row. The sums over rows then stay within a thread or a warp.
        return 1, min(1024 // block, 16), block, max(block // 256, 1), 8
    if block <= 8192:
        return 1, 1, block, 8, 8192 // block
    # Registers cannot hold x, dy and two float32 sums of a longer row, so two programs write one half of it each.
    return 2, 1, block // 2, 8, 1


@functools.cache
def _multiprocessors(device):
    return driver.active.utils.get_device_properties(device)["multiprocessor_count"]


def forward_programs(R, rows, most):
    return min(_multiprocessors(driver.active.get_current_device()) * most, -(-R // rows))


def backward_programs(R, rows, parts, most):
    """P, the number of programs (for each part of a row). It is enough to fill the device, but every program has at
    least 8 rows, since it costs 16 C bytes of traffic: its two shares are written and read in float32."""
    return max(1, min(_multiprocessors(driver.active.get_current_device()) * most // parts, -(-R // max(rows, 8))))


def _forward(x, residual, weight, bias, eps):
    shape = x.shape
    C = shape[-1]
    y = empty_as(x)
    mean = x.new_empty(shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    x, stride_x_r = dense_rows(x)
    # Without a residual the kernel does not touch the residual or the sum, so any tensor serves as a placeholder.
    total, stride_residual_r, has_residual = y, C, residual is not None
    if has_residual:
        total = torch.empty_like(y)
        residual, stride_residual_r = dense_rows(residual)
    if R := mean.numel():
        rows, block, warps, most = forward_tile(C)
        layer_norm_kernel[(forward_programs(R, rows, most),)](
            x, residual if has_residual else x, weight.contiguous(), bias.contiguous(), y, total, mean, rstd,
            stride_x_r, stride_residual_r, R, C, eps,
            has_residual, hold_parameters(block), rows, block, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return y, total, mean, rstd


def layer_norm(x, weight, bias, eps=1e-5):
    y, _, mean, rstd = _forward(x, None, weight, bias, eps)
    return y, mean, rstd


def add_layer_norm(x, residual, weight, bias, eps=1e-5):
    return _forward(x, residual, weight, bias, eps)


def layer_norm_backward(dy, x, weight, mean, rstd):
    C, R = x.shape[-1], mean.numel()
    dx = empty_as(x)
    if R == 0:
        return dx, weight.new_zeros(C), weight.new_zeros(C)
    dweight = empty_as(weight)
    dbias = torch.empty_like(dweight)
    parts, rows, block, warps, most = backward_tile(C)
    P = backward_programs(R, rows, parts, most)
    strips = mean.new_empty((2, P, C))
    dy, stride_dy_r = dense_rows(dy)
    x, stride_x_r = dense_rows(x)
    # The gradient of a very short row is a small difference of large numbers. dy weight must then be rounded in the
    # same way inside the sums and outside them, so fused multiply-add is off. It stays on for longer rows, which do not
    # need this and save registers.
    layer_norm_backward_kernel[(P, parts)](
        dy, x, weight.contiguous(), mean.contiguous(), rstd.contiguous(), dx, strips, stride_dy_r, stride_x_r, R, C,
        parts, rows, block, num_warps=warps, enable_fp_fusion=C > 32,
    )  # fmt: skip
    layer_norm_strips_kernel[(-(-C // 16), 2)](
        strips, dweight, dbias, P, C, 256, 16, num_warps=8, enable_fp_fusion=True
    )
    return dx, dweight, dbias


def _objection(x):
    if found := objection("layer norm", x):
        return found
    if not 1 <= x.shape[-1] <= LONGEST:
        return f"layer norm in Triton covers 1 to {LONGEST} columns, got {x.shape[-1]}"
    return None


def supports(x, weight, bias, eps=1e-5):
    return _objection(x)


def supports_add(x, residual, weight, bias, eps=1e-5):
    return _objection(x)


def supports_backward(dy, x, weight, mean, rstd):
    return _objection(x)


KERNELS = {
    "layer_norm": (layer_norm, supports),
    "add_layer_norm": (add_layer_norm, supports_add),
    "layer_norm_backward": (layer_norm_backward, supports_backward),
}
