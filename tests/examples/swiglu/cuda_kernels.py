"""SwiGLU by swiglu.cu. ``python -m swiglu.cuda_kernels`` builds it for a GPU; the PTX machine runs the source."""

from pathlib import Path

import torch

from gpt2fast import CudaLibrary, build_cuda
from gpt2fast.cuda.library import DTYPES

FOLDER, SOURCE = Path(__file__).parent, "swiglu.cu"
library = CudaLibrary(FOLDER / "_cuda.so", FOLDER, fix="python -m swiglu.cuda_kernels builds it")


def swiglu(gate, up):
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    library.call(SOURCE, "examples_swiglu", gate, up, y, y.numel(), DTYPES[y.dtype])
    return y


def supports(gate, up):
    return library.objection("SwiGLU", gate)  # of dtypes, of the GPU, and where nothing is built


KERNELS = {"examples::swiglu": (swiglu, supports)}

if __name__ == "__main__":
    build_cuda(library.path, FOLDER / SOURCE)
