"""CUDA host code on the PTX machine: checked copies and fills, exits, and queries to the runtime."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt2fast.testing import ptx

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH"),
    pytest.mark.skipif(importlib.util.find_spec("gpt2fast._ptx") is None, reason="gpt2fast._ptx is not built"),
]
SOURCE = Path(__file__).with_name("launcher.cu")
LINE = next(f"launcher.cu:{i}" for i, line in enumerate(SOURCE.open(), 1) if "y[i] = a * x[i]" in line)


@pytest.fixture(scope="module")
def library():
    return ptx.load_cuda(SOURCE)


@pytest.mark.parametrize("allocated, filled", ((100, 100), (100, 0), (0, 0)))
def test_fills_that_fit(library, allocated, filled):
    with ptx.machine():
        assert library.fill(allocated, filled) == 0
        assert library.copy_in(torch.zeros(50), allocated, filled) == 0


@pytest.mark.parametrize(
    "call, allocated, size, message",
    (
        ("fill", 100, 200, r"cudaMemset: the destination must be 200 bytes, got 100 of cudaMalloc \(100 bytes\) at 0"),
        ("fill", 0, 200, "cudaMemset: the destination must be 200 bytes, got a null pointer"),
        ("copy_in", 100, 200, r"cudaMemcpyAsync: the destination must be 200 bytes, got 100 of cudaMalloc"),
        ("copy_in", 0, 200, "cudaMemcpyAsync: the destination must be 200 bytes, got a null pointer"),
        ("copy_in", 300, 300, r"cudaMemcpyAsync: the source must be 300 bytes, got 200 of x \(200 bytes\) at 0"),
    ),
)
@pytest.mark.parametrize("raise_errors", (True, False))
def test_fills_and_copies_out_of_bounds(library, call, allocated, size, message, raise_errors):
    arguments = (allocated, size) if call == "fill" else (torch.zeros(50), allocated, size)
    with ptx.machine(raise_errors=raise_errors), pytest.raises(ValueError, match=message):
        getattr(library, call)(*arguments)


def test_directions(library):
    with ptx.machine():
        assert library.copy_into_the_stack(torch.zeros(4), False) == 0
        with pytest.raises(ValueError, match="the destination must be 16 bytes on the device, got 0x.* in no buffer"):
            library.copy_into_the_stack(torch.zeros(4), True)


@pytest.mark.parametrize("written", (400, 100, 0))
@pytest.mark.parametrize("fresh", (True, False))
def test_a_copy_of_what_nothing_wrote(library, written, fresh):
    out = torch.empty(100)
    with ptx.machine(raise_errors=False) as m:
        y = torch.empty(100) if fresh else torch.zeros(100)
        library.copy_of_a_buffer(y, written)
        library.scale_and_check(y, out, 100, 1)
    kinds = {e.kind for e in m.launches[0].errors}
    assert kinds == (set() if written == 400 else {"uninitialised"})


def ends(call: str, raise_errors: bool = True) -> subprocess.CompletedProcess:
    code = (
        "import torch\nfrom gpt2fast.testing import ptx\n"
        f"library = ptx.load_cuda({str(SOURCE)!r})\nx, y = torch.zeros(100), torch.zeros(100)\n"
        f"with ptx.machine(raise_errors={raise_errors}): {call}\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("call, code", (("scale_too_far", 3), ("scale_and_leave", 4)))
def test_findings_come_before_an_exit(library, call, code):
    done = ends(f"library.{call}(x, y, 128)")
    assert done.returncode == code
    assert f"bounds at {LINE}" in done.stderr and "scale(float const*, float*, int, float)" in done.stderr


def test_findings_that_are_not_raised_come_before_an_exit(library):
    done = ends("library.scale_and_leave(x, y, 128)", raise_errors=False)
    assert done.returncode == 4 and f"bounds at {LINE}" in done.stderr


@pytest.mark.parametrize("call, code", (("scale_and_leave(x, y, 100)", 4), ("scale_and_check(x, y, 100, 1)", 0)))
def test_nothing_is_printed_where_nothing_is_wrong(library, call, code):
    done = ends(f"library.{call}")
    assert (done.returncode, done.stderr) == (code, "")


def test_an_error_that_python_raises_is_printed_once(library):
    done = ends("library.copy_in(x, 0, 4)")
    assert done.returncode == 1 and done.stderr.count("4 bytes, got a null pointer") == 1


def test_launch_configurations(library):
    x, y = torch.randn(300), torch.zeros(300)
    with ptx.machine() as m:
        library.launch_ex(x, y, 300, 0)
        assert torch.equal(y, 3 * x)
        library.launch_ex(x, y, 300, 1)
        library.launch_ex(x, y, 300, 2)
    assert len(m.launches) == 2


def test_occupancy(library):
    found = torch.zeros(7, dtype=torch.int32)
    with ptx.machine() as m:
        library.occupancy(found)
        library.scale_and_check(torch.zeros(9), torch.zeros(9), 9, 1)
    resources = m.launches[0].resources()
    registers, most, bounded, blocks, fewer, grid, block = found.tolist()
    assert (registers, most, bounded) == (resources.registers, 1024, 256)
    assert blocks == resources.blocks(128) == 16 and fewer == resources.blocks(128, 48 * 1024) == 3
    assert block == 1024 and grid == 2 * 108


def test_events_know_no_time(library):
    with ptx.machine():
        assert library.events() == 0


def test_kinds_of_memory(library):
    found = torch.zeros(9, dtype=torch.int32)
    with ptx.machine():
        library.kinds_of_memory(torch.zeros(2), found)
    device, managed, host, tensor, local, pitch, fits, wrong, blocks = found.tolist()
    assert (device, managed, host, tensor, local) == (2, 3, 1, 2, 0)
    assert pitch == 1024 and fits == 0 and wrong != 0 and blocks == 32


def test_all_that_is_missing_is_named_at_once():
    source = (
        '#include <cuda_runtime.h>\nextern "C" void f(float* x) { cudaGraph_t g; cudaGraphCreate(&g, 0);\n'
        "cudaMemPrefetchAsync(x, 4, {}, 0, 0); cudaProfilerStart(); }\n"
    ).replace("cudaProfilerStart();", "cudaIpcCloseMemHandle(x);")
    named = "cudaGraphCreate, cudaIpcCloseMemHandle, cudaMemPrefetchAsync"
    with pytest.raises(RuntimeError, match=f"runtime has no {named}, which"):
        ptx.load_cuda(source)
