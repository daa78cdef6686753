"""The resources of a kernel, read from compiled code: registers, spills, shared memory, theoretical occupancy.

ptxas compiles the PTX for an architecture, and cuobjdump reads the result. No GPU is needed, and nothing is timed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ... import disk_cache
from .toolchain import WHAT, check_arch, run, tool, version

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")


@dataclass(frozen=True)
class Limits:
    """The limits of one SM.

    Source: CUDA C++ Programming Guide, the table of technical specifications per compute capability.
    """

    threads: int
    blocks: int
    shared: int  # bytes
    block_shared: int  # bytes that one block may take
    registers: int = 65536
    warp_registers: int = 256  # a warp gets registers in units of this number
    shared_unit: int = 128
    reserved_shared: int = 1024  # for the system, in each block


LIMITS = {
    "sm_80": Limits(2048, 32, 164 * 1024, 163 * 1024),
    "sm_86": Limits(1536, 16, 100 * 1024, 99 * 1024),
    "sm_89": Limits(1536, 24, 100 * 1024, 99 * 1024),
    "sm_90": Limits(2048, 32, 228 * 1024, 227 * 1024),
    "sm_100": Limits(2048, 32, 228 * 1024, 227 * 1024),
}


@dataclass(frozen=True)
class Resources:
    kernel: str
    arch: str
    registers: int
    spill_stores: int  # bytes a thread
    spill_loads: int
    stack: int  # bytes a thread
    shared: int  # static, bytes

    def occupancy(self, threads: int, dynamic_shared: int = 0) -> float:
        """The theoretical occupancy: the share of an SM's warps that can be resident with blocks of ``threads``."""
        limits = LIMITS[self.arch]
        return self.blocks(threads, dynamic_shared) * -(-threads // 32) * 32 / limits.threads

    def blocks(self, threads: int, dynamic_shared: int = 0) -> int:
        """The number of blocks of ``threads`` that fit on an SM at once; 0 if not even one fits."""
        limits = LIMITS[self.arch]
        if not 0 < threads <= 1024:
            raise ValueError(f"{WHAT}: threads must lie in [1, 1024], got {threads}")
        shared = self.shared + dynamic_shared
        if shared > limits.block_shared:
            return 0
        warps = -(-threads // 32)
        per_warp = _up(max(self.registers, 1) * 32, limits.warp_registers)
        # Each of the four schedulers of an SM has a quarter of the registers, and a warp stays on one of them.
        by_registers = limits.registers // 4 // per_warp * 4 // warps
        by_shared = limits.shared // _up(shared + limits.reserved_shared, limits.shared_unit)
        return min(limits.blocks, limits.threads // 32 // warps, by_registers, by_shared)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def resources(ptx: str, arch: str | Sequence[str] = "sm_80") -> dict[str, Resources]:
    """The resources of each kernel in ``ptx``, compiled for ``arch``. The result is cached on disk.

    They come from ``ptxas -v`` and ``cuobjdump -res-usage``. PTX for one architecture also compiles for later ones,
    except for a target that ends in ``a``: it compiles for that architecture only.
    """
    check_arch(arch)
    if arch not in LIMITS:
        raise ValueError(f"{WHAT}: arch must be one of {', '.join(LIMITS)}, got {arch!r}")
    ptxas = _ptxas(arch)
    target = re.search(r"^\s*\.target\s+(sm_\d+[af]?)", ptx, re.M)
    exact = target[1] if target and target[1].rstrip("af") == arch else arch

    def compile(folder: Path):
        (folder / "kernel.ptx").write_text(ptx)
        cubin = folder / "kernel.cubin"
        command = [ptxas, "-v", "-lineinfo", f"--gpu-name={exact}", str(folder / "kernel.ptx"), "-o", str(cubin)]
        log = run(command, f"ptxas for {arch}")
        usage = run([tool("cuobjdump"), "-res-usage", str(cubin)], "cuobjdump")
        (folder / "usage.txt").write_text(log + "\n=====\n" + usage)
        return folder / "usage.txt", []

    made = disk_cache.compiled(
        "ptx", [ptx, arch, version("ptxas"), version("cuobjdump"), "usage"], "usage.txt", compile
    )
    log, usage = made.read_text().split("\n=====\n")
    return _parse(log, usage, arch)


def _ptxas(arch: str) -> str:
    """The path of ptxas. Triton's ptxas may be too old for sm_100; Triton then has a second one for it."""
    plain = tool("ptxas")
    newer = Path(plain).with_name("ptxas-blackwell")
    return str(newer) if int(re.sub(r"\D", "", arch)) >= 90 and newer.is_file() else plain


def _parse(log: str, usage: str, arch: str) -> dict[str, Resources]:
    spills = {}
    pattern = (
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    )
    for name, stack, stores, loads in re.findall(pattern, log):
        spills[name] = (int(stack), int(stores), int(loads))
    found = {}
    for name, numbers in re.findall(r"Function ([^\s:]+):\s*\n?\s*(REG:.*)", usage):
        values = dict(re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", numbers))
        stack, stores, loads = spills.get(name, (int(values["STACK"]), 0, 0))
        shared = int(values["SHARED"])
        if int(re.sub(r"\D", "", arch)) >= 90:  # from sm_90 on, the number includes the system's
            shared = max(shared - LIMITS[arch].reserved_shared, 0)
        found[name] = Resources(name, arch, int(values["REG"]), stores, loads, stack, shared)
    if not found:
        raise RuntimeError(f"{WHAT}: cuobjdump names no kernel:\n{usage.strip()}")
    return found
