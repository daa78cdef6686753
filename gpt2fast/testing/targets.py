"""Targets: the implementations that an op is tested on.

- ``cpu:avx2`` and the like: the C++ kernels of an instruction set.
- ``triton:ptx``, ``cuda:ptx``: GPU kernels that run as compiled PTX on the CPU (gpt2fast.testing.ptx).
- ``triton:gpu``, ``cuda:gpu``: the same kernels on a GPU.
- ``fused``, ``fused:gpu``: PyTorch's fused way on the CPU and on a GPU.
- ``NAME``, ``NAME:gpu``: a backend of your own, on CPU tensors and on a GPU.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import torch

from .. import backends
from ..cuda import library
from ..op import Op
from .isa import cpu_isa, runnable_isas


def targets() -> list[str]:
    """The targets that can run here. With ``GPT2FAST_CPU_ISA``, there is only that instruction set.

    Those of the PTX machine are listed where it is built or was compiled before. Nothing is compiled to list them.
    """
    forced = os.environ.get("GPT2FAST_CPU_ISA")
    found = [f"cpu:{isa}" for isa in ([forced] if forced else runnable_isas())] + ["fused"]
    if ptx_is_ready():
        found += ["triton:ptx"] if importlib.util.find_spec("triton") else []
        found += ["cuda:ptx"] if library.machine_reason() is None else []
    if torch.cuda.is_available():
        found += ["fused:gpu", *(["triton:gpu"] if importlib.util.find_spec("triton") else [])]
        found += ["cuda:gpu"] if backends.BACKENDS["cuda"].reason() is None else []
    for name, backend in backends.BACKENDS.items():
        if name not in backends.OURS and backend.reason() is None:
            found += [name] if "cpu" in backend.devices else []
            found += [f"{name}:gpu"] if "cuda" in backend.devices and torch.cuda.is_available() else []
    return found


def ptx_is_ready() -> bool:
    """Whether the PTX machine is built or in the cache. Where it is not, its targets are not listed."""
    from .ptx import core

    return core.ready()


def lacks(op: Op, target: str) -> str | None:
    """Why ``op`` has no implementation to test on ``target``, or None."""
    name = target.partition(":")[0]
    if name == "reference":
        return None
    if name == "fused":
        return None if op.fused else "its declaration names no fused="
    if name not in backends.BACKENDS:
        raise ValueError(f"target must be one of {', '.join(targets())}, got {target!r}")
    kernels = backends.BACKENDS[name].kernels
    if op.key not in kernels:
        return f"the {name} backend has no kernel for it"
    # The kernels of another package may be built where ours in CUDA C++ are not.
    return library.reason() if target == "cuda:gpu" and op.key not in kernels.others else None


def targets_of(op: Op) -> list[str]:
    """The targets with an implementation of ``op``, or ``["reference"]`` where there are none."""
    return [target for target in targets() if lacks(op, target) is None] or ["reference"]


@contextlib.contextmanager
def on(target: str) -> Iterator[str]:
    """Inside, every op runs on ``target`` or raises. Yields the device that its tensors must be on."""
    name, _, where = target.partition(":")
    with contextlib.ExitStack() as stack:
        if where == "ptx":
            from . import ptx

            stack.enter_context(ptx.machine())
        if name == "cpu":
            stack.enter_context(cpu_isa(where))
        elif name in backends.BACKENDS or name in backends.BUILT_IN:
            stack.enter_context(backends.use_backend(name))
        else:
            raise ValueError(f"target must be one of {', '.join(targets())}, got {target!r}")
        yield "cuda" if where == "gpu" else "cpu"
