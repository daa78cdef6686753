"""scale_bias_add by scale_bias_add.cu. ``python -m scale_bias_add.cuda_kernels`` builds it for GPUs, with nvcc."""

from pathlib import Path

from gpt2fast import CudaLibrary, build_cuda
from gpt2fast.cuda.library import DTYPES
from gpt2fast.tensors import dense_rows, empty_as

FOLDER, SOURCE = Path(__file__).parent, "scale_bias_add.cu"
library = CudaLibrary(FOLDER / "_cuda.so", FOLDER, fix="python -m scale_bias_add.cuda_kernels builds it")


def scale_bias_add(x, scale, bias, residual):
    y = empty_as(x)
    if y.numel():
        C = x.shape[-1]
        (x, stride_x_r), (residual, stride_residual_r) = dense_rows(x), dense_rows(residual)
        library.call(
            SOURCE, "scale_bias_add", x, scale.contiguous(), bias.contiguous(), residual, y, y.numel() // C, C,
            stride_x_r, stride_residual_r, DTYPES[y.dtype],
        )  # fmt: skip
    return y


def supports(x, scale, bias, residual):
    """Why the kernel does not cover a call, or None; asked before it runs."""
    return library.objection("scale_bias_add", x)  # of dtypes, of the GPU, and where nothing is built


KERNELS = {"scale_bias_add::scale_bias_add": (scale_bias_add, supports)}

if __name__ == "__main__":
    build_cuda(library.path, FOLDER / SOURCE)
