"""AdamW and the norm of gradients in CUDA C++: what they move, and their registers. Results: test_gpu_adamw.py."""

import math
import re

import pytest
import torch

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast import tensor_lists
from gpt2fast.cuda import adamw_ as kernels
from gpt2fast.cuda import gradient_norm as norms
from gpt2fast.cuda import library
from gpt2fast.op import OPS
from gpt2fast.testing import ptx
from gpt2fast.testing.inputs import build

pytestmark = pytest.mark.skipif(library.machine_reason() is not None, reason=str(library.machine_reason()))
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
ALL_DTYPES = pytest.mark.parametrize("dtype", library.DTYPES, ids=str)
ADAMW, NORM = OPS["adamw_"], OPS["gradient_norm"]
LISTS = ("weights", "gradients", "exp_avgs", "exp_avg_sqs")
WARPS, TABLE = 4, 4 + 4 + 5 * 8  # warps of a block; bytes of both tables that every lane asks for


def launches(function, args):
    with ptx.machine() as machine:
        function(**args)
    return machine.launches


def nothing_spills(launch):
    for arch in ("sm_80", "sm_90", "sm_100"):
        found = launch.resources(arch)
        assert found.stack == found.spill_stores == 0, f"{launch.name} {arch}: {found}"


@DTYPES
@pytest.mark.parametrize("seed", (False, True))
def test_bytes(dtype, seed):
    """Weights and moments are read and written once, and gradients are read once: 128 bits at a time, whole sectors."""
    block, size = kernels.BLOCK, dtype.itemsize
    each = [(2 * block,), (block,), (3, block)]
    (launch,) = launches(kernels.adamw_, build(ADAMW, dict(each=each, step=3, seed=seed, scale=True), dtype))
    count, c = 6 * block, launch.counters
    assert launch.grid == (6, 1, 1) and launch.block == (32 * WARPS, 1, 1) and not launch.inefficient()
    read, written = count * (2 * size + 2 * 4), count * (size + 2 * 4)
    assert c["global_store_bytes"] == written == 512 * c["global_store_requests"] == 32 * c["global_store_sectors"]
    single = 4 + 4 + (8 if seed and dtype == torch.bfloat16 else 0)  # step, scale and seed
    shared = 6 * 32 * WARPS * (TABLE + single)
    assert c["global_load_bytes"] == read + shared
    moved = 32 * (c["global_load_sectors"] + c["global_store_sectors"])
    assert read + written <= moved <= 1.05 * (read + written)


@ALL_DTYPES
def test_nothing_spills(dtype):
    for odd in (False, True):
        args = build(ADAMW, dict(each=[(70,)], step=1, seed=True), dtype)
        if odd:
            args |= {name: [torch.cat([t[:1], t])[1:] for t in args[name]] for name in LISTS}
        (launch,) = launches(kernels.adamw_, args)
        nothing_spills(launch)
        for launch in launches(norms.gradient_norm, dict(gradients=args["gradients"])):
            nothing_spills(launch)


@DTYPES
@pytest.mark.parametrize("name", LISTS)
def test_one_odd_address_makes_accesses_single(name, dtype):
    args = build(ADAMW, dict(each=[(kernels.BLOCK,), (64,)], step=1), dtype)
    args[name][1] = torch.cat([args[name][1][:1], args[name][1]])[1:]
    (launch,) = launches(kernels.adamw_, args)
    assert launch.counters["global_store_bytes"] <= 128 * launch.counters["global_store_requests"]


@DTYPES
@pytest.mark.parametrize("n", (15, 16, 768, 2050))
def test_only_what_is_left_over_is_single(n, dtype):
    """If a tensor ends within a block, all complete groups of its numbers are still accessed in packs."""
    (launch,) = launches(kernels.adamw_, build(ADAMW, dict(each=[(n,)], step=1), dtype))
    pack = 16 // dtype.itemsize
    together = 4 if dtype == torch.float32 else 16
    stores = 0
    for first in range(0, n, kernels.BLOCK):
        packs, rest = divmod(min(n - first, kernels.BLOCK), together)
        warps = -(-packs * together // pack // 32)
        stores += warps * (1 + 2 * pack // 4) + 3 * (rest > 0)  # a pack of weights and quads of both moments
    assert launch.counters["global_store_bytes"] == n * (dtype.itemsize + 8)
    assert launch.counters["global_store_requests"] == stores


@DTYPES
def test_bytes_of_a_norm(dtype):
    args = build(NORM, dict(each=[(8 * norms.BLOCK,), (7,), (norms.BLOCK + 1,)], max_norm=2.0), dtype)
    squares, total = launches(norms.gradient_norm, args)
    assert "gradient_squares_kernel<" in squares.name and "gradient_norm_kernel(" in total.name
    least, c = (9 * norms.BLOCK + 8) * dtype.itemsize, squares.counters
    assert least <= 32 * c["global_load_sectors"] <= 1.05 * least
    assert c["global_store_bytes"] == 4 * squares.grid[0] == total.counters["global_load_bytes"]
    assert total.counters["global_store_bytes"] == 8


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_a_norm_that_is_not_finite(value):
    args = dict(gradients=[torch.tensor([1.0, value, 2.0])], max_norm=1.0)
    with ptx.machine():
        found = norms.gradient_norm(**args)
    for ours, other in zip(found, NORM.reference(**args), strict=True):
        torch.testing.assert_close(ours, other, equal_nan=True)


def test_tables_and_blocks_are_those_of_the_sources():
    header = (library.SOURCES / "kernels.h").read_text() + (library.SOURCES / "tensor_list.cuh").read_text()
    found = dict(re.findall(r"constexpr int (k\w+) = (\d+);", header))
    assert int(found["kAdamwNumbers"]) == kernels.BLOCK and int(found["kNormNumbers"]) == norms.BLOCK
    assert int(found["kListColumns"]) == tensor_lists.COLUMNS == int(found["kSizeColumn"]) + 1
