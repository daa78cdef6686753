"""Decode attention in CUDA C++: what it moves, its registers, paged caches. Results: test_gpu_decode_attention.py."""

import pytest
import torch

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.cuda import decode_attention as kernels
from gpt2fast.cuda import library
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth, ptx
from gpt2fast.testing.inputs import reference, truth

pytestmark = pytest.mark.skipif(library.machine_reason() is not None, reason=str(library.machine_reason()))
OP = OPS["decode_attention"]
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
MULTIPROCESSORS, SECTOR = 108, 32


def inputs(T=1, S=1024, H=12, D=64, lengths=(1024,), dtype=torch.bfloat16):
    """Arguments whose k and v are one layer of a cache with several layers; the heads lie side by side."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(len(lengths), T, H, D, generator=g).to(dtype)
    k, v = (torch.randn(2, len(lengths), S, H, D, generator=g).to(dtype)[1] for _ in "kv")
    return dict(q=q, k=k, v=v, lengths=torch.tensor(lengths))


def run(args, function=kernels.decode_attention):
    with ptx.machine() as machine:
        out = function(**args)
    return out, machine.launches


def read(launches, name):
    return sum(launch.per_buffer.get(name, {}).get("read_bytes", 0) for launch in launches)


def sectors(launches):
    return sum(launch.counters[f"global_{kind}_sectors"] for launch in launches for kind in ("load", "store"))


@DTYPES
@pytest.mark.parametrize("T", (1, 8))
def test_what_it_moves(T, dtype):
    """The cache is read once, with 128 bits in each access, by enough blocks to fill a device. The rest is the blocks'
    sums."""
    args = inputs(T, dtype=dtype)
    _, launches = run(args)
    cache, queries = (args[name].numel() * dtype.itemsize for name in "kq")
    assert read(launches, "k") == read(launches, "v") == cache
    first, join = launches
    splits = 1024 // kernels.SPLIT
    assert first.grid == (12 * splits, 1, 1) and first.grid[0] >= MULTIPROCESSORS
    assert join.grid == (12 * T, 1, 1)
    assert not first.inefficient() and not join.inefficient()
    parts = 12 * T * splits * (64 + 2) * 4
    assert first.counters["global_store_bytes"] == parts and read([first], "q") == splits * queries
    assert join.counters["global_store_bytes"] == queries
    assert sum(launch.per_buffer["k"]["read_sectors"] for launch in launches) * SECTOR == cache
    if T == 1:  # and the lengths, and each block's queries and sums
        assert SECTOR * sectors([first]) <= 1.05 * (2 * cache + 2 * queries)


@DTYPES
def test_only_keys_that_are_seen_are_read(dtype):
    """Blocks whose keys no query sees return at once and write nothing."""
    args = inputs(2, 512, 2, lengths=(512, 300, 65, 0), dtype=dtype)
    for others, keys, splits in (
        (dict(), 512 + 300 + 65, 8 + 5 + 2),
        (dict(starts=torch.tensor([100, 299, 65, 0])), 412 + 1, 7 + 1),
        (dict(window=70), 71 + 71 + 65, 2 + 2 + 2),
    ):
        _, launches = run(args | others)
        assert read(launches, "k") == read(launches, "v") == keys * 2 * 64 * dtype.itemsize
        assert launches[0].counters["global_store_bytes"] == splits * 2 * 2 * (64 + 2) * 4


@DTYPES
def test_a_short_cache_takes_one_kernel_and_no_workspace(dtype):
    args = inputs(2, kernels.SPLIT, 3, lengths=(kernels.SPLIT, 9), dtype=dtype)
    out, launches = run(args)
    assert len(launches) == 1 and not launches[0].inefficient()
    assert launches[0].counters["global_store_bytes"] == out.numel() * dtype.itemsize


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("D", (64, 63, 128, 127, 256, 255))
def test_nothing_spills(D, dtype):
    for launch in run(inputs(2, 130, 1, D, (130,), dtype))[1]:
        for arch in ("sm_80", "sm_90", "sm_100"):
            found = launch.resources(arch)
            assert found.stack == found.spill_stores == 0, f"{launch.name} {arch}: {found}"


@DTYPES
@pytest.mark.parametrize("D", (32, 64, 80, 96, 128, 256))
def test_no_access_meets_a_conflict_of_banks(D, dtype):
    for launch in run(inputs(8, 512, 1, D, (512,), dtype))[1]:
        assert not launch.inefficient(), launch.name


@DTYPES
@pytest.mark.parametrize("wide", (False, True), ids=("int32", "int64"))
@pytest.mark.parametrize("size", (1, 2, 16, 64, 256))
def test_pages(size, wide, dtype):
    """The result is that of the cache which the pages make when they are put together. Pages may be in any order, rows
    may share pages, and some pages belong to no row.

    The table may hold anything beyond a row's keys.
    """
    g = torch.Generator().manual_seed(size)
    lengths, starts, T, H, D = torch.tensor([200, 129, 7, 0]), torch.tensor([0, 70, 0, 0]), 3, 2, 64
    places = -(-200 // size)
    pages = 3 * places + 2
    k, v = (torch.randn(pages, size, H, D, generator=g).to(dtype) for _ in "kv")
    table = torch.stack([torch.randperm(pages, generator=g)[:places] for _ in lengths])
    args = dict(q=torch.randn(4, T, H, D, generator=g).to(dtype), lengths=lengths, starts=starts)
    for window in (0, 50):
        whole = args | dict(k=k[table].flatten(1, 2), v=v[table].flatten(1, 2), window=window)
        given = table.clone()
        for b, length in enumerate(lengths.tolist()):
            given[b, -(-length // size) :] = 2**31 - 1
        apart = torch.stack((given, given), 1)[:, 1]  # a table whose rows are not dense
        given = (apart if wide else given).to(torch.int64 if wide else torch.int32)
        out, launches = run(args | dict(k=k, v=v, table=given, window=window), kernels.paged)
        assert_close_to_truth(out, reference(OP, whole)[0], truth(OP, whole)[0])
        assert torch.equal(out, run(whole)[0])
        if size >= 64 and not window:
            assert read(launches, "k") == (200 + 59 + 7) * H * D * dtype.itemsize


def test_what_is_covered():
    q = torch.empty(1, 9, 2, 64, device="meta")
    assert kernels.supports(q, q, q, None) == "decode attention in CUDA covers up to 8 new tokens, got 9"
    q = torch.empty(1, 1, 2, 257, device="meta")
    assert kernels.supports(q, q, q, None) == "attention in CUDA covers head sizes of 1 to 256, got 257"


@pytest.mark.parametrize("size", (0, 3, 48))
def test_pages_of_no_power_of_two(size):
    q, pages = torch.randn(1, 1, 2, 64), torch.randn(4, size, 2, 64)
    with ptx.machine(), pytest.raises(RuntimeError, match="gpt2fast_decode_attention: CUDA error 1$"):
        kernels.paged(q, pages, pages, torch.zeros(1, 4, dtype=torch.int32), torch.tensor([1]))


def test_a_workspace_that_is_missing():
    args = inputs(1, 65, 2, lengths=(65,))
    with ptx.machine(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "SPLIT", 128)
        with pytest.raises(RuntimeError, match="gpt2fast_decode_attention: CUDA error 1$"):
            kernels.decode_attention(**args)
