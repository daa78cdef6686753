"""The linear layer in Triton on the PTX machine: exact work and bytes, many tiles, gaps, and when it is the choice."""

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from gpt2fast import backends
from gpt2fast.kernels import common
from gpt2fast.kernels import linear as kernels
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth, ptx
from gpt2fast.testing.inputs import build, reference, truth

DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))


def run(name, args):
    function, supports, _ = kernels.KERNELS[name]
    assert supports(**args) is None
    with ptx.machine() as m:
        return function(**args), m.launches


def check(name, args):
    found, launches = run(name, args)
    wanted = args.get("want", "dx dweight dbias").split() if name == "linear_backward" else ("y", "preactivation")
    for what, ours, plain, exact in zip(OPS[name].outputs, found, *(f(OPS[name], args) for f in (reference, truth))):
        if what in wanted:
            assert_close_to_truth(ours, plain, exact, what)
        else:
            assert not ours.numel()
    return launches


def arguments(name="linear", dtype=torch.float32, **case):
    return build(OPS[name], case, dtype)


@DTYPES
@pytest.mark.parametrize("transposed", (False, True))
def test_more_tiles_than_walk_together(dtype, transposed):
    """Nine rows of tiles, the last of them and the last column in part, and a K that no tile divides."""
    rows = 8 * kernels.tile.rule(8192, dtype == torch.float32)[0] + 5
    check("linear", arguments(dtype=dtype, B=1, T=rows, K=70, N=150, bias=True, residual=True, transposed=transposed))


@DTYPES
@pytest.mark.parametrize("transposed", (False, True))
def test_work_and_bytes(dtype, transposed):
    """Every product once, and each tile of x and the weight read once for each tile of y that it goes into."""
    wide, (M, K, N) = dtype == torch.float32, (128, 128, 192)
    block_m, block_n = kernels.tile.rule(kernels.rows_class(M), wide)[:2]
    args = arguments(dtype=dtype, B=1, T=M, K=K, N=N, bias=True, activation="gelu_tanh", transposed=transposed)
    (launch,) = check("linear", args)
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
@pytest.mark.parametrize("transposed", (False, True))
def test_dbias_reads_nothing_of_its_own(dtype, transposed):
    args = arguments("linear_backward", dtype, B=1, T=192, K=128, N=128, transposed=transposed)
    both = check("linear_backward", args | dict(want="dweight dbias"))
    alone = check("linear_backward", args | dict(want="dweight"))
    assert len(both) == len(alone) == 1
    assert both[0].counters["global_load_bytes"] == alone[0].counters["global_load_bytes"]
    assert not any(launch.counters["global_atomic_requests"] for launch in both)
    assert not {place: why for place, why in alone[0].inefficient().items() if "global" in why}


@pytest.mark.parametrize("want", ("dx", "dbias", "dx dbias", ""))
def test_only_what_is_wanted_is_computed(want):
    args = arguments("linear_backward", B=2, T=5, K=24, N=40)
    launches = check("linear_backward", args | dict(want=want))
    assert len(launches) == ("dx" in want)


def test_a_weight_with_gaps_is_read_in_place():
    args = arguments(B=2, T=5, K=24, N=40, bias=True)
    wide = torch.full((24, 80), torch.nan)
    wide[:, ::2] = args["weight"]
    (launch,) = check("linear", args | dict(weight=wide[:, ::2]))
    assert launch.per_buffer["b_ptr"]["read_bytes"] == 24 * 40 * 4
    gradient = arguments("linear_backward", B=2, T=5, K=24, N=40)
    check("linear_backward", gradient | dict(weight=wide[:, ::2]))


@DTYPES
@pytest.mark.parametrize("rows", (16, 512, 1024))
def test_nothing_spills(dtype, rows):
    """In the configurations shipped, with the longest way from product to output."""
    case = dict(B=1, T=rows, K=64, N=128, bias=True, residual=True, activation="gelu_erf", keep_preactivation=True)
    _, (launch,) = run("linear", arguments(dtype=dtype, **case))
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


def test_pytorch_s_product_is_the_choice_until_ours_was_measured_faster(monkeypatch):
    x, weight = torch.randn(3, 8), torch.randn(8, 16)
    with ptx.machine():
        choice = backends.choose(OPS["linear"], x, weight)
        assert choice.backend == "fused"
        assert choice.why == "PyTorch's product is the choice: no GPU has measured Triton's to be faster at this size"
        with backends.use_backend("triton"):
            assert backends.choose(OPS["linear"], x, weight).backend == "triton"
        monkeypatch.setattr(kernels, "MEASURED_FASTER", {(None, torch.float32, 3, 8, 16)})
        assert backends.choose(OPS["linear"], x, weight).backend == "triton"
        assert backends.choose(OPS["linear"], x[:2], weight).backend == "fused"
        assert backends.choose(OPS["linear_backward"], x @ weight, x, weight).backend == "triton"


@pytest.mark.parametrize("transposed", (False, True))
def test_a_sum_of_nothing(transposed):
    """Without columns in x, y is bias + residual, and dbias is the sum of dy as ever."""
    args = arguments(B=2, T=3, K=8, N=5, bias=True, residual=True, transposed=transposed)
    none = dict(x=args["x"][..., :0], weight=args["weight"].narrow(int(transposed), 0, 0))
    y, _ = run("linear", args | none)[0]
    assert torch.equal(y, args["bias"] + args["residual"])
    dy = torch.randint(-4, 5, (2, 3, 5)).float()
    dx, dweight, dbias = run("linear_backward", dict(dy=dy, transposed=transposed, want="dx dweight dbias") | none)[0]
    assert dx.shape == (2, 3, 0) and dweight.shape == none["weight"].shape
    assert torch.equal(dbias, dy.sum((0, 1)))


def test_what_is_covered(monkeypatch):
    x = torch.empty(3, 8, device="meta")
    assert kernels.supports(x, x) is None
    said = "linear in Triton covers float32, bfloat16 and float16, got float64"
    assert kernels.supports(x.double(), x) == kernels.supports_backward(x.double(), x, x) == said
    monkeypatch.setattr(common, "HAS_BF16X6", False)
    assert kernels.supports(x, x).startswith("linear of float32 in Triton needs Triton 3.6, got 3.")
    assert kernels.supports(x.half(), x) is None
