"""CUDA C++ on the machine: compiled by nvcc, linked with a stand-in runtime, called with CPU tensors.

A plain ``kernel<<<grid, block, shared, stream>>>(...)`` in host code arrives here with the kernel's name, its shape and
its argument bytes; the PTX is the one in the library itself.
"""

import ctypes
import functools
import os
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from . import machines
from .launches import readable
from .signatures import Function, functions
from .toolchain import WHAT, check_arch, compile_cuda, link, nvcc

__all__ = ["Library", "compile_cuda", "connect", "load_cuda", "runtime_source"]


def runtime_source() -> Path:
    """The stand-in runtime, to link into an extension of your own build (``nvcc -cudart none``); then ``connect``."""
    return Path(__file__).with_name("runtime.cpp")


def load_cuda(*sources: str | os.PathLike, arch: str = "sm_80", flags: Sequence[str] = ()) -> "Library":
    """Compiles CUDA C++ files, or texts, for the machine and loads them; cached on disk by content.

    Every ``extern "C"`` function defined there becomes a method that takes tensors for pointers and numbers for
    numbers. A call of a runtime function that the machine lacks is named when the library is linked.
    """
    if not sources:
        raise ValueError(f"{WHAT}: load_cuda must be given a source, got none")
    number = check_arch(arch)
    common = ["-std=c++17", "-Xcompiler", "-fPIC", "-c"]
    target = [f"-gencode=arch=compute_{number},code=compute_{number}", "--no-compress", "-lineinfo"]
    objects = [nvcc(source, "kernel.o", [*common, *target, *flags]) for source in sources]
    runtime = nvcc(runtime_source(), "runtime.o", [*common, "-O2", "-Xcompiler", "-fvisibility=hidden"])
    try:
        made = link([*objects, runtime], "library.so", ["-cudart", "none", "-Xlinker", "-z,defs"])
    except RuntimeError as error:
        missing = sorted(set(re.findall(r"undefined reference to `(\w+)'", str(error))))
        if not missing:
            raise
        raise RuntimeError(
            f"{WHAT}: the machine's CUDA runtime has no {', '.join(missing)}, which the sources call"
        ) from error
    texts = [s if isinstance(s, str) and "\n" in s else Path(s).read_text(encoding="utf-8") for s in sources]
    return Library(made, {f.name: f for text in texts for f in functions(text)})


class Library:
    """The C functions of a compiled library; a launch made outside ``ptx.machine()`` raises."""

    def __init__(self, path: Path, declared: dict[str, Function]):
        self.path, self._declared = path, declared
        self._handle = ctypes.CDLL(str(path))
        connect(self._handle)

    def __dir__(self):
        return [*super().__dir__(), *self._declared]

    def __getattr__(self, name: str) -> Callable:
        if name not in self._declared:
            known = ", ".join(self._declared) or "none"
            raise AttributeError(f'{WHAT}: the sources define no extern "C" function {name!r}; they define {known}')
        call = functools.partial(self._call, self._declared[name])
        setattr(self, name, call)
        return call

    def _call(self, function: Function, *args):
        running = machines.active()
        if running is None:
            raise RuntimeError(f"{WHAT}: {function.name} must be called inside `with ptx.machine():`")
        values = function.convert(args)
        for parameter, value in zip(function.parameters, args):
            if isinstance(value, Tensor):
                running.memory.note(value, parameter.name)
        _tensors[:] = [(p.name, a) for p, a in zip(function.parameters, args) if isinstance(a, Tensor)]
        native = getattr(self._handle, function.name)
        native.argtypes, native.restype = function.argtypes, function.restype
        try:
            result = native(*values)
        finally:
            _tensors.clear()
        if (error := running.pending) is not None:
            running.pending = None
            raise error
        return result


_tensors: list[tuple[str, Tensor]] = []  # of the library call that is under way


# --- what the stand-in runtime calls ---

_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
_MEMORY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_VARIABLE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)


class _Callbacks(ctypes.Structure):
    _fields_ = [("launch", _LAUNCH), ("memory", _MEMORY), ("variable", _VARIABLE)]


def _guarded(failed):
    """A C caller sees no exception: the machine keeps the first one, and whoever called into C raises it."""

    def wrap(function):
        @functools.wraps(function)
        def callback(*args):
            running = machines.active()
            try:
                if running is None:
                    raise RuntimeError(f"{WHAT}: a CUDA call was made outside `with ptx.machine():`")
                return function(running, *args)
            except BaseException as error:  # noqa: BLE001
                if running is not None and running.pending is None:
                    running.pending = error
                return failed

        return callback

    return wrap


@_LAUNCH
@_guarded(-1)
def _on_launch(running, image, kernel, grid, block, shared, allowed, arguments):
    name, ptx = kernel.decode(), image_ptx(image)
    if shared > allowed:
        raise ValueError(
            f"{WHAT}: {readable(name)}: dynamic shared memory must be at most {allowed} bytes, got {shared}; "
            "cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) allows more"
        )
    params = machines.parse(ptx).params(name)
    values = [ctypes.string_at(arguments[i], p["bytes"]) for i, p in enumerate(params)]
    running.run(ptx, name, grid[:3], block[:3], shared, values, dict(_tensors))
    return 0


@_MEMORY
@_guarded(None)
def _on_memory(running, address, size, event):
    running.memory.device_event(address, size, event)


@_VARIABLE
@_guarded(None)
def _on_variable(running, image, name, size):
    found = machines.parse(image_ptx(image)).variables[name.decode()]
    return found["address"]


_callbacks = _Callbacks(_on_launch, _on_memory, _on_variable)


def connect(library: ctypes.CDLL) -> None:
    """Sends the launches of a library that holds the stand-in runtime to the machine that runs."""
    library.gpt2fast_ptx_connect(ctypes.byref(_callbacks))


@functools.lru_cache(maxsize=256)
def image_ptx(address: int) -> str:
    """The PTX for sm_80 or the newest before it in a fat binary in memory.

    A header of 16 bytes (magic, version, its size, the size of all entries), then per entry a header (kind: 1 is PTX,
    version, header size, payload size, ..., the architecture at byte 28) and its payload.
    """
    magic, _, header, size = struct.unpack("<IHHQ", ctypes.string_at(address, 16))
    if magic != 0xBA55ED50:
        raise RuntimeError(f"{WHAT}: not a fat binary: its magic number is {magic:#x}")
    data, at, found = ctypes.string_at(address + header, size), 0, {}
    while at < len(data):
        kind, _, entry_header, payload = struct.unpack_from("<HHIQ", data, at)
        (arch,) = struct.unpack_from("<I", data, at + 28)
        body = data[at + entry_header : at + entry_header + payload]
        if kind == 1:
            found[arch] = body
        at += entry_header + payload
    fitting = [arch for arch in found if arch <= 80]
    if not fitting:
        held = ", ".join(f"compute_{a}" for a in found) or "none"
        raise RuntimeError(
            f"{WHAT}: the library must hold PTX for compute_80 or older, got {held}; compile it with "
            "-gencode arch=compute_80,code=compute_80"
        )
    body = found[max(fitting)]
    if b".version" not in body:
        raise RuntimeError(f"{WHAT}: the library's PTX is compressed; compile it with nvcc's --no-compress")
    return body.rstrip(b"\0").decode()
