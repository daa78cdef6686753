"""RMSNorm by rms_norm.cu. ``python -m rms_norm.cuda_kernels`` builds it for a GPU; the PTX machine runs the source."""

from pathlib import Path

import torch

from gpt2fast import CudaLibrary, build_cuda
from gpt2fast.cuda.library import DTYPES
from gpt2fast.tensors import dense_rows

FOLDER, SOURCE = Path(__file__).parent, "rms_norm.cu"
PROGRAMS = 128  # blocks of the backward pass, at most; each has a row of partial sums
library = CudaLibrary(FOLDER / "_cuda.so", FOLDER, fix="python -m rms_norm.cuda_kernels builds it")


def rms_norm(x, weight, eps=1e-6):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    x, stride_x_r = dense_rows(x)
    library.call(
        SOURCE, "examples_rms_norm", x, weight.contiguous(), y, rstd, rstd.numel(), x.shape[-1], stride_x_r, eps,
        DTYPES[x.dtype],
    )  # fmt: skip
    return y, rstd


def rms_norm_backward(dy, x, weight, rstd):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    R, C = rstd.numel(), x.shape[-1]
    partial = x.new_empty((min(R, PROGRAMS), C), dtype=torch.float32)
    (dy, stride_dy_r), (x, stride_x_r) = dense_rows(dy), dense_rows(x)
    library.call(
        SOURCE, "examples_rms_norm_backward", dy, x, weight.contiguous(), rstd.contiguous(), dx, partial,
        R, C, len(partial), stride_dy_r, stride_x_r, DTYPES[x.dtype],
    )  # fmt: skip
    return dx, partial.sum(0).to(x.dtype)


def _objection(x):
    if x.shape[-1] == 0:
        return "RMSNorm in CUDA covers rows of at least 1 column, got 0"
    return library.objection("RMSNorm", x)  # of dtypes, of the GPU, and where nothing is built


def supports(x, weight, eps=1e-6):
    return _objection(x)


def supports_backward(dy, x, weight, rstd):
    return _objection(x)


KERNELS = {
    "examples::rms_norm": (rms_norm, supports),
    "examples::rms_norm_backward": (rms_norm_backward, supports_backward),
}

if __name__ == "__main__":
    build_cuda(library.path, FOLDER / SOURCE)
