"""Reads and writes the safetensors format: 8 bytes with the length of the header, a JSON header, the tensors' bytes.

The whole header is checked before a tensor is read.
"""

import json
import math
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .dtypes import dtype_name
from .memory import ALIGNMENT, bytes_of

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000
MOST_DIMENSIONS = 64
BLOCK = 8 << 20


class _File:
    """A file that stays open. Later reads come from the file whose header was checked, even if the name changes."""

    def __init__(self, path: Path):
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.size = os.fstat(self.descriptor).st_size
        self._mapped: mmap.mmap | None = None

    def fill(self, memory: memoryview, offset: int) -> None:
        while memory:
            count = os.preadv(self.descriptor, [memory[: 1 << 30]], offset)
            if not count:
                raise ValueError(f"gpt2fast: {self.path} ended while it was read")
            memory, offset = memory[count:], offset + count

    def map(self) -> mmap.mmap:
        """The file's bytes in memory. Pages are read when they are used. Writes to them change no file."""
        if self._mapped is None:
            self._mapped = mmap.mmap(self.descriptor, self.size, access=mmap.ACCESS_COPY)
        return self._mapped

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@dataclass
class Stored:
    """One tensor of a file and the place of its bytes. A dtype that is not in DTYPES is kept as its name."""

    file: _File
    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype | str

    def need_known_dtype(self) -> torch.dtype:
        if isinstance(self.dtype, str):
            known = ", ".join(DTYPES)
            raise TypeError(f"gpt2fast: {self.name} of {self.file.path} has dtype {self.dtype!r}, none of {known}")
        return self.dtype

    def copy_to(self, out: Tensor) -> None:
        """Fills ``out``, which is contiguous and of this shape. With the same dtype, it is read directly into memory.

        Errors: TypeError for a dtype that is not in DTYPES.
        """
        if out.dtype == self.need_known_dtype():
            self.file.fill(bytes_of(out), self.offset)
            return
        flat, done = out.view(-1), 0
        for block in self.blocks():
            flat[done : done + block.numel()].copy_(block)
            done += block.numel()

    def map(self) -> Tensor:
        """The tensor in the mapped file, which stays open with it. Errors: as ``copy_to``."""
        dtype, count = self.need_known_dtype(), math.prod(self.shape)
        if not count:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(self.file.map(), dtype=dtype, count=count, offset=self.offset).view(self.shape)

    def blocks(self) -> Iterator[Tensor]:
        """The elements in order, a few MiB at a time. A block is valid until the next one."""
        dtype, rest, at = self.need_known_dtype(), math.prod(self.shape), self.offset
        space = torch.empty(min(rest, BLOCK // dtype.itemsize), dtype=dtype)
        while rest:
            block = space[:rest]
            self.file.fill(bytes_of(block), at)
            yield block
            rest -= block.numel()
            at += block.numel() * dtype.itemsize


def read(path: str | Path) -> dict[str, Stored]:
    """The tensors of a file by name. Only the header is read. The file stays open as long as one of them exists.

    Errors: as ``read_all``.
    """
    return read_all(path)[0]


def read_all(path: str | Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a file by name, as ``read``, and its metadata.

    Errors: ValueError that says what is wrong with the file. A dtype that is not in DTYPES raises only when its tensor
    is read.
    """
    path = Path(path)

    def need(fine: bool, what: str) -> None:
        if not fine:
            raise ValueError(f"gpt2fast: {path} is not a valid safetensors file: {what}")

    file = _File(path)
    size, start = file.size, bytearray(8)
    need(size >= 8, f"it has {size} bytes, too few for a header")
    file.fill(memoryview(start), 0)
    length = int.from_bytes(start, "little")
    need(length <= LONGEST_HEADER, f"its header would have {length} bytes")
    need(8 + length <= size, f"its header of {length} bytes ends beyond its {size} bytes (truncated?)")
    text = bytearray(length)
    file.fill(memoryview(text), 8)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        need(False, f"its header is not JSON: {error}")
    need(isinstance(header, dict), "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    need(isinstance(metadata, dict), "its metadata is not a JSON object")
    need(all(isinstance(value, str) for value in metadata.values()), "its metadata has values that are not strings")

    found, spans = {}, []
    for name, entry in header.items():
        need(isinstance(entry, dict), f"the entry of {name} is not a JSON object")
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        need(isinstance(dtype, str), f"{name} has dtype {dtype!r}")
        need(_are_sizes(shape) and len(shape) <= MOST_DIMENSIONS, f"{name} has shape {_short(shape)}")
        need(_are_sizes(offsets) and len(offsets) == 2, f"{name} has data_offsets {_short(offsets)}")
        begin, end = offsets
        known = DTYPES.get(dtype)
        if known is not None:
            expected = math.prod(shape) * known.itemsize
            need(end - begin == expected, f"{name} needs {expected} bytes, its data_offsets span {end - begin}")
        need(begin <= end, f"{name} has data_offsets {offsets!r}")
        need(8 + length + end <= size, f"{name} ends beyond the file's {size} bytes (truncated?)")
        found[name] = Stored(file, name, 8 + length + begin, tuple(shape), known or dtype)
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        need(begin >= at, f"{name} overlaps another tensor")
        need(begin == at, f"{begin - at} bytes before {name} belong to no tensor")
        at = end
    need(8 + length + at == size, f"{size - 8 - length - at} bytes at its end belong to no tensor")
    return found, metadata


def _unique(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _are_sizes(value) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


def write(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes CPU or GPU tensors. The header says ``format: pt``, which transformers requires, and the metadata.

    The bytes of the tensors start at a multiple of 64, and so does each tensor whose predecessors have such sizes.

    Errors: TypeError for a dtype that is not in DTYPES, before the file is touched.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            known = ", ".join(dtype_name(dtype) for dtype in NAMES)
            got = dtype_name(tensor.dtype)
            raise TypeError(f"gpt2fast.safetensors.write: {name} must have one of the dtypes {known}, got {got}")
    header: dict[str, dict] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    at = 0
    order = sorted(tensors, key=lambda name: (_place(tensors[name]), name))
    for name in order:
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with open(path, "wb", buffering=0) as file:
        _write(file, memoryview(len(text).to_bytes(8, "little") + text))
        for name in order:
            tensor = tensors[name].detach().cpu().contiguous()
            _write(file, bytes_of(tensor))
        os.fsync(file.fileno())


def _place(tensor: Tensor) -> tuple[bool, int]:
    """The order of the tensors in a file: those of whole cache lines first, then the wide ones, so that all align."""
    return bool(tensor.numel() * tensor.element_size() % ALIGNMENT), -tensor.element_size()


def _write(file, memory: memoryview) -> None:
    while memory:
        memory = memory[file.write(memory[: 1 << 30]) :]
