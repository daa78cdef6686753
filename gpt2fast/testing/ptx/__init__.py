"""GPU kernels on a laptop: what nvcc or Triton compiled runs as PTX on the CPU, is checked, and is counted.

``with ptx.machine() as m:`` catches Triton's launches and those of ``load_cuda``; ``m.launches`` holds a report each.
The machine is no timer, and not bit-equal to hardware in tensor-core rounding and approximate functions.
"""

from .cuda import Library, compile_cuda, connect, load_cuda, runtime_source
from .graphs import CUDAGraph
from .launches import Error, Launch, MachineError
from .machines import Machine, active, machine, parse
from .occupancy import ARCHITECTURES, Resources, resources
from .torch_cuda import torch_cuda

__all__ = [
    "ARCHITECTURES",
    "CUDAGraph",
    "Error",
    "Launch",
    "Library",
    "Machine",
    "MachineError",
    "Resources",
    "active",
    "compile_cuda",
    "connect",
    "load_cuda",
    "machine",
    "parse",
    "resources",
    "runtime_source",
    "torch_cuda",
]
