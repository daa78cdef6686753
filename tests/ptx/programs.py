"""Runs kernels that are written in PTX by hand, a body between declarations, on numpy arrays."""

import struct
from typing import Any

import numpy as np

from gpt2fast import _ptx

HEADER = """.version 8.0
.target {target}
.address_size 64
"""
REGISTERS = """
.reg .b16 %h<100>;
.reg .b32 %r<100>;
.reg .b64 %rd<100>;
.reg .f32 %f<100>;
.reg .f64 %d<100>;
.reg .pred %p<20>;
.reg .b64 %buffer<16>;
.reg .b32 %thread;
.reg .b64 %wide;
"""


def kernel(body: str, buffers: int, target: str = "sm_80", shared: int = 0) -> str:
    """%buffer0… hold the buffers' addresses, %thread the thread's index in x, `tile` is shared memory."""
    params = ", ".join(f".param .u64 p{i}" for i in range(buffers))
    loads = "".join(f"ld.param.u64 %buffer{i}, [p{i}];\n" for i in range(buffers))
    tile = f".shared .align 16 .b8 tile[{shared}];\n" if shared else ""
    head = HEADER.format(target=target) + tile
    return f"{head}.visible .entry k({params})\n{{{REGISTERS}{loads}mov.u32 %thread, %tid.x;\n{body}\nret;\n}}\n"


def load(register: str, buffer: int, kind: str, index: int = 0, count: int = 1) -> str:
    """The thread's index-th of count values."""
    return place(buffer, kind, index, count) + f"ld.global.{kind} {register}, [%wide];\n"


def store(register: str, buffer: int, kind: str, index: int = 0, count: int = 1) -> str:
    return place(buffer, kind, index, count) + f"st.global.{kind} [%wide], {register};\n"


def place(buffer: int, kind: str, index: int, count: int) -> str:
    size = int(kind[1:]) // 8
    return f"mad.wide.u32 %wide, %thread, {size * count}, %buffer{buffer};\nadd.s64 %wide, %wide, {size * index};\n"


def launch(
    text: str,
    *arrays: np.ndarray,
    block: tuple[int, int, int] = (32, 1, 1),
    grid: tuple[int, int, int] = (1, 1, 1),
    dynamic_shared: int = 0,
    budget: int = 1_000_000,
    initialised: bool = True,
) -> dict[str, Any]:
    """Runs a body and returns the launch's report, even if it has errors."""
    module = _ptx.Module(text)
    params = b"".join(struct.pack("<Q", a.ctypes.data) for a in arrays)
    buffers = [(a.ctypes.data, a.nbytes, f"buffer{i}", initialised) for i, a in enumerate(arrays)]
    return module.launch("k", grid, block, dynamic_shared, params, buffers, budget, True, True)


def run(body: str, *arrays: np.ndarray, shared: int = 0, target: str = "sm_80", **how: Any) -> dict[str, Any]:
    """Runs a body that must have no errors, and returns the counters."""
    report = launch(kernel(body, len(arrays), target, shared), *arrays, **how)
    assert report["error_count"] == 0, report["errors"]
    return report["counters"]


def errors(body: str, *arrays: np.ndarray, shared: int = 0, **how: Any) -> list[dict[str, Any]]:
    report = launch(kernel(body, len(arrays), shared=shared), *arrays, **how)
    assert report["error_count"] >= len(report["errors"])
    return report["errors"]
