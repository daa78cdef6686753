"""Sampling in CUDA C++: what it moves, its registers, and what it refuses. Results: test_gpu_sample.py."""

import math

import pytest
import torch

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast import backends, ops
from gpt2fast.cuda import library
from gpt2fast.cuda import sample as kernels
from gpt2fast.op import OPS
from gpt2fast.testing import ptx
from gpt2fast.testing.inputs import build

pytestmark = pytest.mark.skipif(library.machine_reason() is not None, reason=str(library.machine_reason()))
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
B, V = 5, 50257
THREADS, LANES, SECTOR, PACK = 512, 32, 32, 16
GREEDY, CUT = dict(temperature=0.0), (dict(top_k=50), dict(top_p=0.9), dict(top_k=700, top_p=0.5, min_p=0.1))
PENALTY = dict(tokens=True, T=20, repetition_penalty=1.3)


def run(case, dtype):
    args = build(OPS["sample"], dict(B=B, T=3, V=V) | case, dtype)
    with ptx.machine() as machine:
        found = kernels.sample(**args)
    assert torch.equal(found, OPS["sample"].reference(**args))
    return args, found, machine.launches


def read(launch, name="logits"):
    """The bytes that a kernel reads from a tensor. Also checks that the sectors have no more bytes than these."""
    buffer = launch.per_buffer[name]
    assert SECTOR * buffer["read_sectors"] <= 1.01 * buffer["read_bytes"] + 2 * SECTOR * B
    return buffer["read_bytes"]


def columns_of_warps(logits, tokens):
    """How many columns those warps have to which the tokens belong."""
    step = LANES * PACK // logits.element_size()
    found = 0
    for row, token in zip(logits, tokens.tolist()):
        before = row.data_ptr() % SECTOR // row.element_size()
        each = math.ceil(math.ceil((before + V) / step) / (THREADS / LANES)) * step
        first = (before + token) // each * each
        found += min(first + each, before + V) - max(first, before)
    return found


@DTYPES
def test_the_likeliest_is_one_read(dtype):
    _, _, (launch,) = run(GREEDY, dtype)
    assert read(launch) == launch.counters["global_load_bytes"] == B * V * dtype.itemsize
    assert launch.counters["global_store_bytes"] == B * 8 and not launch.inefficient()


@DTYPES
@pytest.mark.parametrize("min_p", (0.0, 0.1))
def test_a_draw_is_two_reads(dtype, min_p):
    """One read is for the greatest, one for the weights. The columns of one warp are read again."""
    args, found, (launch,) = run(dict(min_p=min_p), dtype)
    again = columns_of_warps(args["logits"], found)
    assert read(launch) == (2 * B * V + again) * dtype.itemsize and again <= 0.07 * B * V
    assert launch.counters["global_store_bytes"] == B * 8 and not launch.inefficient()


@DTYPES
@pytest.mark.parametrize("case", CUT, ids=str)
def test_a_draw_after_cuts_is_two_reads(dtype, case):
    """One read is for the greatest, one for the list of those that may survive. Finding the cut needs no read."""
    _, _, (launch,) = run(case, dtype)
    assert read(launch) == 2 * B * V * dtype.itemsize
    if case == CUT[0]:  # few more than 50 are listed, and those that are kept are written once more
        assert launch.per_buffer["ids"]["written_bytes"] < 4 * B * 2 * 60


@DTYPES
def test_a_penalty_is_one_read_and_one_write_more(dtype):
    for case in (GREEDY, dict(), CUT[0]):
        args, found, (changing, launch) = run(case | PENALTY, dtype)
        earlier = [row[row >= 0].tolist() for row in args["tokens"]]
        assert changing.per_buffer["logits"]["read_bytes"] == (B * V + sum(map(len, earlier))) * dtype.itemsize
        assert changing.counters["global_store_bytes"] == 4 * (B * V + sum(map(len, earlier)))
        assert launch.per_buffer["logits"]["read_bytes"] == 0
        if case == GREEDY:
            assert read(launch, "changed") == 4 * B * V


@DTYPES
def test_nothing_spills(dtype):
    for case in (GREEDY | PENALTY, GREEDY, dict(), *CUT):
        for launch in run(case | dict(V=300), dtype)[2]:
            for arch in ("sm_80", "sm_90", "sm_100"):
                found = launch.resources(arch)
                assert found.stack == found.spill_stores == 0, f"{launch.name} {arch}: {found}"
                assert launch.block[0] == THREADS and launch.occupancy(arch) >= 2 * THREADS / 2048


def test_bits_repeat_and_a_row_does_not_depend_on_its_batch():
    args = build(OPS["sample"], dict(B=6, T=3, V=3001, rows=True), torch.bfloat16)
    for options in (dict(temperature=0.0), dict(), dict(top_k=40), dict(top_p=0.9)):
        with ptx.machine():
            together = kernels.sample(**args | options)
            assert torch.equal(kernels.sample(**args | options), together)
            for b in (0, 3, 5):
                part = {name: args[name][b : b + 1] for name in ("logits", "positions", "rows")}
                assert kernels.sample(**args | part | options) == together[b]


def test_nothing_that_can_be_drawn():
    """Rows that VALUES rules out: the kernel gives the last token, as the reference, or any, and stays in bounds."""
    logits = torch.full((3, 600), -torch.inf)
    logits[1] = torch.nan
    logits[2, 5] = torch.inf
    for options in (dict(), dict(top_k=5), dict(top_k=5, top_p=0.5), dict(top_p=0.5), dict(min_p=0.2)):
        with ptx.machine():
            found = kernels.sample(logits, torch.tensor([1]), torch.arange(3), **options)
        assert ((0 <= found) & (found < 600)).all(), options


def test_refused():
    x, seed, positions = torch.randn(2, 20), torch.tensor([5]), torch.arange(2)
    with ptx.machine(), backends.use_backend("cuda"):
        with pytest.raises(RuntimeError, match="sample in CUDA covers .*, got float64"):
            ops.sample(x.double(), seed, positions)
        columns = kernels.MOST_COLUMNS + 1
        assert f"up to {columns - 1} columns" in kernels.supports(torch.empty(1, 1).expand(1, columns), seed, positions)
        arguments = x, None, seed, positions, None, positions, None, None, None, None, 2, 0, columns, 20, 0, 0
        with pytest.raises(RuntimeError, match="gpt2fast_sample: CUDA error 1$"):  # asked below Python's checks
            library.call(kernels.SOURCE, "gpt2fast_sample", *arguments, 1.0, 1.0, 0.0, 1.0, 0, 0, 0)
