"""Runs CUDA C++ on the machine.

nvcc compiles the sources and links them with a stand-in for the CUDA runtime; the library is called with CPU tensors. A
launch ``kernel<<<grid, block, shared, stream>>>(...)`` in host code calls this file with the name of the kernel, its
grid and block, and the bytes of its arguments. The PTX comes from the library itself.
"""

import atexit
import ctypes
import functools
import math
import os
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from . import machines
from .launches import readable
from .occupancy import resources
from .signatures import Function, functions
from .toolchain import WHAT, check_arch, compile_cuda, link, nvcc

__all__ = ["Library", "compile_cuda", "connect", "load_cuda", "runtime_source"]


def runtime_source() -> Path:
    """The source of the stand-in runtime, to link to your own library (``nvcc -cudart none``). Then ``connect`` it."""
    return Path(__file__).with_name("runtime.cpp")


def load_cuda(*sources: str | os.PathLike, arch: str = "sm_80", flags: Sequence[str] = ()) -> "Library":
    """Compiles CUDA C++ files, or texts, for the machine and loads them. The result is cached on disk by content.

    Every ``extern "C"`` function becomes a method that takes tensors for pointers, and numbers. Where the sources call
    a runtime function that the machine lacks, this raises RuntimeError with its name.
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
        missing = sorted(set(re.findall(r"undefined references? to `(_*cuda\w+)'", str(error))))
        if not missing:
            raise
        raise RuntimeError(
            f"{WHAT}: the machine's CUDA runtime has no {', '.join(missing)}, which the sources call"
        ) from error
    texts = [s if isinstance(s, str) and "\n" in s else Path(s).read_text(encoding="utf-8") for s in sources]
    return Library(made, {f.name: f for text in texts for f in functions(text)})


class Library:
    """The C functions of a compiled library. A call outside ``ptx.machine()`` raises."""

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
            _callbacks.pending = None  # the error is raised, or is in the report
        if (error := running.pending) is not None:
            running.pending = None
            connect(self._handle)  # so that cudaGetLastError() does not return it again
            raise error
        return result


_tensors: list[tuple[str, Tensor]] = []  # the arguments of the library call that runs now


# --- what the stand-in runtime calls ---

_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
_COPY = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int
)  # fmt: skip
_ATTRIBUTES = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_size_t, ctypes.POINTER(ctypes.c_int)
)
_IS_DEVICE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_MEMORY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_VARIABLE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)


class _Callbacks(ctypes.Structure):
    _fields_ = [
        ("launch", _LAUNCH), ("memory", _MEMORY), ("variable", _VARIABLE), ("copy", _COPY),
        ("attributes", _ATTRIBUTES), ("is_device", _IS_DEVICE), ("pending", ctypes.c_char_p),
    ]  # fmt: skip


def _keep(text: str) -> None:
    """Adds to the text that the stand-in runtime prints to stderr if the host code calls exit() now."""
    before = _callbacks.pending
    _callbacks.pending = (before + b"\n" if before else b"") + text.encode()


def _guarded(failed):
    """Decorator of a callback, which C code calls. The machine keeps the first exception, since C cannot see it.

    The Python code that called the C code raises it afterwards. The callback returns ``failed``.
    """

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
                _keep(str(error))
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
    launch = running.run(ptx, name, grid[:3], block[:3], shared, values, dict(_tensors))
    if launch.errors:
        _keep("\n".join([f"{WHAT}: {launch.name}", *(f"  {error}" for error in launch.errors)]))
    return 0


@_MEMORY
@_guarded(None)
def _on_memory(running, address, size, event):
    running.memory.device_event(address, size, event)


@_VARIABLE
@_guarded(None)
def _on_variable(running, image, name, size):
    found = machines.parse(image_ptx(image)).variables[name.decode()]
    running.memory.variables[found["address"]] = name.decode(), size
    return found["address"]


@_COPY
@_guarded(-1)
def _on_copy(running, call, to, source, size, kind, has_source):
    copied = (source or 0) if has_source else None
    running.memory.copy(call.decode(), to or 0, copied, size, to_device=kind in (1, 3), from_device=kind in (2, 3))
    return 0


@_ATTRIBUTES
@_guarded(-1)
def _on_attributes(running, image, kernel, threads, shared, found):
    ptx, name = image_ptx(image), kernel.decode()
    needs = resources(ptx, "sm_80")[name]
    most = min(1024, 65536 // (max(needs.registers, 1) * 32) * 32)
    if declared := re.search(rf"\.entry\s+{re.escape(name)}\s*\([^{{]*?\.maxntid\s+([\d, ]+)", ptx):
        most = min(most, math.prod(map(int, declared[1].split(","))))
    blocks = needs.blocks(threads, shared) if 0 < threads <= 1024 else 0
    for i, number in enumerate((needs.registers, needs.stack, needs.shared, most, blocks)):
        found[i] = number
    return 0


@_IS_DEVICE
@_guarded(0)
def _on_is_device(running, address):
    return int(running.memory.at(address or 0) is not None)


_callbacks = _Callbacks(_on_launch, _on_memory, _on_variable, _on_copy, _on_attributes, _on_is_device, None)
# The runtime may read ``pending`` at the end of the process, after Python has ended. The structure is therefore never
# freed, and ``pending`` is cleared before.
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_callbacks))
atexit.register(setattr, _callbacks, "pending", None)


def connect(library: ctypes.CDLL) -> None:
    """Makes a library that contains the stand-in runtime send its launches to the machine that runs."""
    library.gpt2fast_ptx_connect(ctypes.byref(_callbacks))


@functools.lru_cache(maxsize=256)
def image_ptx(address: int) -> str:
    """The PTX in a fat binary in memory: that for sm_80, or else the newest before it.

    A fat binary has a header of 16 bytes (magic number, version, size of the header, size of all entries). Each entry
    has a header (kind: 1 is PTX, version, header size, payload size, ..., the architecture at byte 28) and a payload.
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
