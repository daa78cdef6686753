"""``with ptx.torch_cuda():`` replaces the functions of ``torch.cuda`` that wrappers call around a launch.

The replacements answer for the PTX machine.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import torch

from .graphs import CUDAGraph, graph

NAME = "gpt2fast PTX machine (sm_80)"


class Stream:
    """A stream whose work is done when a call returns. It is a context manager, like torch's."""

    cuda_stream = 0
    device = torch.device("cpu")

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def wait_stream(self, stream) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def record_event(self, event=None):
        return event or Event()


class Event:
    """An event. The time between two events is always 0."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None) -> None:
        pass

    def wait(self, stream=None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end) -> float:
        return 0.0


class _Device:
    """Stands for ``torch.cuda.device(...)`` and ``device_of``. There is only one device."""

    def __init__(self, device=None):
        self.idx = 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error) -> None:
        pass


def properties(device=None) -> SimpleNamespace:
    """Stands for ``torch.cuda.get_device_properties``. The machine has the properties of a device like an A100."""
    return SimpleNamespace(
        name=NAME,
        major=8,
        minor=0,
        multi_processor_count=108,
        total_memory=40 << 30,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_block=1024,
        max_threads_per_multi_processor=2048,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=163 << 10,
        shared_memory_per_multiprocessor=164 << 10,
        L2_cache_size=40 << 20,
        is_integrated=False,
        is_multi_gpu_board=False,
    )


def _nothing(*args, **kwargs) -> None:
    pass


def _stream(*args, **kwargs) -> Stream:
    return Stream()


def _capability(device=None) -> tuple[int, int]:
    return 8, 0


_ANSWERS = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_current_stream_capturing": lambda: False,
    "is_bf16_supported": lambda including_emulation=True: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda device=None: NAME,
    "get_device_capability": _capability,
    "get_device_properties": properties,
    "mem_get_info": lambda device=None: (40 << 30, 40 << 30),
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "current_stream": _stream,
    "default_stream": _stream,
    "stream": lambda stream: stream or Stream(),
    "device": _Device,
    "device_of": _Device,
    "Stream": Stream,
    "ExternalStream": Stream,
    "Event": Event,
    "CUDAGraph": CUDAGraph,
    "graph": graph,
    **dict.fromkeys(("init", "set_device", "set_stream", "synchronize", "empty_cache"), _nothing),
    "reset_peak_memory_stats": _nothing,
}


@contextlib.contextmanager
def torch_cuda() -> Iterator[None]:
    """Lets wrappers that ask ``torch.cuda`` about the device run on CPU tensors. At the end, everything is restored.

    Nothing moves to a device: ``x.cuda()`` and ``device="cuda"`` still fail, and ``is_cuda`` of a tensor stays False.
    Uses may be nested.
    """
    before = {name: vars(torch.cuda)[name] for name in _ANSWERS if name in vars(torch.cuda)}
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    try:
        for name in _ANSWERS:
            setattr(torch.cuda, name, _ANSWERS[name])
        torch._C._cuda_getCurrentRawStream = lambda device: 0
        yield
    finally:
        for name in _ANSWERS:
            if name in before:
                setattr(torch.cuda, name, before[name])
            else:
                delattr(torch.cuda, name)
        if raw is None:
            del torch._C._cuda_getCurrentRawStream
        else:
            torch._C._cuda_getCurrentRawStream = raw
