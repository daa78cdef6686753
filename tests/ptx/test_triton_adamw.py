"""AdamW and the norm of gradients in Triton on the PTX machine: launches, bytes, odd addresses, random rounding."""

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast import extension
from gpt2fast.kernels import adamw_ as kernels
from gpt2fast.kernels import gradient_norm as norms
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth, ptx
from gpt2fast.testing.inputs import build, outputs_of, reference, truth

DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
ADAMW, NORM = OPS["adamw_"], OPS["gradient_norm"]


def check(args):
    with ptx.machine() as machine:
        found = outputs_of(ADAMW, kernels.adamw_, args)
    for three in zip(found, reference(ADAMW, args), truth(ADAMW, args), strict=True):
        assert_close_to_truth(*three)
    return found, machine.launches


@DTYPES
@pytest.mark.parametrize("seed", (False, True))
def test_bytes(dtype, seed):
    """One launch for all tensors; weights and moments are read and written once, gradients read once."""
    block = kernels.BLOCK
    case = dict(each=[(2 * block,), (block,), (3, block)], step=3, seed=seed, scale=True)
    _, (launch,) = check(build(ADAMW, case, dtype))
    count, size = 6 * block, dtype.itemsize
    assert launch.grid == (6, 1, 1)
    least = count * (3 * size + 4 * 4)
    moved = 32 * (launch.counters["global_load_sectors"] + launch.counters["global_store_sectors"])
    assert least <= moved <= 1.05 * least  # with the tables, which every warp of a program reads
    assert launch.counters["global_store_bytes"] == count * (size + 2 * 4)
    assert not launch.inefficient()
    for target in ("sm_80", "sm_90", "sm_100"):
        assert launch.resources(target).spill_stores == 0


@DTYPES
def test_sizes_around_a_block_and_addresses_that_are_not_aligned(dtype):
    sizes = (1, kernels.BLOCK - 1, kernels.BLOCK, kernels.BLOCK + 1, 5)
    args = build(ADAMW, dict(each=[(n,) for n in sizes], step=2), dtype)
    check(args)
    moved = {}
    for name in ("weights", "gradients", "exp_avgs", "exp_avg_sqs"):
        shifted = [torch.cat([t.new_zeros(1), t])[1:] for t in args[name]]
        moved[name] = shifted
    with ptx.machine():
        kernels.adamw_(**args | moved)
        kernels.adamw_(**args)
    for name in ("weights", "exp_avgs", "exp_avg_sqs"):
        for a, b in zip(moved[name], args[name]):
            assert torch.equal(a, b), name


def test_random_rounding_draws_the_reference_s_bits():
    """Where both compute the same number before it is rounded: without a gradient nothing but the decay is left."""
    args = build(ADAMW, dict(each=[(5000,), (33, 5)], step=4, first=True, seed=True, weight_decay=0.25), torch.bfloat16)
    args |= dict(gradients=[torch.zeros_like(g) for g in args["gradients"]], lr=0.5)
    (first, *_), _ = check(args)
    for ours, other in zip(check(args)[0], reference(ADAMW, args)):
        assert torch.equal(ours, other)
    wide = args["weights"][0].float() * 0.875
    assert not torch.equal(first, wide.bfloat16())  # some go away from the nearest
    assert ((first.float() - wide).abs() < wide.abs() * 2.0**-7).all()


def test_tables_are_kept_while_addresses_are_the_same():
    args = build(ADAMW, dict(each=[(70,), (9,)], step=1))
    kernels._tables_of.cache_clear()
    with ptx.machine():
        for _ in range(3):
            kernels.adamw_(**args)
        assert kernels._tables_of.cache_info().misses == 1
        kernels.adamw_(**args | dict(gradients=[g.clone() for g in args["gradients"]]))
        assert kernels._tables_of.cache_info().misses == 2


@pytest.mark.skipif(extension._C is None, reason="the C++ extension is not built")
def test_addresses_in_python_are_those_in_cpp():
    lists = [[torch.empty(size) for size in ((3, 5), (0,), ())] for _ in range(2)]
    (first, *_), _ = lists
    assert extension._C.addresses(lists) == kernels._addresses(*lists)
    assert len(kernels._addresses(*lists)) == 9 * 8
    assert extension._C.addresses([[first.t()]]) is kernels._addresses([first.t()]) is None
    with pytest.raises(TypeError, match="lists must hold tensors"):
        extension._C.addresses([[3]])


def test_a_gradient_that_is_not_dense():
    args = build(ADAMW, dict(each=[(6, 9), (5,)], step=1))
    args["gradients"][0] = args["gradients"][0].t().contiguous().t()
    check(args)


@DTYPES
def test_norm(dtype):
    args = build(NORM, dict(each=[(8 * norms.BLOCK,), (7,), (norms.BLOCK + 1,)], max_norm=2.0), dtype)
    with ptx.machine() as machine:
        found = norms.gradient_norm(**args)
    for three in zip(found, reference(NORM, args), truth(NORM, args), strict=True):
        assert_close_to_truth(*three)
    assert [launch.kernel for launch in machine.launches] == ["gradient_squares_kernel", "gradient_norm_kernel"]
    least, launch = (9 * norms.BLOCK + 8) * dtype.itemsize, machine.launches[0]
    assert least <= 32 * launch.counters["global_load_sectors"] <= 1.05 * least
    for target in ("sm_80", "sm_90", "sm_100"):
        assert launch.resources(target).spill_stores == 0


def test_what_is_refused():
    dense = [torch.zeros(4, 4)]
    args = dict(gradients=dense, exp_avgs=dense, exp_avg_sqs=dense, step=torch.ones(()))
    assert kernels.supports(dense, **args) is None
    assert kernels.supports([torch.zeros(4, 4).t().contiguous().t()[:, :3]], **args) == (
        "AdamW in Triton changes dense tensors only"
    )
    assert norms.supports([]) == "a norm in Triton takes at least one tensor"
    assert norms.supports([torch.zeros(3).double()]).startswith("a norm in Triton covers float32")
