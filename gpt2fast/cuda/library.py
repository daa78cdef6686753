"""Calls the extern "C" functions of a library in CUDA C++, on the current stream of a tensor's device.

On a GPU, they are in a shared library that nvcc has built, without torch; ours is ``gpt2fast/_cuda.so``. Inside
``gpt2fast.testing.ptx.machine()``, the same sources are compiled to PTX, which runs on CPU tensors.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import backends, build

CSRC = build.sources()
PATH = Path(__file__).parents[1] / "_cuda.so"
SOURCES = CSRC / "cuda"
FLAGS = ("-std=c++20",)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as DType in csrc/dtype.h
OLDEST = (8, 0)  # the lowest compute capability


class CudaLibrary:
    """The CUDA C++ kernels of a package: the sources, and the shared library that ``gpt2fast.build_cuda`` makes.

    Args:
        path: the path of the shared library. It is needed only where a GPU runs the kernels.
        sources: the folder of the sources. The PTX machine compiles them itself.
        include: folders of headers besides gpt2fast's own ("cuda/device.cuh", "ops.h"), for the PTX machine.
        fix: the command that builds the library, for the error message where the library is missing.

    The sources define launchers ``extern "C" int my_op(const void* x, void* y, int64_t R, ..., cudaStream_t stream)``.
    They return a cudaError_t.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        sources: str | os.PathLike,
        include: Sequence[str | os.PathLike] = (),
        fix: str | None = None,
    ):
        self.path, self.sources, self.name = Path(path), Path(sources), Path(path).name
        self.flags = (*FLAGS, *(f"-I{Path(folder)}" for folder in (*include, CSRC)))
        self.fix = fix or f"gpt2fast.build_cuda({str(self.path)!r}, *sources) builds it with nvcc"
        self._on_machine: dict[str, object] = {}
        self._functions: dict[tuple, Callable[..., int]] = {}

    def __repr__(self):
        return f"CudaLibrary({str(self.path)!r}, {str(self.sources)!r})"

    def reason(self) -> str | None:
        """Why none of its kernels can run here, or None."""
        if backends.cpu_counts_as_cuda():
            return self.machine_reason()
        if not torch.cuda.is_available():
            return "there is no CUDA device, and no gpt2fast.testing.ptx.machine() runs"
        return self.library_reason

    def machine_reason(self) -> str | None:
        """Why the sources cannot run on the PTX machine here, or None."""
        return self._machine_reason

    @functools.cached_property
    def _machine_reason(self) -> str | None:
        from ..testing.ptx.toolchain import tool

        if not self.sources.is_dir():
            return f"the sources of {self.name} are not there: there is no folder {self.sources}"
        try:
            tool("nvcc")
        except FileNotFoundError as error:
            return str(error)
        return None

    @functools.cached_property
    def library_reason(self) -> str | None:
        """Why the shared library cannot be loaded, or None."""
        if not self.path.is_file():
            return f"{self.path} is not built; {self.fix}"
        try:
            self.library  # noqa: B018
        except OSError as error:
            return f"{self.path} does not load: {error}"
        return None

    @functools.cached_property
    def library(self) -> ctypes.CDLL:
        """The shared library. Raises OSError where it does not load."""
        return ctypes.CDLL(str(self.path))

    def objection(self, what: str, x: Tensor) -> str | None:
        """Why kernels named ``what`` do not cover the dtype and device of x, or cannot run here; or None.

        A kernel's ``supports`` calls it. Launchers take float32, bfloat16 and float16, as ``DTYPES[x.dtype]``, and need
        compute capability 8.0 or newer.
        """
        if x.dtype not in DTYPES:
            return f"{what} in CUDA covers float32, bfloat16 and float16, got {str(x.dtype).removeprefix('torch.')}"
        if x.is_cuda:
            if (capability := _capability(x.device.index)) < OLDEST:
                return f"the CUDA kernels need compute capability 8.0, got {capability[0]}.{capability[1]}"
            return self.library_reason
        return self._machine_reason if backends.cpu_counts_as_cuda() else None

    def call(self, source: str, name: str, *args: Tensor | float | None) -> None:
        """Calls the function ``name`` of ``source``, with the current stream as its last argument.

        Tensors and None become pointers, floats become float, ints become int64_t. Raises RuntimeError with the
        function and CUDA's error where it returns one, and AttributeError where there is no such function. On the PTX
        machine, raises RuntimeError with nvcc's message where the source does not compile.
        """
        if backends.cpu_counts_as_cuda():
            if status := getattr(self.on_machine(source), name)(*args):
                raise RuntimeError(f"{name}: CUDA error {status}")
            return
        device = next(a.device.index for a in args if isinstance(a, Tensor))
        function = self._function(name, tuple(map(_kind, args)))
        stream = torch._C._cuda_getCurrentRawStream(device)
        if status := function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in args), stream):
            raise RuntimeError(f"{name}: CUDA error {status}{self._error_text(status)}")

    def on_machine(self, source: str):
        """A source, compiled for the PTX machine. The compiled code is cached on disk by content."""
        if source not in self._on_machine:
            from ..testing import ptx

            self._on_machine[source] = ptx.load_cuda(self.sources / source, flags=self.flags)
        return self._on_machine[source]

    def _function(self, name: str, kinds: tuple[type, ...]) -> Callable[..., int]:
        function = self._functions.get((name, kinds))
        if function is None:
            if not hasattr(self.library, name):
                raise AttributeError(
                    f'{self.path} has no function {name!r}: define it extern "C" in a source that it is built from, '
                    f"and build again; {self.fix}"
                )
            function = self.library[name]  # a new object at each access, so that each set of kinds has one
            function.argtypes, function.restype = [*kinds, ctypes.c_void_p], ctypes.c_int
            self._functions[name, kinds] = function
        return function

    def _error_text(self, status: int) -> str:
        if not hasattr(self.library, "gpt2fast_error_string"):  # not built by build_cuda
            return ""
        text = self.library.gpt2fast_error_string
        text.restype = ctypes.c_char_p
        return f": {text(status).decode()}"


def _kind(value: Tensor | float | None) -> type:
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p
    return ctypes.c_float if isinstance(value, float) else ctypes.c_int64


@functools.cache
def multiprocessors(device: int | None) -> int:
    """The number of multiprocessors of a device. None stands for the PTX machine, which is like an A100."""
    return 108 if device is None else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


class _OurLibrary(CudaLibrary):
    """The library that setup.py builds. Its sources need no include folders: the headers are next to them."""

    def __init__(self):
        super().__init__(PATH, SOURCES, fix="GPT2FAST_CUDA=1 pip install -e . --no-build-isolation builds it with nvcc")
        self.flags = FLAGS


OURS = _OurLibrary()
reason, machine_reason, call, objection = OURS.reason, OURS.machine_reason, OURS.call, OURS.objection
