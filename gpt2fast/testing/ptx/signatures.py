"""Finds the extern "C" functions of a source, and converts Python arguments to their C types."""

import ctypes
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...dtypes import dtype_name
from .toolchain import WHAT

_INT = {
    "char": ctypes.c_int8, "signed char": ctypes.c_int8, "int8_t": ctypes.c_int8, "uint8_t": ctypes.c_uint8,
    "unsigned char": ctypes.c_uint8, "int16_t": ctypes.c_int16, "short": ctypes.c_int16, "uint16_t": ctypes.c_uint16,
    "int": ctypes.c_int32, "int32_t": ctypes.c_int32, "unsigned": ctypes.c_uint32, "unsigned int": ctypes.c_uint32,
    "uint32_t": ctypes.c_uint32, "long": ctypes.c_int64, "long long": ctypes.c_int64, "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64, "unsigned long": ctypes.c_uint64, "unsigned long long": ctypes.c_uint64,
    "size_t": ctypes.c_uint64, "ptrdiff_t": ctypes.c_int64,
}  # fmt: skip
_FLOAT = {"float": ctypes.c_float, "double": ctypes.c_double}
_POINTEE = {
    "float": torch.float32, "double": torch.float64, "half": torch.float16, "__half": torch.float16,
    "nv_bfloat16": torch.bfloat16, "__nv_bfloat16": torch.bfloat16, "bool": torch.bool, "uint8_t": torch.uint8,
    "unsigned char": torch.uint8, "int8_t": torch.int8, "signed char": torch.int8, "int16_t": torch.int16,
    "short": torch.int16, "int": torch.int32, "int32_t": torch.int32, "int64_t": torch.int64, "long": torch.int64,
    "long long": torch.int64, "uint16_t": torch.uint16, "uint32_t": torch.uint32, "unsigned": torch.uint32,
    "unsigned int": torch.uint32, "uint64_t": torch.uint64,
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    type: str  # without const, restrict and spaces before the star: "float*", "int64_t"
    name: str

    @property
    def is_stream(self) -> bool:
        return self.type in ("cudaStream_t", "CUstream")

    @property
    def is_pointer(self) -> bool:
        return self.type.endswith("*")

    def ctype(self, function: str):
        if self.is_pointer or self.is_stream:
            return ctypes.c_void_p
        if self.type == "bool":
            return ctypes.c_bool
        found = _INT.get(self.type) or _FLOAT.get(self.type)
        if found is None:
            raise TypeError(f"{WHAT}: {function}: {self.name} is a {self.type}, which Python cannot pass")
        return found

    def convert(self, function: str, value: Any):
        what = f"{WHAT}: {function}: {self.name}"
        if self.is_stream:
            return value
        if self.is_pointer:
            return self._pointer(what, value)
        if isinstance(value, Tensor):
            raise TypeError(f"{what} must be a {self.type}, got a tensor")
        if self.type in _FLOAT:
            if not isinstance(value, (int, float)):
                raise TypeError(f"{what} must be a number, got {type(value).__name__}")
            return value
        if self.type == "bool":
            return bool(value)
        if not hasattr(value, "__index__"):
            raise TypeError(f"{what} must be a whole number, got {type(value).__name__} {value!r}")
        whole, ctype = value.__index__(), self.ctype(function)
        if ctype(whole).value != whole:
            raise ValueError(f"{what} is a {self.type}, which does not hold {whole}")
        return whole

    def _pointer(self, what: str, value: Any) -> int | None:
        if value is None or isinstance(value, int):
            return value
        if not isinstance(value, Tensor):
            raise TypeError(f"{what} must be a tensor, None or an address, got {type(value).__name__}")
        if value.device.type != "cpu":
            raise ValueError(f"{what} must be on cpu, where the machine runs, got {value.device}")
        wanted = _POINTEE.get(self.type[:-1])
        if wanted is not None and value.dtype != wanted:
            names = (dtype_name(d) for d in (wanted, value.dtype))
            raise TypeError("{} is a {}: dtype must be {}, got {}".format(what, self.type, *names))
        return value.data_ptr()


@dataclass(frozen=True)
class Function:
    name: str
    returns: str
    parameters: tuple[Parameter, ...]

    @cached_property
    def argtypes(self) -> list:
        return [p.ctype(self.name) for p in self.parameters]

    @cached_property
    def restype(self):
        if self.returns == "void":
            return None
        return ctypes.c_int if self.returns == "cudaError_t" else Parameter(self.returns, "result").ctype(self.name)

    def convert(self, args: tuple) -> list:
        """The C values of a call. Streams at the end may be left out. Raises TypeError where arguments do not fit."""
        needed = len(self.parameters)
        while needed > len(args) and self.parameters[needed - 1].is_stream:
            needed -= 1
        if not needed <= len(args) <= len(self.parameters):
            names = ", ".join(f"{p.type} {p.name}" for p in self.parameters)
            raise TypeError(f"{WHAT}: {self.name} takes {len(self.parameters)} arguments ({names}), got {len(args)}")
        values = [p.convert(self.name, a) for p, a in zip(self.parameters, args)]
        return values + [None] * (len(self.parameters) - len(args))


_DEFINITION = re.compile(r"([A-Za-z_][\w\s]*?[\s*]+)(\w+)\s*\(([^(){}]*)\)\s*(?:noexcept\s*)?\{")


def functions(source: str) -> list[Function]:
    """The functions that ``source`` defines as ``extern "C"``, one by one or in a block."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", source, flags=re.S)
    found = []
    for start in re.finditer(r'extern\s+"C"\s*', text):
        if text[start.end()] == "{":
            found += _in_block(text, start.end() + 1)
        elif match := _DEFINITION.match(text, start.end()):
            found.append(_function(match))
    return [f for f in found if f is not None]


def _in_block(text: str, at: int) -> list:
    found, end = [], _closing(text, at)
    while (match := _DEFINITION.search(text, at, end)) is not None:
        found.append(_function(match))
        at = _closing(text, match.end())
    return found


def _closing(text: str, at: int) -> int:
    """The position after the closing brace of the block that begins at ``at``."""
    depth = 1
    while depth and at < len(text):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        at += 1
    return at


def _function(match: re.Match) -> Function | None:
    words = match[1].split()
    if "__global__" in words or "__device__" in words or "static" in words:
        return None
    returns = _type(match[1])
    parameters = [p.strip() for p in match[3].split(",") if p.strip() not in ("", "void")]
    return Function(match[2], returns, tuple(_parameter(p, i) for i, p in enumerate(parameters)))


def _parameter(text: str, index: int) -> Parameter:
    text = text.split("=")[0].strip()
    match = re.fullmatch(r"(.*?[\s*&])(\w+)(\s*\[\s*\d*\s*\])?", text, re.S)
    if match is None or match[2] in _INT or match[2] in _FLOAT:
        return Parameter(_type(text), f"argument {index}")
    return Parameter(_type(match[1]) + ("*" if match[3] else ""), match[2])


def _type(text: str) -> str:
    words = re.sub(r"\b(const|struct|__restrict__|__restrict|restrict|__host__|inline|std::)\b", " ", text)
    return re.sub(r"\s*\*\s*", "*", " ".join(words.replace("std::", " ").split()))
