"""The linear layer in Triton: what it moves and multiplies, and its registers. Results: test_gpu_linear.py."""

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from gpt2fast.kernels import common
from gpt2fast.kernels import linear as kernels
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth, ptx
from gpt2fast.testing.inputs import build, reference, truth

DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))


def arguments(dtype, **case):
    return build(OPS["linear"], case, dtype)


def run(args):
    with ptx.machine() as machine:
        found = kernels.KERNELS["linear"][0](**args)
    for three in zip(found[:1], reference(OPS["linear"], args), truth(OPS["linear"], args)):
        assert_close_to_truth(*three)
    (launch,) = machine.launches
    return launch


@DTYPES
@pytest.mark.parametrize("transposed", (False, True))
def test_work_and_bytes(dtype, transposed):
    """Every product is computed once. Each tile of x and the weight is read once for each tile of y that needs it."""
    wide, (M, K, N) = dtype == torch.float32, (128, 128, 192)
    block_m, block_n = kernels.tile.rule(kernels.rows_class(M), wide)[:2]
    args = arguments(dtype=dtype, B=1, T=M, K=K, N=N, bias=True, activation="gelu_tanh", transposed=transposed)
    launch = run(args)
    size, moved = dtype.itemsize, launch.per_buffer
    assert launch.counters["tensor_flops"] == 2 * M * N * K * (6 if wide else 1)
    assert moved["a_ptr"]["read_bytes"] == M * K * size * (N // block_n)
    assert moved["b_ptr"]["read_bytes"] == K * N * size * (M // block_m)
    assert launch.counters["global_store_bytes"] == M * N * size
    slow = launch.inefficient()
    if wide and not transposed:  # fragments of 16-bit numbers, cut from float32: two words of one bank for some lanes
        slow = {place: why for place, why in slow.items() if not why.startswith("shared load: 2.00 wavefronts")}
    assert not slow


@DTYPES
@pytest.mark.parametrize("rows", (16, 512, 1024))
def test_nothing_spills(dtype, rows):
    """Nothing spills in the shipped configurations, with the most work between product and output."""
    case = dict(B=1, T=rows, K=64, N=128, bias=True, residual=True, activation="gelu_erf", keep_preactivation=True)
    launch = run(arguments(dtype=dtype, **case))
    for arch in ("sm_80", "sm_90", "sm_100"):
        found = launch.resources(arch)
        assert found.stack == 0, f"{arch}: {found.registers} registers, {found.stack} bytes of spills a thread"


@pytest.mark.parametrize("gpu", ("gfx942", "gfx1100"))
def test_compiles_for_amd(gpu):
    words = dict(
        HAS_BIAS=True, HAS_RESIDUAL=True, FORM=1, KEEP=True, BACKWARD=False, SUMS=1, PRECISION="ieee",
        BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, TOGETHER=8, ALIGNED_M=False,
    )  # fmt: skip
    kind = {name: "*bf16" if name.endswith("_ptr") else "i32" for name in kernels.linear_kernel.arg_names}
    source = ASTSource(
        fn=kernels.linear_kernel,
        signature={name: "constexpr" if name in words else kind[name] for name in kind},
        constexprs={(list(kind).index(name),): value for name, value in words.items()},
    )
    target = GPUTarget("hip", gpu, 64 if gpu == "gfx942" else 32)
    assert "hsaco" in compile(source, target=target, options=dict(num_warps=4)).asm


def test_what_is_covered(monkeypatch):
    x = torch.empty(3, 8, device="meta")
    assert kernels.supports(x, x) is None
    said = "linear in Triton covers float32, bfloat16 and float16, got float64"
    assert kernels.supports(x.double(), x) == kernels.supports_backward(x.double(), x, x) == said
    monkeypatch.setattr(common, "HAS_BF16X6", False)
    assert kernels.supports(x, x).startswith("linear of float32 in Triton needs Triton 3.6, got 3.")
    assert kernels.supports(x.half(), x) is None
