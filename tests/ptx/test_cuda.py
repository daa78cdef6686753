"""A CUDA extension on the PTX machine: plain launches, device variables, device memory, and clear errors."""

import importlib.util
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from gpt2fast import disk_cache
from gpt2fast.testing import ptx

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


needs_core = pytest.mark.skipif(importlib.util.find_spec("gpt2fast._ptx") is None, reason="gpt2fast._ptx is not built")


@pytest.fixture(scope="module")
def library():
    return ptx.load_cuda(Path(__file__).with_name("launcher.cu"))


@needs_core
def test_a_plain_launch_with_a_constant_variable(library):
    x, y = torch.randn(300), torch.empty(300)
    with ptx.machine() as m:
        assert library.polynomial_float(x, y, 300, 1.0, 2.0, 3.0) == 0
    torch.testing.assert_close(y, 1 + x * (2 + x * 3))
    (launch,) = m.launches
    assert launch.name == "void polynomial<float>(float const*, float*, long)"
    assert (launch.grid, launch.block, launch.shared) == ((3, 1, 1), (128, 1, 1), 512)
    assert launch.per_buffer["x"]["read_bytes"] == 1200 and launch.per_buffer["y"]["written_bytes"] == 1200
    assert "global load: 1,200 bytes in 10 requests" in m.report()


@needs_core
def test_a_device_variable_keeps_its_value(library):
    x = torch.randn(8)
    with ptx.machine():
        before = library.count_launches()
        for _ in range(2):
            library.polynomial_float(x, torch.empty(8), 8, 0.0, 1.0, 0.0)
        assert before >= 40 and library.count_launches() == before + 2


@needs_core
def test_device_memory_and_a_struct_argument(library):
    x, out = torch.randn(5, 7), torch.empty(5)
    with ptx.machine() as m:
        library.row_sums_through_device_memory(x, out, 5, 7)
    torch.testing.assert_close(out, x.sum(1))
    assert m.launches[0].per_buffer["cudaMalloc"]["read_bytes"] == 140


@needs_core
def test_device_memory_that_was_freed_too_early(library):
    with ptx.machine(), pytest.raises(ValueError, match="pointer into cudaMalloc, which was freed before"):
        library.row_sums_too_late(torch.randn(5, 7), torch.zeros(5), 5, 7)


@needs_core
def test_a_tensor_that_was_freed_too_early(library):
    with ptx.machine():
        x, y = torch.randn(1000), torch.zeros(1000)  # y is made before x is freed, or it would get x's memory
        address = x.data_ptr()
        del x
        with pytest.raises(ValueError, match="pointer into a tensor, which was freed before"):
            library.polynomial_float(address, y, 1000, 0.0, 1.0, 0.0)


@needs_core
def test_dynamic_shared_memory_above_48_kilobytes(library):
    y = torch.empty(64)
    with ptx.machine():
        with pytest.raises(ValueError, match="at most 49152 bytes, got 65536; cudaFuncSetAttribute"):
            library.reverse_large(y, False)
        library.reverse_large(y, True)
    assert y.tolist() == list(range(63, -1, -1))


@needs_core
def test_printf(library):
    with ptx.machine() as m:
        library.speak(7)
    assert m.launches[0].printed == "block 0 says 7\nblock 1 says 7\n"


def test_a_device_that_code_may_ask(library):
    with ptx.machine():
        assert library.multiprocessors() == 108


def test_a_machine_must_run(library):
    with pytest.raises(RuntimeError, match=r"speak must be called inside `with ptx.machine\(\):`"):
        library.speak(1)


@pytest.mark.parametrize(
    "change, error, message",
    (
        (lambda a: a[:3], TypeError, r"takes 7 arguments \(float\* x, .*cudaStream_t stream\), got 3"),
        (lambda a: [a[0].double(), *a[1:]], TypeError, r"x is a float\*: dtype must be float32, got float64"),
        (lambda a: [a[0], 1.5, *a[2:]], TypeError, "y must be a tensor, None or an address, got float"),
        (lambda a: [*a[:2], 8.0, *a[3:]], TypeError, "n must be a whole number, got float"),
        (lambda a: [*a[:3], "1", *a[4:]], TypeError, "c0 must be a number, got str"),
        (lambda a: [*a[:2], 2**70, *a[3:]], ValueError, "n is a int64_t, which does not hold"),
        (lambda a: [a[0].to("meta"), *a[1:]], ValueError, "x must be on cpu, where the machine runs, got meta"),
    ),
)
def test_arguments_that_do_not_fit(library, change, error, message):
    with ptx.machine(), pytest.raises(error, match=message):
        library.polynomial_float(*change([torch.randn(8), torch.zeros(8), 8, 1.0, 2.0, 3.0]))


def test_names_that_are_not_there(library):
    with pytest.raises(AttributeError, match="no extern \"C\" function 'cube'; they define polynomial_float"):
        library.cube  # noqa: B018


def test_a_runtime_call_that_the_machine_lacks():
    source = '#include <cuda_runtime.h>\nextern "C" void f(float* x) { cudaMemPrefetchAsync(x, 4, {}, 0, 0); }\n'
    with pytest.raises(RuntimeError, match="the machine's CUDA runtime has no cudaMemPrefetchAsync"):
        ptx.load_cuda(source)


def test_a_source_that_does_not_compile():
    with pytest.raises(RuntimeError, match="(?s)nvcc on the given source failed:.*not_a_type"):
        ptx.compile_cuda("__global__ void f(not_a_type x) {}\n")


def test_the_cache_goes_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2FAST_CACHE", str(tmp_path / "cache"))
    from gpt2fast.testing.ptx import toolchain

    runs = []
    original = toolchain.run
    monkeypatch.setattr(toolchain, "run", lambda command, what: runs.append(what) or original(command, what))
    header, source = tmp_path / "factor.h", tmp_path / "kernel.cu"
    header.write_text("#define FACTOR 2.0f\n")
    source.write_text('#include "factor.h"\nextern "C" __global__ void f(float* x) { x[0] *= FACTOR; }\n')
    first = ptx.compile_cuda(source)
    assert ptx.compile_cuda(source) == first and len(runs) == 1
    assert ptx.compile_cuda(source, flags=["-DOTHER"]) and len(runs) == 2
    header.write_text("#define FACTOR 3.0f\n")
    assert ptx.compile_cuda(source) != first and len(runs) == 3
    header.write_text("#define FACTOR 2.0f\n")
    assert ptx.compile_cuda(source) == first and len(runs) == 3
    source.write_text(source.read_text().replace("x[0]", "x[1]"))
    assert ptx.compile_cuda(source) != first and len(runs) == 4


def test_of_several_that_want_the_same_one_compiles(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2FAST_CACHE", str(tmp_path / "cache"))
    compiled = []

    def compile(folder):
        compiled.append(folder)
        time.sleep(0.1)
        (folder / "made").write_text("made")
        return folder / "made", []

    def ask(_):
        return disk_cache.compiled("ptx", ["source"], "made", compile).read_text()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(8))) == ["made"] * 8
    assert len(compiled) == 1
    [home] = (tmp_path / "cache" / "ptx").iterdir()
    assert len(list(home.iterdir())) == 2  # the entry and the lock: nothing unfinished is left
    (disk_cache.compiled("ptx", ["source"], "made", compile)).unlink()  # an entry without its file is made again
    assert ask(0) == "made" and len(compiled) == 2


def test_what_another_process_is_still_making_is_not_found(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2FAST_CACHE", str(tmp_path / "cache"))

    def compile(folder):
        (folder / "made").write_text("made")
        return folder / "made", []

    entry = disk_cache.compiled("ptx", ["source"], "made", compile).parent
    entry.rename(entry.with_name(disk_cache.MAKING + "elsewhere"))
    assert disk_cache.compiled("ptx", ["source"], "made", compile).parent == entry
