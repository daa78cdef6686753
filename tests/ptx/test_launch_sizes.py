"""What the core refuses before it runs anything: sizes above those of sm_80, and wrong parameters or buffers."""

import struct

import numpy as np
import pytest
from programs import kernel

from gpt2fast import _ptx

NOTHING = kernel("", 1)


def start(grid=(1, 1, 1), block=(32, 1, 1), shared=0, params=b"\0" * 8, buffers=(), text=NOTHING):
    return _ptx.Module(text).launch("k", grid, block, shared, params, list(buffers), 1000)


@pytest.mark.parametrize(
    ("grid", "block"),
    [
        ((0, 1, 1), (1, 1, 1)),
        ((1, 0, 1), (1, 1, 1)),
        ((1, 65536, 1), (1, 1, 1)),
        ((1, 1, 65536), (1, 1, 1)),
        ((2**31, 1, 1), (1, 1, 1)),
    ],
)
def test_grid(grid, block):
    with pytest.raises(ValueError, match=r"k: a grid has 1 to \(2147483647, 65535, 65535\) blocks, got \("):
        start(grid, block)


@pytest.mark.parametrize("block", [(0, 1, 1), (1, 1, 0), (1025, 1, 1), (1, 1, 65), (32, 33, 1)])
def test_block(block):
    with pytest.raises(ValueError, match=r"k: a block has 1 to \(1024, 1024, 64\) threads, 1024 in all, got \("):
        start(block=block)


def test_shared_memory():
    assert start(shared=163 * 1024)["error_count"] == 0
    with pytest.raises(ValueError, match="at most 166912 bytes of shared memory, got 0 static and 166913 dynamic"):
        start(shared=163 * 1024 + 1)
    with pytest.raises(ValueError, match="got 16 static and 166912 dynamic"):
        start(shared=163 * 1024, text=kernel("", 1, shared=16))


def test_bounds_that_the_kernel_gives_itself():
    text = NOTHING.replace("{", ".maxntid 64, 1, 1\n{", 1)
    assert start(block=(64, 1, 1), text=text)["error_count"] == 0
    with pytest.raises(ValueError, match="compiled for blocks of at most 64 threads, got 96"):
        start(block=(96, 1, 1), text=text)


def test_parameters():
    with pytest.raises(ValueError, match="k: expected 8 bytes of parameters, got 4"):
        start(params=b"\0" * 4)
    with pytest.raises(ValueError, match="no kernel 'j' in this module; it has: k"):
        _ptx.Module(NOTHING).launch("j", (1, 1, 1), (1, 1, 1), 0, b"", [], 1)


def test_buffers():
    x = np.zeros(4, np.uint32)
    here = x.ctypes.data
    with pytest.raises(ValueError, match="buffers 'a' and 'b' overlap"):
        start(buffers=[(here, 16, "a", True), (here + 12, 4, "b", True)])
    with pytest.raises(ValueError, match="'a': initialised has 5 bytes, the buffer 16"):
        start(buffers=[(here, 16, "a", bytearray(5))])
    with pytest.raises(ValueError, match="a buffer is"):
        start(buffers=[(here, 16, "a")])


def test_initialised_bytes_are_read_and_updated():
    x, y = np.zeros(4, np.uint32), np.zeros(4, np.uint32)
    known = bytearray([0, 0, 0, 0] + [1] * 4 + [0] * 8)
    body = """
    ld.global.u32 %r0, [%buffer0 + 4];
    st.global.u32 [%buffer0 + 8], %r0;
    ld.global.u32 %r1, [%buffer0];
    """
    params = struct.pack("<QQ", x.ctypes.data, y.ctypes.data)
    buffers = [(x.ctypes.data, 16, "x", known), (y.ctypes.data, 16, "y", True)]
    report = start(block=(1, 1, 1), params=params, buffers=buffers, text=kernel(body, 2))
    assert list(known) == [0] * 4 + [1] * 8 + [0] * 4
    (error,) = report["errors"]
    assert (error["kind"], error["buffer"], error["offset"]) == ("uninitialised", "x", 0)
    assert error["address"] == x.ctypes.data
