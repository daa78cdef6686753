"""Runs GPU kernels without a GPU: PTX that nvcc or Triton has compiled is run on the CPU, checked and counted.

Inside ``with ptx.machine() as m:``, the launches of Triton and of ``load_cuda`` run here. ``m.launches`` has a report
of each. The machine does not measure time. The rounding of tensor cores and the results of approximate functions may
differ from hardware in some bits.
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
