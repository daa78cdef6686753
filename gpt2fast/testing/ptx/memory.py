"""Keeps track of the memory that kernels may access, and of the bytes that were written.

A buffer is a whole storage. The buffers are those of the tensors that a launch gets, those whose address Python asked
for while the machine runs (``x.data_ptr()`` for a table of pointers), those of cudaMalloc, and those of
``machine.register``.
"""

import bisect
import ctypes
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .toolchain import WHAT

FRESH = 0xFF  # the bytes of fresh memory: NaN in every floating type, -1 in every signed integer


@dataclass
class Buffer:
    """``written`` has a byte for each byte of the buffer, 0 if it was never written. None: all of it counts as written.

    Memory is fresh if ``torch.empty`` and similar functions, or cudaMalloc, made it while the machine runs. Where torch
    writes to a fresh tensor, its version counter changes or, without one (inference mode, numpy), some bytes are no
    longer FRESH. Then all of it counts as written, so that host code is never reported by mistake. What kernels write
    is known for each byte, from launch to launch.
    """

    address: int
    bytes: int
    name: str
    storage: StorageWeakRef | None = None
    written: np.ndarray | None = None
    version: int = 0
    launched: bool = False
    freed: bool = field(default=False)

    @property
    def alive(self) -> bool:
        if not self.freed and self.storage is not None and self.storage.expired():
            self.freed = True
        return not self.freed

    @property
    def end(self) -> int:
        return self.address + self.bytes

    def content(self) -> np.ndarray:
        return np.frombuffer((ctypes.c_uint8 * self.bytes).from_address(self.address), dtype=np.uint8)

    def look_for_writes(self, tensor: Tensor | None) -> None:
        """Makes a fresh buffer an ordinary one if host code has written into it."""
        if self.written is None:
            return
        counted = tensor is not None and not tensor.is_inference() and tensor._version != self.version
        if counted or (self.content()[self.written == 0] != FRESH).any():
            self.written = None

    def unwritten(self) -> tuple[int, int] | None:
        """The number of bytes that were never written and the offset of the first; None if all were written."""
        if self.written is None or self.written.all():
            return None
        holes = np.flatnonzero(self.written == 0)
        return len(holes), int(holes[0])


class Memory:
    """The known buffers, by address. Freed ones are kept, so that an error can name them."""

    def __init__(self):
        self._buffers: dict[int, Buffer] = {}
        self._addresses: list[int] = []
        self.variables: dict[int, tuple[str, int]] = {}  # device variables that host code uses: name and bytes
        self._patched: list[tuple[type | object, str, object]] = []

    def note(self, tensor: Tensor, name: str = "", fresh: bool = False) -> Buffer | None:
        """Makes the storage of a tensor known and returns its buffer, or None for an empty one."""
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not address or not size:
            return None
        found = self._buffers.get(address)
        if found is None or found.bytes != size or not found.alive or fresh:
            found = self._add(Buffer(address, size, name or "a tensor", StorageWeakRef(storage)))
        if name:
            found.name = name
        if fresh:
            storage.fill_(FRESH)
            found.written = np.zeros(size, dtype=np.uint8)
            found.version = 0 if tensor.is_inference() else tensor._version
        return found

    def device_event(self, address: int, size: int, event: int) -> None:
        """Handles an event of the CUDA runtime: 0 is freed, from 1 on is allocated by the call of that number."""
        if event == 0:
            self._buffers[address].freed = True
        else:
            name = ("cudaMalloc", "cudaMallocManaged", "cudaMallocHost")[event - 1]
            self._add(Buffer(address, max(size, 1), name, written=np.zeros(max(size, 1), dtype=np.uint8)))

    def copy(self, call: str, to: int, source: int | None, size: int, to_device: bool, from_device: bool) -> None:
        """Checks a copy by host code, or a fill (no source), before it is made, and notes what it writes.

        Raises ValueError for a null pointer, for a range that leaves its buffer, for freed memory, and for an address
        in no buffer if the call says that it is on the device. Other addresses in no buffer are host memory.
        """
        into = self._range(call, "destination", to, size, to_device)
        of = None if source is None else self._range(call, "source", source, size, from_device)
        if into is None:
            return
        into.look_for_writes(None)
        wrote = None
        if of is not None:
            of.look_for_writes(None)
            wrote = None if of.written is None else of.written[source - of.address : source - of.address + size]
        if into.written is None and wrote is not None and not wrote.all():
            into.written = np.ones(into.bytes, dtype=np.uint8)
        if into.written is not None:
            into.written[to - into.address : to - into.address + size] = 1 if wrote is None else wrote

    def _range(self, call: str, role: str, address: int, size: int, on_device: bool) -> Buffer | None:
        """The buffer of a range of memory; None for host memory and for device variables."""
        what = f"{WHAT}: {call}: the {role} must be {size} bytes"
        if not address:
            raise ValueError(f"{what}, got a null pointer")
        if (found := self.at(address)) is not None:
            if address + size > found.end:
                offset = address - found.address
                raise ValueError(f"{what}, got {found.end - address} of {found.name} ({found.bytes} bytes) at {offset}")
            return found
        # Memory that the device has freed may have been allocated again by the host.
        if on_device and (freed := self.at(address, alive=False)) is not None:
            raise ValueError(f"{what}, got a pointer into {freed.name}, which was freed before")
        for start, (name, length) in self.variables.items():
            if start <= address < start + length:
                if address + size > start + length:
                    raise ValueError(f"{what}, got {start + length - address} of {name} ({length} bytes)")
                return None
        if on_device:
            raise ValueError(f"{what} on the device, got {address:#x}, which is in no buffer")
        return None

    def at(self, address: int, alive: bool = True) -> Buffer | None:
        """The buffer at an address; with ``alive=False``, one that was freed."""
        i = bisect.bisect_right(self._addresses, address) - 1
        if i < 0:
            return None
        found = self._buffers[self._addresses[i]]
        return found if address < found.end and found.alive == alive else None

    def alive(self) -> list[Buffer]:
        return [self._buffers[a] for a in self._addresses if self._buffers[a].alive]

    def _add(self, buffer: Buffer) -> Buffer:
        low = max(bisect.bisect_right(self._addresses, buffer.address) - 1, 0)
        for address in self._addresses[low:]:
            if address >= buffer.end:
                break
            if self._buffers[address].end > buffer.address:  # the older buffer no longer exists
                del self._buffers[address]
        self._buffers[buffer.address] = buffer
        self._addresses = sorted(self._buffers)
        return buffer

    # --- watching which tensors are made, only while a machine runs ---

    def watch(self) -> None:
        for owner, name in (
            *((torch, n) for n in ("empty", "empty_like", "empty_strided", "empty_permuted")),
            *((Tensor, n) for n in ("new_empty", "new_empty_strided")),
        ):
            self._patch(owner, name, self._allocating(getattr(owner, name)))
        self._patch(Tensor, "data_ptr", self._asking(Tensor.data_ptr))

    def unwatch(self) -> None:
        for owner, name, before in reversed(self._patched):
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        self._patched.clear()

    def _patch(self, owner, name: str, function) -> None:
        self._patched.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, function)

    def _allocating(self, original):
        def allocate(*args, **kwargs):
            made = original(*args, **kwargs)
            if type(made) is Tensor and made.device.type == "cpu" and kwargs.get("out") is None:
                self.note(made, fresh=True)
            return made

        return allocate

    def _asking(self, original):
        def data_ptr(tensor):
            if tensor.device.type == "cpu" and type(tensor) in (Tensor, torch.nn.Parameter):
                self.note(tensor)
            return original(tensor)

        return data_ptr
