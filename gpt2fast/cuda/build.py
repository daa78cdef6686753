"""Builds the CUDA kernels of a package of your own."""

import functools
import os
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import build


def build_cuda(
    out: str | os.PathLike,
    *sources: str | os.PathLike,
    include: Sequence[str | os.PathLike] = (),
    flags: Sequence[str] = (),
) -> Path:
    """Compiles CUDA C++ with nvcc into one shared library for ``CudaLibrary``, and returns its path.

    No GPU is needed, and torch is not linked. Nothing is compiled where the library is newer than its sources, the
    headers next to them and those in ``include``.

    Args:
        out: the file to write, ``my_package/_cuda.so``.
        sources: the ``.cu`` files. They find gpt2fast's headers: ``#include "cuda/device.cuh"``, ``"ops.h"``.
        include: more folders of headers.
        flags: more options of nvcc.

    ``TORCH_CUDA_ARCH_LIST`` names the compute capabilities, such as ``"8.0 9.0+PTX"``. By default they are all that
    nvcc knows from 8.0 on. Raises ValueError without sources or for a capability that is not valid, RuntimeError
    without nvcc or with its message where something does not compile, and FileNotFoundError for a missing source.
    """
    if not sources:
        raise ValueError("gpt2fast.build_cuda: sources must be at least one .cu file, got none")
    tools = _tools()
    if not tools["is_current"](Path(out), sources, include):
        tools["build"](Path(out), sources, include, flags)
    return Path(out)


@functools.cache
def _tools() -> dict[str, Callable]:
    return runpy.run_path(str(build.include_path() / "cuda" / "build.py"))
