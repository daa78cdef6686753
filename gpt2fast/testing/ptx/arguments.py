"""Converts Python arguments to the bytes of a PTX kernel's parameters."""

import struct
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .toolchain import WHAT


def on_cpu(tensor: Tensor, name: str) -> Tensor:
    if tensor.device.type != "cpu":
        raise ValueError(f"{WHAT}: {name} must be on cpu, where the machine runs, got {tensor.device}")
    return tensor


def words(params: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(params) // 8}Q", params[: len(params) // 8 * 8]))


def lay_out(kernel: str, wanted: list[dict], values: Sequence[bytes]) -> bytes:
    if len(values) != len(wanted):
        raise TypeError(f"{WHAT}: {kernel} takes {len(wanted)} arguments, got {len(values)}")
    params = bytearray(max((p["offset"] + p["bytes"] for p in wanted), default=0))
    for p, value in zip(wanted, values):
        if len(value) != p["bytes"]:
            raise TypeError(f"{WHAT}: {kernel}: {p['name']} must have {p['bytes']} bytes, got {len(value)}")
        params[p["offset"] : p["offset"] + p["bytes"]] = value
    return bytes(params)


def pack(kernel: str, param: dict, value: Any) -> bytes:
    """The bytes of a PTX parameter for a Python argument. Raises TypeError or ValueError where it does not fit."""
    kind, size, name = param["type"], param["bytes"], param["name"]
    what = f"{WHAT}: {kernel}: {name} is a .{kind}"
    if isinstance(value, bytes):
        return value
    if isinstance(value, Tensor):
        if size != 8 or kind[0] == "f":
            raise TypeError(f"{what} and takes no tensor")
        return struct.pack("<Q", on_cpu(value, name).data_ptr())
    if value is None and size == 8:
        return bytes(8)
    if kind[0] == "f":
        if not isinstance(value, (int, float)):
            raise TypeError(f"{what} and takes a number, got {type(value).__name__}")
        return struct.pack({2: "<e", 4: "<f", 8: "<d"}[size], value)
    if isinstance(value, bool) or not isinstance(value, int):
        value = value.__index__() if hasattr(value, "__index__") else value
    if not isinstance(value, int):
        raise TypeError(f"{what} and takes a whole number, got {type(value).__name__} {value!r}")
    if not -(1 << 8 * size - 1) <= value < 1 << 8 * size:
        raise ValueError(f"{what} and does not hold {value}")
    return (value & (1 << 8 * size) - 1).to_bytes(size, "little")
