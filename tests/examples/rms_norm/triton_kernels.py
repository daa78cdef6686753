"""RMSNorm in Triton. Forward, a program has one row. Backward, it walks down rows and keeps its share of dweight."""

import torch
import triton
import triton.language as tl

from gpt2fast.kernels.common import objection
from gpt2fast.tensors import dense_rows

LONGEST = 8192  # columns; registers hold no longer row
PROGRAMS = 128  # of the backward pass, at most; each has a row of partial sums


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, y_ptr, rstd_ptr, stride_x_r, C, eps, BLOCK_C: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)  # 64 bits: a row times its stride may pass 2^31
    c = tl.arange(0, BLOCK_C)
    x = tl.load(x_ptr + r * stride_x_r + c, mask=c < C, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, 0) / C + eps))
    tl.store(y_ptr + r * C + c, (x * rstd * weight).to(y_ptr.dtype.element_ty), mask=c < C)
    tl.store(rstd_ptr + r, rstd)


@triton.jit
def rms_norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, stride_dy_r, stride_x_r, R, C, BLOCK_C: tl.constexpr
):
    c = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_C], tl.float32)
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        r = row.to(tl.int64)
        dy = tl.load(dy_ptr + r * stride_dy_r + c, mask=c < C, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + r * stride_x_r + c, mask=c < C, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + r)
        n, g = x * rstd, dy * weight
        dx = rstd * (g - n * (tl.sum(g * n, 0) / C))
        tl.store(dx_ptr + r * C + c, dx.to(dx_ptr.dtype.element_ty), mask=c < C)
        dweight += dy * n
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * C + c, dweight, mask=c < C)


def rms_norm(x, weight, eps=1e-6):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    R, C = rstd.numel(), x.shape[-1]
    x, stride_x_r = dense_rows(x)
    if R:
        rms_norm_kernel[(R,)](
            x, weight.contiguous(), y, rstd, stride_x_r, C, eps,
            BLOCK_C=triton.next_power_of_2(C), enable_fp_fusion=True,
        )  # fmt: skip
    return y, rstd


def rms_norm_backward(dy, x, weight, rstd):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    R, C = rstd.numel(), x.shape[-1]
    programs = min(R, PROGRAMS)
    partial = x.new_empty((programs, C), dtype=torch.float32)
    (dy, stride_dy_r), (x, stride_x_r) = dense_rows(dy), dense_rows(x)
    if R:
        rms_norm_backward_kernel[(programs,)](
            dy, x, weight.contiguous(), rstd.contiguous(), dx, partial, stride_dy_r, stride_x_r, R, C,
            BLOCK_C=triton.next_power_of_2(C), enable_fp_fusion=True,
        )  # fmt: skip
    return dx, partial.sum(0).to(x.dtype)


def _objection(x):
    if not 1 <= x.shape[-1] <= LONGEST:
        return f"RMSNorm in Triton covers rows of 1 to {LONGEST} columns, got {x.shape[-1]}"
    return objection("RMSNorm", x)  # of dtypes


def supports(x, weight, eps=1e-6):
    return _objection(x)


def supports_backward(dy, x, weight, rstd):
    return _objection(x)


KERNELS = {
    "examples::rms_norm": (rms_norm, supports),
    "examples::rms_norm_backward": (rms_norm_backward, supports_backward),
}
