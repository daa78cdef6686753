"""layer_norm, add_layer_norm and their gradients by csrc/cuda/layer_norm.cu."""

import torch

from ..tensors import dense_rows, empty_as
from .library import DTYPES, call, multiprocessors, objection

SOURCE = "layer_norm.cu"
LONGEST = 16384  # the largest number of columns: kLongestRow in csrc/cuda/kernels.h
LEAST_ROWS = 8  # the backward pass gives a block about this number of rows or more: each block also writes 8 C bytes
BLOCKS = 4  # the largest number of blocks of the backward pass for each multiprocessor


def _forward(x, residual, weight, bias, eps):
    C = x.shape[-1]
    y = empty_as(x)
    total = None if residual is None else torch.empty_like(y)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    x, stride_x = dense_rows(x)
    residual, stride_residual = (None, 0) if residual is None else dense_rows(residual)
    call(
        SOURCE, "gpt2fast_layer_norm", x, residual, weight.contiguous(), bias.contiguous(), y, total, mean, rstd,
        mean.numel(), C, stride_x, stride_residual, float(eps), DTYPES[x.dtype],
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
    dweight, dbias = weight.new_empty(C), weight.new_empty(C)
    parts = max(1, min(BLOCKS * multiprocessors(x.device.index), -(-R // LEAST_ROWS)))
    partial = mean.new_empty(parts, 2, C)
    dy, stride_dy = dense_rows(dy)
    x, stride_x = dense_rows(x)
    call(
        SOURCE, "gpt2fast_layer_norm_backward", dy, x, weight.contiguous(), mean.contiguous(), rstd.contiguous(), dx,
        dweight, dbias, partial, R, C, parts, stride_dy, stride_x, DTYPES[x.dtype],
    )  # fmt: skip
    return dx, dweight, dbias


def _objection(x):
    if found := objection("layer norm", x):
        return found
    if not 1 <= x.shape[-1] <= LONGEST:
        return f"layer norm in CUDA covers 1 to {LONGEST} columns, got {x.shape[-1]}"
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
