"""The driver that Triton finds while a machine runs: it compiles for sm_80 and launches into the machine.

Kernels and their wrappers are untouched: ``kernel[grid](cpu_tensors)`` goes through Triton's own specialisation,
compiler and disk cache, and its launcher hands PTX and arguments to ``Machine.run``.
"""

import functools
import struct
from pathlib import Path

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase, decompose_descriptor, expand_signature
from triton.runtime import driver as drivers
from triton.runtime.cache import get_cache_manager

from . import machines
from .toolchain import WHAT

ARCH = 80
DEVICE = f"ptx sm_{ARCH}"  # a key of its own in Triton's per-device caches of compiled kernels
SHARED = 163 * 1024


class _Utils:
    """What Triton's runtime asks a driver about the device and its binaries."""

    def load_binary(self, name: str, binary: bytes, shared: int, device):
        return None, name, 0, 0, 1024  # module, function, registers and spills (see Launch.resources), threads

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


class _Launcher:
    """Made once per compiled kernel, called per launch with every argument of the Python call."""

    def __init__(self, source, metadata):
        self.name, self.metadata = metadata.name, metadata
        if getattr(metadata, "num_ctas", 1) != 1:
            raise ValueError(f"{WHAT}: {self.name}: num_ctas must be 1, got {metadata.num_ctas}")
        self._file = source.name[:150]
        self._names, self._types = list(source.signature), list(source.signature.values())

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
        if x * y * z == 0:  # as Triton's own launcher: nothing to do
            return
        flat = [leaf for n, t, a in zip(self._names, self._types, args) for leaf in _leaves(n, t, a)]
        tensors = {name: value for name, _, value in flat if isinstance(value, Tensor)}
        values = [_pack(self.name, name, kind, value) for name, kind, value in flat]
        grid = x * y * z
        for size in (self.metadata.global_scratch_size, self.metadata.profile_scratch_size):
            scratch = torch.empty(grid * size, dtype=torch.int8) if size else None
            if scratch is not None:
                running.may_stay_unwritten(scratch)
                tensors[f"scratch {len(values)}"] = scratch
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

    def get_current_target(self) -> GPUTarget:
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
        """No configuration is faster than another here, so that autotuning takes the first one, without running it."""
        return lambda call, quantiles=None, **kwargs: [0.0] * len(quantiles) if quantiles else 0.0

    def get_empty_cache_for_benchmark(self):
        return torch.empty(0, dtype=torch.int)

    def clear_cache(self, cache) -> None:
        pass


class Installed:
    """Puts the driver in place; ``restore`` brings back the one that was there, or that there was none."""

    def __init__(self):
        self._before = drivers._active
        drivers.set_active(_Driver())

    def restore(self) -> None:
        drivers.set_active(self._before)


def _leaves(name: str, kind, value):
    """(name, type, value) of what reaches the kernel: constants left out, tuples and descriptors taken apart."""
    if isinstance(kind, tuple):
        for i, (k, v) in enumerate(zip(kind, value)):
            yield from _leaves(f"{name}[{i}]", k, v)
    elif isinstance(kind, str) and kind.startswith("tensordesc"):
        parts = decompose_descriptor(value)
        for i, (k, v) in enumerate(zip(expand_signature([kind], None, ""), parts)):
            yield (name if i == 0 else f"{name}.{i}"), k, v
    elif kind != "constexpr":
        yield name, kind, value


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
