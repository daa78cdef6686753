"""Counters of kernels whose counts can be derived by hand. The derivations stand beside the numbers."""

import shutil
from pathlib import Path

import pytest
import torch

from gpt2fast.testing import ptx

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def run(kernel, grid, block, *args):
    text = ptx.compile_cuda(Path(__file__).parent / "counted.cu")
    with ptx.machine() as m:
        return m.launch(text, kernel, grid, block, *args)


def counted(launch, **expected):
    assert {name: launch.counters[name] for name in expected} == expected


@needs_nvcc
def test_copy():
    """8 blocks x 4 warps. Each warp makes one request of 128 bytes in 4 sectors."""
    x, y = torch.randn(1024), torch.zeros(1024)
    launch = run("copy", (8,), (128,), x, y, 1024)
    assert torch.equal(x, y)
    for kind in ("load", "store"):
        counted(launch, **{f"global_{kind}_requests": 32, f"global_{kind}_bytes": 4096})
        counted(launch, **{f"global_{kind}_sectors": 128, f"global_{kind}_ideal_sectors": 128})
    assert [b["read_bytes"] for b in launch.per_buffer.values()] == [4096, 0]
    assert [b["written_bytes"] for b in launch.per_buffer.values()] == [0, 4096]
    assert launch.inefficient() == {}


@needs_nvcc
def test_copy_with_a_partial_warp():
    """Of 100 elements, the last warp moves 4: 16 bytes in 1 sector. The other three warps move 4 sectors each."""
    x, y = torch.randn(100), torch.zeros(100)
    launch = run("copy", (1,), (128,), x, y, 100)
    counted(launch, global_load_requests=4, global_load_bytes=400, global_load_sectors=13, global_load_ideal_sectors=13)


@needs_nvcc
def test_copy_off_its_sector():
    """If rows begin 4 bytes into a sector, each request touches a fifth sector."""
    x, y = torch.randn(1025)[1:], torch.zeros(1024)
    assert x.data_ptr() % 32 == 4 or (x.data_ptr() - 4) % 32 == 0
    launch = run("copy", (8,), (128,), x, y, 1024)
    counted(launch, global_load_requests=32, global_load_sectors=160, global_load_ideal_sectors=128)


@needs_nvcc
def test_copy_by_16_bytes():
    """256 threads of 16 bytes: 8 requests of 512 bytes, 16 sectors each."""
    x, y = torch.randn(1024), torch.zeros(1024)
    launch = run("copy_float4", (2,), (128,), x, y)
    assert torch.equal(x, y)
    counted(launch, global_load_requests=8, global_load_bytes=4096, global_load_sectors=128)
    counted(launch, global_store_requests=8, global_store_bytes=4096, global_store_sectors=128)


@needs_nvcc
@pytest.mark.parametrize("stride, sectors", ((2, 8), (4, 16), (8, 32), (32, 32)))
def test_copy_strided(stride, sectors):
    x, y = torch.randn(64 * stride), torch.zeros(64)
    launch = run("copy_strided", (1,), (64,), x, y, stride)
    counted(launch, global_load_requests=2, global_load_sectors=2 * sectors, global_load_ideal_sectors=8)


@needs_nvcc
@pytest.mark.parametrize("kernel, conflicts", (("transpose_plain", 31), ("transpose_padded", 0)))
def test_transpose(kernel, conflicts):
    """4 tiles x 8 warps x 4 rows = 128 requests each way. A column of a 32 x 32 tile lies in one bank: 31 extra."""
    x, y = torch.randn(64, 64), torch.zeros(64, 64)
    launch = run(kernel, (2, 2), (32, 8), x, y, 64)
    assert torch.equal(y, x.t())
    counted(launch, global_load_requests=128, global_load_sectors=512, global_store_sectors=512)
    counted(launch, shared_store_requests=128, shared_store_wavefronts=128, shared_store_bank_conflicts=0)
    counted(launch, shared_load_requests=128, shared_load_wavefronts=128 * (1 + conflicts))
    counted(launch, shared_load_bank_conflicts=128 * conflicts, barriers=4 * 8)


@needs_nvcc
def test_tiled_matmul():
    """4 blocks x 32 warps x 2 steps: 2 global loads and 2 shared stores each, 64 shared loads, 2 barriers.

    as[y][i] is one word for all lanes, bs[i][x] is 32 consecutive ones: no conflict.
    """
    a, b, c = torch.randn(64, 64), torch.randn(64, 64), torch.zeros(64, 64)
    launch = run("matmul", (2, 2), (32, 32), a, b, c, 64)
    torch.testing.assert_close(c, a @ b)
    steps = 4 * 32 * 2
    counted(launch, global_load_requests=2 * steps, global_load_bytes=2 * steps * 128, global_load_sectors=8 * steps)
    counted(launch, shared_store_requests=2 * steps, shared_load_requests=64 * steps, barriers=2 * steps)
    counted(launch, shared_load_wavefronts=64 * steps, shared_load_bank_conflicts=0, shared_store_bank_conflicts=0)
    counted(launch, global_store_requests=128, global_store_sectors=512, divergent_branches=0, tensor_flops=0)


@needs_nvcc
def test_atomics():
    """4 warps add into 8 counters that lie in one sector."""
    x, counts = torch.arange(128, dtype=torch.int32) % 8, torch.zeros(8, dtype=torch.int32)
    launch = run("histogram", (1,), (128,), x, counts)
    assert counts.tolist() == [16] * 8
    counted(launch, global_atomic_requests=4, global_atomic_sectors=4)


@needs_nvcc
def test_the_same_launch_counts_the_same():
    x, y = torch.randn(64, 64), torch.zeros(64, 64)
    first, second = (run("transpose_plain", (2, 2), (32, 8), x, y, 64) for _ in range(2))
    assert first.counters == second.counters and first.per_source == second.per_source


@needs_nvcc
def test_divergence_is_counted():
    y = torch.zeros(32, dtype=torch.int32)
    launch = run("branches", (1,), (32,), y)
    assert y[1::2].tolist() == [32 - t.bit_length() for t in range(1, 32, 2)]
    assert y[::2].tolist() == [t * (t - 1) // 2 for t in range(0, 32, 2)]
    assert launch.counters["divergent_branches"] >= 1


def test_triton_matmul_counts_its_tensor_work():
    """Every tile whole: 2 M N K operations, and each operand tile loaded once per output tile in 16-byte pieces."""
    pytest.importorskip("triton")
    import tutorials

    M, N, K = 128, 64, 96
    a, b = torch.randn(M, K).half(), torch.randn(K, N).half()
    with ptx.machine() as m:
        tutorials.matmul(a, b)
    (launch,) = m.launches
    tiles = (M // 64) * (N // 32)
    counted(launch, tensor_flops=2 * M * N * K)
    assert launch.per_buffer["a_ptr"]["read_bytes"] == tiles * 64 * K * 2
    assert launch.per_buffer["b_ptr"]["read_bytes"] == tiles * 32 * K * 2
    assert launch.per_buffer["c_ptr"]["written_bytes"] == M * N * 2
