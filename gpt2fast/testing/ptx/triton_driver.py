"""The driver that Triton uses while a machine runs. It compiles for sm_80 and launches kernels on the machine.

Kernels and their wrappers are not changed. ``kernel[grid](cpu_tensors)`` uses Triton's own specialisation, compiler and
disk cache. The launcher here passes PTX and arguments to ``Machine.run``. Triton 3.2 is the oldest version that works.
Where versions differ, the driver looks for an attribute and not for the version number.
"""

import functools
import re
import struct
from pathlib import Path

import torch
from torch import Tensor

from ... import disk_cache
from . import machines
from .toolchain import WHAT, run, tool

try:
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.compiler import CompiledKernel
    from triton.runtime import driver as drivers
    from triton.runtime.cache import get_cache_manager
except Exception as error:  # noqa: BLE001 - a machine for CUDA alone needs no Triton that works
    _problem: Exception | None = error
    DriverBase = object
else:
    _problem = None

ARCH = 80
DEVICE = f"ptx sm_{ARCH}"  # a key of its own in Triton's per-device caches of compiled kernels
SHARED = 163 * 1024


class _Utils:
    """Answers the questions of Triton's runtime about the device and its binaries."""

    def load_binary(self, name: str, binary: bytes, shared: int, device):
        """Returns module, function, registers, spills in words and, from Triton 3.4 on, threads."""
        code = CompiledKernel._init_handles.__code__
        registers, stack = _usage(name, binary)
        # Triton before 3.9 loads a kernel again while its module is None; later ones unload what is not None.
        module = None if hasattr(CompiledKernel, "__del__") else name
        found = module, name, registers, None if stack is None else stack // 4, 1024
        return found if "n_max_threads" in code.co_names else found[:4]

    def unload_module(self, module) -> None:
        pass

    def get_device_properties(self, device) -> dict[str, int]:
        return dict(
            max_shared_mem=SHARED,
            max_num_regs=65536,
            multiprocessor_count=108,
            warpSize=32,
            sm_clock_rate=1410000,
            mem_clock_rate=1215000,
            mem_bus_width=5120,
        )


def _usage(name: str, binary: bytes) -> tuple[int | None, int | None]:
    """Registers and bytes of stack of a thread in compiled code; (None, None) where cuobjdump is missing or fails."""

    def compile(folder: Path) -> tuple[Path, list[str]]:
        cubin, usage = folder / "kernel.cubin", folder / "usage.txt"
        cubin.write_bytes(binary)
        usage.write_text(run([tool("cuobjdump"), "-res-usage", str(cubin)], "cuobjdump"))
        return usage, []

    try:
        text = disk_cache.compiled("ptx", [binary, "res-usage"], "usage.txt", compile).read_text()
    except (OSError, RuntimeError):
        return None, None
    found = re.search(rf"Function {re.escape(name)}:\s*REG:(\d+)\s+STACK:(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (None, None)


class _Launcher:
    """Launches a kernel. It is made once for each compiled kernel and called with all arguments of the Python call."""

    def __init__(self, source, metadata):
        self.name, self.metadata = metadata.name, metadata
        if getattr(metadata, "num_ctas", 1) != 1:
            raise ValueError(f"{WHAT}: {self.name}: num_ctas must be 1, got {metadata.num_ctas}")
        self._file = source.name[:150]
        # Triton 3.2 also gives a type to arguments that it has specialised to constants; later versions "constexpr".
        self._names = list(source.signature)
        self._types = ["constexpr" if n in source.constants else t for n, t in source.signature.items()]

    @functools.cached_property
    def ptx(self) -> str:
        files = get_cache_manager(self.metadata.hash).get_group(f"{self._file}.json") or {}
        found = files.get(f"{self._file}.ptx")
        if found is None:
            raise RuntimeError(f"{WHAT}: {self.name}: Triton's cache holds no PTX; is TRITON_STORE_BINARY_ONLY set?")
        return Path(found).read_text()

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *args):
        running = machines.active()
        if running is None:
            raise RuntimeError(f"{WHAT}: {self.name} was launched outside `with ptx.machine():`")
        if x * y * z == 0:  # nothing to do, as in Triton's own launcher
            return
        flat = [leaf for n, t, a in zip(self._names, self._types, args) for leaf in _leaves(n, t, a)]
        tensors = {name: value for name, _, value in flat if isinstance(value, Tensor)}
        values = [_pack(self.name, name, kind, value) for name, kind, value in flat]
        grid = x * y * z
        for what in ("global", "profile")[: len(machines.parse(self.ptx).params(self.name)) - len(values)]:
            size = getattr(self.metadata, f"{what}_scratch_size", 0)
            scratch = torch.empty(grid * size, dtype=torch.int8) if size else None
            if scratch is not None:
                running.may_stay_unwritten(scratch)
                tensors[f"{what} scratch"] = scratch
            values.append(struct.pack("<Q", 0 if scratch is None else scratch.data_ptr()))
        if enter_hook is not None:
            enter_hook(launch_metadata)
        running.run(self.ptx, self.name, (x, y, z), (32 * self.metadata.num_warps, 1, 1), self.metadata.shared,
                    values, tensors)  # fmt: skip
        if exit_hook is not None:
            exit_hook(launch_metadata)


class _Driver(DriverBase):
    def __init__(self):
        self.utils = _Utils()
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return machines.active() is not None

    def map_python_to_cpp_type(self, kind: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(kind)

    def get_current_target(self) -> "GPUTarget":
        return GPUTarget("cuda", ARCH, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_current_device(self) -> str:
        return DEVICE

    def set_current_device(self, device) -> None:
        pass

    def get_current_stream(self, device) -> int:
        return 0

    def get_device_capability(self, device=None) -> tuple[int, int]:
        return divmod(ARCH, 10)

    def get_benchmarker(self):
        """A benchmarker that gives every configuration time 0: autotuning takes the first one, without running it."""
        return lambda call, quantiles=None, **kwargs: [0.0] * len(quantiles) if quantiles else 0.0

    def get_empty_cache_for_benchmark(self):
        return torch.empty(0, dtype=torch.int)

    def clear_cache(self, cache) -> None:
        pass


class _Refusing:
    """The driver where the installed Triton does not fit. Every access to it raises an error that says so."""

    def __init__(self, problem: Exception):
        self._problem = problem

    def __getattr__(self, name: str):
        import triton

        version = getattr(triton, "__version__", "of unknown version")
        raise RuntimeError(
            f"{WHAT}: the installed Triton ({version}) does not fit the machine, which knows Triton from 3.2 on: "
            f"{type(self._problem).__name__}: {self._problem}"
        )


class Installed:
    """Installs the driver. ``restore`` brings back the state before.

    Where the installed Triton does not fit, the machine still works for CUDA, and a launch by Triton raises.
    """

    def __init__(self):
        self._drivers = _drivers()
        if self._drivers is None:
            return
        self._field = "_active" if "_active" in vars(self._drivers) else "active"  # "active" in Triton 3.2
        self._before = getattr(self._drivers, self._field)
        self._drivers.set_active(_driver())

    def restore(self) -> None:
        if self._drivers is not None:
            setattr(self._drivers, self._field, self._before)


def _drivers():
    """Triton's object that holds the active driver; None where Triton cannot be imported."""
    if _problem is None:
        return drivers
    try:
        from triton.runtime import driver
    except Exception:  # noqa: BLE001
        return None
    return driver


def _driver():
    if _problem is not None:
        return _Refusing(_problem)
    try:
        return _Driver()
    except Exception as error:  # noqa: BLE001 - a method that a later version made abstract, say
        return _Refusing(error)


def _leaves(name: str, kind, value):
    """Yields (name, type, value) of the kernel's parameters, without constants. Tuples and descriptors are unpacked."""
    if isinstance(kind, tuple):
        for i, (k, v) in enumerate(zip(kind, value)):
            yield from _leaves(f"{name}[{i}]", k, v)
    elif isinstance(kind, str) and kind.startswith("tensordesc"):
        for i, (k, v) in enumerate(_descriptor(kind, value)):
            yield (name if i == 0 else f"{name}.{i}"), k, v
    elif kind != "constexpr":
        yield name, kind, value


def _descriptor(kind: str, value):
    """Yields (type, value) of the parameters for a tensor descriptor on sm_80. Triton 3.5 and 3.7 added a flag each."""
    element = re.match(r"tensordesc(?:_im2col)?<([^[>]*)\[", kind)[1]
    yield f"*{element}", value.base
    yield from (("i64", v) for v in (*value.shape, *value.strides))
    if hasattr(value, "padding"):
        yield "i1", value.padding == "nan"
    if hasattr(value, "round_f32_to_tf32"):
        yield "i1", value.round_f32_to_tf32
    yield from (("i32", v) for v in value.shape)
    yield from (("i64", v) for v in value.strides)


_INTEGER = {"1": 1, "8": 1, "16": 2, "32": 4, "64": 8}
_FLOAT = {"fp16": "<e", "fp32": "<f", "f32": "<f", "fp64": "<d"}


def _pack(kernel: str, name: str, kind: str, value) -> bytes:
    what = f"{WHAT}: {kernel}: {name}"
    if kind.startswith("*"):
        if isinstance(value, Tensor):
            if value.device.type != "cpu":
                raise ValueError(f"{what} must be on cpu, where the machine runs, got {value.device}")
            return struct.pack("<Q", value.data_ptr())
        pointer = value.data_ptr() if hasattr(value, "data_ptr") else value
        return struct.pack("<Q", pointer or 0)
    if kind == "bf16":
        return torch.tensor(float(value), dtype=torch.bfloat16).view(torch.int16).numpy().tobytes()
    if kind in _FLOAT:
        return struct.pack(_FLOAT[kind], value)
    if kind[0] in "iu" and kind[1:] in _INTEGER:
        size = _INTEGER[kind[1:]]
        return (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")
    raise TypeError(f"{what} has a type that the machine does not pass: {kind}")
