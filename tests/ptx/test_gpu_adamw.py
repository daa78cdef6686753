"""AdamW and the norm of gradients on the PTX machine, in Triton and in CUDA C++: tables, odd addresses, rounding."""

import math

import pytest
import torch
from both import kernels_of

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast import extension, tensor_lists
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth
from gpt2fast.testing.inputs import build, reference, truth

DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
ADAMW, NORM = OPS["adamw_"], OPS["gradient_norm"]
run = kernels_of("adamw_")
norms = kernels_of("gradient_norm")


def check(run, op, args):
    found, launches = run(op.name, args)
    for three in zip(found, reference(op, args), truth(op, args), strict=True):
        assert_close_to_truth(*three)
    return found, launches


@DTYPES
@pytest.mark.parametrize("seed", (False, True))
def test_one_launch(run, dtype, seed):
    block = run.module.BLOCK
    case = dict(each=[(2 * block,), (block,), (3, block), (block - 1,)], step=3, seed=seed, scale=True)
    _, (launch,) = check(run, ADAMW, build(ADAMW, case, dtype))
    assert launch.grid == (7, 1, 1)


@DTYPES
def test_sizes_around_a_block_and_addresses_that_are_not_aligned(run, dtype):
    """The bits are the same, wherever a number lies and whichever backend computes it."""
    sizes = (1, run.module.BLOCK - 1, run.module.BLOCK, run.module.BLOCK + 1, 5, 17, 40)
    args = build(ADAMW, dict(each=[(n,) for n in sizes], step=2, seed=True), dtype)
    check(run, ADAMW, args)
    moved = {}
    for name in ("weights", "gradients", "exp_avgs", "exp_avg_sqs"):
        shifted = [torch.cat([t.new_zeros(1), t])[1:] for t in args[name]]
        moved[name] = shifted
    run("adamw_", args | moved, in_place=True)
    run("adamw_", args, in_place=True)
    for name in ("weights", "exp_avgs", "exp_avg_sqs"):
        for a, b in zip(moved[name], args[name]):
            assert torch.equal(a, b), name


def test_random_rounding_draws_the_reference_s_bits(run):
    """Without a gradient only the decay is left, so that both compute the same number before it is rounded."""
    case = dict(each=[(5000,), (33, 5), (8,)], step=4, first=True, seed=True, weight_decay=0.25)
    args = build(ADAMW, case, torch.bfloat16)
    args |= dict(gradients=[torch.zeros_like(g) for g in args["gradients"]], lr=0.5)
    args["weights"][1][3] = torch.tensor([math.nan, math.inf, -math.inf, torch.finfo(torch.bfloat16).max, 0.0])
    (first, second, *_), _ = found, _ = run("adamw_", args)
    for ours, other in zip(found, reference(ADAMW, args), strict=True):
        assert torch.equal(ours.nan_to_num(7), other.nan_to_num(7)) and torch.equal(ours.isnan(), other.isnan())
    assert second.isnan().sum() == 1
    wide = args["weights"][0].float() * 0.875
    assert not torch.equal(first, wide.bfloat16())  # some are not rounded to the nearest
    assert ((first.float() - wide).abs() < wide.abs() * 2.0**-7).all()


@pytest.mark.parametrize("step", (1, 2, 300, 100_000))
def test_powers_of_beta(run, step):
    """1 - beta^step from its smallest value to 1, with a beta near 1, and with a beta of 0."""
    for betas in (dict(beta1=0.9, beta2=0.99999), dict(beta1=0.0, beta2=0.0)):
        check(run, ADAMW, build(ADAMW, dict(each=[(40,)], step=step, lr=0.1, eps=0.0, **betas)))


def test_tables_are_kept_while_addresses_are_the_same(run):
    args = build(ADAMW, dict(each=[(70,), (9,)], step=1))
    tensor_lists._tables_of.cache_clear()
    for _ in range(3):
        run("adamw_", args, in_place=True)
    assert tensor_lists._tables_of.cache_info().misses == 1
    run("adamw_", args | dict(gradients=[g.clone() for g in args["gradients"]]), in_place=True)
    assert tensor_lists._tables_of.cache_info().misses == 2


@pytest.mark.skipif(extension._C is None, reason="the C++ extension is not built")
def test_addresses_in_python_are_those_in_cpp():
    lists = [[torch.empty(size) for size in ((3, 5), (0,), ())] for _ in range(2)]
    (first, *_), _ = lists
    assert extension._C.addresses(lists) == tensor_lists._addresses(*lists)
    assert len(tensor_lists._addresses(*lists)) == 9 * 8
    assert extension._C.addresses([[first.t()]]) is tensor_lists._addresses([first.t()]) is None
    with pytest.raises(TypeError, match="lists must hold tensors"):
        extension._C.addresses([[3]])


def test_a_gradient_that_is_not_dense(run):
    args = build(ADAMW, dict(each=[(6, 9), (5,)], step=1))
    args["gradients"][0] = args["gradients"][0].t().contiguous().t()
    check(run, ADAMW, args)


def test_nothing_to_do(run, norms):
    assert check(run, ADAMW, build(ADAMW, dict(each=[(0,), (3, 0)], step=1)))[1] == []
    (norm, factor), _ = norms("gradient_norm", dict(gradients=[torch.zeros(0, 3)], max_norm=1.0))
    assert norm == 0 and factor == 1


@DTYPES
def test_norm(norms, dtype):
    block = norms.module.BLOCK
    args = build(NORM, dict(each=[(8 * block,), (7,), (block + 1,)], max_norm=2.0), dtype)
    found, launches = check(norms, NORM, args)
    assert len(launches) == 2 and launches[0].grid == (11, 1, 1) and launches[1].grid == (1, 1, 1)
    for _ in range(2):  # the same bits every time
        assert [t.item() for t in norms("gradient_norm", args)[0]] == [t.item() for t in found]


@DTYPES
def test_norm_of_many_blocks_of_odd_addresses_and_sizes(norms, dtype):
    """There are more blocks than the last launch has threads, and gradients are not dense or not aligned."""
    sizes = [*range(1, 41), *[1] * 1100, norms.module.BLOCK - 1, 1001]
    args = build(NORM, dict(each=[(n,) for n in sizes], max_norm=2.0), dtype)
    check(norms, NORM, args)
    check(norms, NORM, dict(gradients=[torch.cat([g[:1], g])[1:] for g in args["gradients"][:40]], max_norm=2.0))
    check(norms, NORM, dict(gradients=[torch.randn(9, 6).to(dtype).t()], max_norm=1e9))


def test_what_is_refused(run, norms):
    dense = [torch.zeros(4, 4)]
    args = dict(gradients=dense, exp_avgs=dense, exp_avg_sqs=dense, step=torch.ones(()))
    language = "Triton" if "kernels" in run.module.__name__ else "CUDA"
    (_, adamw), (_, norm) = run.module.KERNELS["adamw_"], norms.module.KERNELS["gradient_norm"]
    assert adamw(dense, **args) is None
    assert adamw([torch.zeros(4, 4).t().contiguous().t()[:, :3]], **args) == (
        f"AdamW in {language} changes dense tensors only"
    )
    language = "Triton" if "kernels" in norms.module.__name__ else "CUDA"
    assert norm([]) == f"a norm in {language} takes at least one tensor"
    assert norm([torch.zeros(3).double()]).startswith(f"a norm in {language} covers float32")
