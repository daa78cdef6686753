"""The linear layer in CUDA C++: what it moves, multiplies and needs, by tile. Results: test_gpu_linear.py."""

import pytest
import torch

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.cuda import library
from gpt2fast.cuda import linear as kernels
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth, ptx
from gpt2fast.testing.inputs import build, reference, truth

pytestmark = pytest.mark.skipif(library.machine_reason() is not None, reason=str(library.machine_reason()))
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
TRANSPOSED = pytest.mark.parametrize("transposed", (False, True))
PRODUCTS = {torch.float32: 6, torch.bfloat16: 1}  # 16-bit products for one product of the dtype


def tile(rows, dtype):
    """The rows and columns of out and the numbers along k of a block's tile: Shape in csrc/cuda/linear.cu."""
    if dtype == torch.float32:
        return (16 if rows <= 16 else 64), 64, 32
    return (16, 64, 64) if rows <= 16 else (64, 64, 64) if rows <= 512 else (128, 128, 32)


def run(name, dtype, case, **others):
    args = build(OPS[name], case, dtype) | others
    with ptx.machine() as machine:
        found = kernels.KERNELS[name][0](**args)
    for three in zip(found, reference(OPS[name], args), truth(OPS[name], args)):
        if three[0].numel():
            assert_close_to_truth(*three)
    (launch,) = machine.launches
    return launch


def check(launch, dtype, M, K, N):
    """Every product is computed once. a and b are read once for each tile of out that needs them, in whole sectors."""
    block_m, block_n, _ = tile(M, dtype)
    size, moved = dtype.itemsize, launch.per_buffer
    assert launch.grid[0] == M // block_m * (N // block_n)
    assert launch.counters["tensor_flops"] == 2 * M * K * N * PRODUCTS[dtype]
    assert moved["a"]["read_bytes"] == M * K * size * (N // block_n)
    assert moved["b"]["read_bytes"] == K * N * size * (M // block_m)
    assert not any(value for name, value in launch.counters.items() if "conflicts" in name)
    assert not launch.inefficient()


@DTYPES
@TRANSPOSED
@pytest.mark.parametrize("M", (16, 128, 640))
def test_what_it_moves_and_multiplies(M, transposed, dtype):
    K, N, size = 192, 256, dtype.itemsize
    after = dict(bias=True, residual=True, activation="gelu_tanh", keep_preactivation=True)
    launch = run("linear", dtype, dict(B=1, T=M, K=K, N=N, transposed=transposed, **after))
    check(launch, dtype, M, K, N)
    assert launch.per_buffer["residual"]["read_bytes"] == M * N * size
    assert launch.counters["global_store_bytes"] == 2 * M * N * size


@DTYPES
@TRANSPOSED
@pytest.mark.parametrize("K", (128, 640))
def test_gradients(K, transposed, dtype):
    R, N, size = 192, 128, dtype.itemsize
    case = dict(B=1, T=R, K=K, N=N, transposed=transposed)
    check(run("linear_backward", dtype, case, want="dx"), dtype, R, N, K)
    sizes = (N, R, K) if transposed else (K, R, N)
    with_sums = run("linear_backward", dtype, case, want="dweight dbias")
    check(with_sums, dtype, *sizes)
    assert with_sums.counters["global_store_bytes"] == (K * N + N) * size


@DTYPES
@TRANSPOSED
def test_edges_cost_no_bytes(transposed, dtype):
    """A tile at the edge reads and writes only what exists. It computes the products of a whole tile."""
    M, K, N, size = 133, 72, 152, dtype.itemsize
    launch = run("linear", dtype, dict(B=1, T=M, K=K, N=N, transposed=transposed))
    block_m, block_n, block_k = tile(M, dtype)
    down, across, steps = -(-M // block_m), -(-N // block_n), -(-K // block_k)
    assert launch.grid[0] == down * across
    assert launch.counters["tensor_flops"] == launch.grid[0] * steps * 2 * block_m * block_n * block_k * PRODUCTS[dtype]
    assert launch.per_buffer["a"]["read_bytes"] == M * K * size * across
    assert launch.per_buffer["b"]["read_bytes"] == K * N * size * down
    assert launch.counters["global_store_bytes"] == M * N * size
    assert not any(value for name, value in launch.counters.items() if "conflicts" in name)


@DTYPES
@TRANSPOSED
def test_what_is_not_aligned_is_read_as_often(transposed, dtype):
    M, K, N, size = 66, 75, 131, dtype.itemsize
    launch = run("linear", dtype, dict(B=1, T=M, K=K, N=N, bias=True, transposed=transposed))
    assert launch.per_buffer["a"]["read_bytes"] == M * K * size * 3
    assert launch.per_buffer["b"]["read_bytes"] == K * N * size * 2
    assert launch.counters["global_store_bytes"] == M * N * size


@pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, torch.float16), ids=("float32", "bfloat16", "float16")
)
def test_nothing_spills(dtype):
    """Nothing spills in any kernel that is chosen: by the number of rows, and by which dimension is dense, if any."""
    found = {}
    for transposed in (False, True):
        for M in (16, 128, 640):
            case = dict(B=1, T=M, K=64, N=128, transposed=transposed)
            launch = run("linear", dtype, case)
            found[launch.kernel] = launch
        for K in (128, 640):
            case = dict(B=1, T=32, K=K, N=64)
            launch = run("linear_backward", dtype, case, want="dweight dbias")
            found[launch.kernel] = launch
    launch = run("linear", dtype, dict(B=1, T=32, K=33, N=64))
    found[launch.kernel] = launch
    assert len(found) == (6 if dtype == torch.float32 else 9)
    for name, launch in found.items():
        for arch in ("sm_80", "sm_90"):
            took = launch.resources(arch)
            assert took.stack == took.spill_stores == 0, f"{name} {arch}: {took}"


def test_sums_are_those_of_one_order():
    """There are no atomics: dbias has the same bits in every run, and in float32 it is exact if the sums are."""
    dy = torch.randint(-8, 9, (300, 70)).float()
    args = dict(dy=dy, x=torch.randn(300, 40), weight=torch.randn(40, 70), want="dweight dbias")
    with ptx.machine() as machine:
        _, _, dbias = kernels.KERNELS["linear_backward"][0](**args)
    assert torch.equal(dbias, dy.sum(0))
    assert not machine.launches[0].counters["global_atomic_requests"]


def test_what_is_covered():
    x = torch.empty(3, 8, device="meta")
    assert kernels.supports(x, x) is None
    said = "linear in CUDA covers float32, bfloat16 and float16, got float64"
    assert kernels.supports(x.double(), x) == kernels.supports_backward(x.double(), x, x) == said
