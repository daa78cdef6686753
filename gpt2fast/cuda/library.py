"""Calls of the extern "C" functions of csrc/cuda, on the current stream of a tensor's device.

On a GPU they are those of ``gpt2fast/_cuda.so``, which setup.py builds with nvcc and without torch. Inside
``gpt2fast.testing.ptx.machine()`` the same sources run as compiled PTX on CPU tensors.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import backends

PATH = Path(__file__).parents[1] / "_cuda.so"
SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
FLAGS = ("-std=c++20",)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as DType in csrc/dtype.h
OLDEST = (8, 0)  # compute capability


def reason() -> str | None:
    """Why no kernel of csrc/cuda can run here, or None."""
    if backends.cpu_counts_as_cuda():
        return machine_reason()
    if not torch.cuda.is_available():
        return "there is no CUDA device, and no gpt2fast.testing.ptx.machine() runs"
    return _library_reason()


@functools.cache
def _library_reason() -> str | None:
    if not PATH.is_file():
        return (
            "gpt2fast/_cuda.so is not built; GPT2FAST_CUDA=1 pip install -e . --no-build-isolation builds it with nvcc"
        )
    try:
        _library()
    except OSError as error:
        return f"gpt2fast/_cuda.so does not load: {error}"
    return None


@functools.cache
def machine_reason() -> str | None:
    """Why the sources cannot run on the PTX machine here, or None."""
    from ..testing.ptx.toolchain import tool

    if not SOURCES.is_dir():
        return "the sources of the CUDA kernels, csrc/cuda, are not beside the package; pip install -e . from a clone"
    try:
        tool("nvcc")
    except FileNotFoundError as error:
        return str(error)
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    found = ctypes.CDLL(str(PATH))
    found.gpt2fast_error_string.restype = ctypes.c_char_p
    return found


@functools.cache
def on_machine(source: str):
    """A source of csrc/cuda as the PTX machine runs it; nvcc's work is cached by content."""
    from ..testing import ptx

    return ptx.load_cuda(SOURCES / source, flags=FLAGS)


@functools.cache
def _function(name: str, kinds: tuple[type, ...]) -> Callable[..., int]:
    function = getattr(_library(), name)
    function.argtypes, function.restype = [*kinds, ctypes.c_void_p], ctypes.c_int
    return function


def _kind(value: Tensor | float | None) -> type:
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p
    return ctypes.c_float if isinstance(value, float) else ctypes.c_int64


def call(source: str, name: str, *args: Tensor | float | None) -> None:
    """Calls ``name``, which ``source`` defines: tensors and None for pointers, floats for float, ints for int64_t.

    Raises RuntimeError naming the function and CUDA's error where it returns one.
    """
    if backends.cpu_counts_as_cuda():
        if status := getattr(on_machine(source), name)(*args):
            raise RuntimeError(f"{name}: CUDA error {status}")
        return
    device = next(a.device.index for a in args if isinstance(a, Tensor))
    function = _function(name, tuple(map(_kind, args)))
    stream = torch._C._cuda_getCurrentRawStream(device)
    if status := function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in args), stream):
        raise RuntimeError(f"{name}: CUDA error {status}: {_library().gpt2fast_error_string(status).decode()}")


@functools.cache
def multiprocessors(device: int | None) -> int:
    """Of a device; None stands for the PTX machine's, one of the A100 class."""
    return 108 if device is None else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def objection(what: str, x: Tensor) -> str | None:
    """Why kernels named ``what`` do not cover x's dtype and device, or None."""
    if x.dtype not in DTYPES:
        return f"{what} in CUDA covers float32, bfloat16 and float16, got {str(x.dtype).removeprefix('torch.')}"
    if x.is_cuda and (capability := _capability(x.device.index)) < OLDEST:
        return f"the CUDA kernels need compute capability 8.0, got {capability[0]}.{capability[1]}"
    return None
