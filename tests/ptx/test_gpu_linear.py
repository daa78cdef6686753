"""The linear layer on the PTX machine, in Triton and in CUDA C++: many tiles, gaps, and when they are chosen."""

import pytest
import torch
from both import kernels_of

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast import backends
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth, ptx
from gpt2fast.testing.inputs import build, reference, truth

DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
TRANSPOSED = pytest.mark.parametrize("transposed", (False, True))
LARGEST = {torch.float32: 64, torch.bfloat16: 128}  # rows and columns of the largest tiles
run = kernels_of("linear")


def check(run, name, args):
    found, launches = run(name, args)
    wanted = args.get("want", "dx dweight dbias").split() if name == "linear_backward" else ("y", "preactivation")
    for what, ours, plain, exact in zip(OPS[name].outputs, found, *(f(OPS[name], args) for f in (reference, truth))):
        if what in wanted:
            assert ours.shape == plain.shape and ours.is_contiguous()
            assert_close_to_truth(ours, plain, exact, what)
        else:
            assert not ours.numel()
    return launches


def arguments(name="linear", dtype=torch.float32, **case):
    return build(OPS[name], case, dtype)


@DTYPES
@TRANSPOSED
def test_more_tiles_than_walk_together(run, dtype, transposed):
    """Nine rows of tiles. The last row and the last column are partial, and K is not a multiple of any tile."""
    rows = 8 * LARGEST[dtype] + 5
    case = dict(B=1, T=rows, N=150, bias=True, residual=True, transposed=transposed)
    (launch,) = check(run, "linear", arguments(dtype=dtype, K=72, **case | dict(N=152)))
    assert launch.grid[0] == 9 * -(-152 // LARGEST[dtype])
    check(run, "linear", arguments(dtype=dtype, K=70, **case))


@DTYPES
@TRANSPOSED
@pytest.mark.parametrize("rows", (1, 16, 17, 64))
@pytest.mark.parametrize("K, N", ((8, 8), (200, 136), (24, 7), (33, 64)))
def test_sizes_around_those_of_tiles(run, rows, K, N, transposed, dtype):
    """Multiples of 8, which are read by 16 bytes, and other sizes; forward with all that follows, and backward."""
    sizes = dict(B=1, T=rows, K=K, N=N, transposed=transposed)
    after = dict(bias=True, residual=True, activation="gelu_erf", keep_preactivation=True)
    check(run, "linear", arguments(dtype=dtype, **sizes, **after))
    check(run, "linear_backward", arguments("linear_backward", dtype, **sizes))


@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("activation, keep", (("none", True), ("gelu_tanh", False), ("gelu_tanh", True)))
def test_what_follows_the_product(run, activation, keep, bias, residual):
    after = dict(bias=bias, residual=residual, activation=activation, keep_preactivation=keep)
    check(run, "linear", arguments(dtype=torch.float16, B=2, T=9, K=40, N=72, **after))


@DTYPES
@TRANSPOSED
def test_views(run, transposed, dtype):
    """x, weight, residual and dy have gaps between rows or columns, an unaligned first number, or are transposes."""
    wide = torch.randn(3, 40, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    given = arguments(dtype=dtype, B=1, T=40, K=40, N=40, bias=True, residual=True, transposed=transposed)
    dy = given.pop("residual")
    for view in (wide[:1, :, 8:48], wide[:1, :, 1:41], wide[:1, :, :80:2], wide[1:2, :, :40].transpose(1, 2)):
        check(run, "linear", given | dict(x=view, residual=view))
        check(run, "linear", given | dict(weight=view[0]))
        gradient = dict(dy=dy, x=given["x"], weight=given["weight"], transposed=transposed)
        for name in ("dy", "x"):
            check(run, "linear_backward", gradient | {name: view})
        check(run, "linear_backward", gradient | dict(weight=view[0]))


@DTYPES
@TRANSPOSED
def test_dbias_reads_nothing_of_its_own(run, dtype, transposed):
    args = arguments("linear_backward", dtype, B=1, T=192, K=128, N=128, transposed=transposed)
    both = check(run, "linear_backward", args | dict(want="dweight dbias"))
    alone = check(run, "linear_backward", args | dict(want="dweight"))
    assert len(both) == len(alone) == 1
    assert both[0].counters["global_load_bytes"] == alone[0].counters["global_load_bytes"]
    assert not any(launch.counters["global_atomic_requests"] for launch in both)
    assert not {place: why for place, why in alone[0].inefficient().items() if "global" in why}


@pytest.mark.parametrize("want", ("dx", "dbias", "dx dbias", ""))
def test_only_what_is_wanted_is_computed(run, want):
    args = arguments("linear_backward", B=2, T=5, K=24, N=40)
    launches = check(run, "linear_backward", args | dict(want=want))
    assert len(launches) == ("dx" in want)


def test_a_weight_with_gaps_is_read_in_place(run):
    args = arguments(B=2, T=5, K=24, N=40, bias=True)
    wide = torch.full((24, 80), torch.nan)
    wide[:, ::2] = args["weight"]
    (launch,) = check(run, "linear", args | dict(weight=wide[:, ::2]))
    moved = {name.removesuffix("_ptr"): buffer for name, buffer in launch.per_buffer.items()}
    assert moved["b"]["read_bytes"] == 24 * 40 * 4
    gradient = arguments("linear_backward", B=2, T=5, K=24, N=40)
    check(run, "linear_backward", gradient | dict(weight=wide[:, ::2]))


def test_pytorch_s_product_is_the_choice_until_ours_was_measured_faster(run, monkeypatch):
    x, weight = torch.randn(3, 8), torch.randn(8, 16)
    with ptx.machine():
        choice = backends.choose(OPS["linear"], x, weight)
        assert choice.backend == "fused"
        assert choice.why == "PyTorch's product is the choice: no GPU has measured ours to be faster at this size"
        with backends.use_backend(run.backend):
            assert backends.choose(OPS["linear"], x, weight).backend == run.backend
        monkeypatch.setattr(run.module, "MEASURED_FASTER", {(None, torch.float32, 3, 8, 16)})
        assert backends.choose(OPS["linear"], x, weight).backend == run.backend
        assert backends.choose(OPS["linear"], x[:2], weight).backend == "fused"
        assert backends.choose(OPS["linear_backward"], x @ weight, x, weight).backend == run.backend


@TRANSPOSED
def test_a_sum_of_nothing(run, transposed):
    """If x has no columns, y is bias + residual. dbias is the sum of dy as always."""
    args = arguments(B=2, T=3, K=8, N=5, bias=True, residual=True, transposed=transposed)
    none = dict(x=args["x"][..., :0], weight=args["weight"].narrow(int(transposed), 0, 0))
    y, _ = run("linear", args | none)[0]
    assert torch.equal(y, args["bias"] + args["residual"])
    dy = torch.randint(-4, 5, (2, 3, 5)).float()
    given = dict(dy=dy, transposed=transposed, want="dx dweight dbias") | none
    dx, dweight, dbias = run("linear_backward", given)[0]
    assert dx.shape == (2, 3, 0) and dweight.shape == none["weight"].shape
    assert torch.equal(dbias, dy.sum((0, 1)))
