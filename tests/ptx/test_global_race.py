"""Races in global memory, between blocks and between warps of a block, are found with both lines. There is no false
alarm if atomics, fences or barriers order the accesses."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import kernel
from programs import launch as launch_text

from gpt2fast.testing import ptx

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

HERE = Path(__file__).parent
FILE = HERE / "racing.cu"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def marked(name: str, word: str = "bug", file: str = "racing.cu") -> str:
    lines = (HERE / file).read_text().splitlines()
    (at,) = [i for i, line in enumerate(lines, 1) if re.search(rf"{word}: {name}\b", line)]
    return f"{file}:{at}"


def launch(name, *args, bug=True, grid=4, block=128, **options):
    text = ptx.compile_cuda(FILE, flags=[f"-DBUG={int(bug)}"])
    with ptx.machine(raise_errors=False, **options) as m:
        return m.launch(text, name, (grid,), (block,), *args)


def ints(n):
    return torch.zeros(n, dtype=torch.int32)


RACES = [
    ("accumulate", lambda: (torch.ones(512), torch.zeros(128)), 4),
    ("last_block_sums", lambda: (torch.ones(4), torch.zeros(4), ints(1), torch.zeros(1)), 4),
    ("lock", lambda: (torch.ones(4), ints(1), torch.zeros(1)), 4),
    ("look_back", lambda: (torch.ones(4), ints(4), torch.zeros(4)), 4),
    ("within_a_block", lambda: (torch.ones(128), torch.zeros(128), torch.zeros(128)), 1),
]


@needs_nvcc
@pytest.mark.parametrize("name, args, grid", RACES, ids=[r[0] for r in RACES])
def test_race(name, args, grid):
    found = launch(name, *args(), grid=grid)
    assert found.errors and {e.kind for e in found.errors} == {"global_race"}, found.errors
    pair = {marked(name), marked(name, "other")}
    assert any({e.source, e.other_source} == pair for e in found.errors), found.errors
    assert {e.source for e in found.errors} | {e.other_source for e in found.errors} <= pair
    assert not launch(name, *args(), grid=grid, racecheck=False).errors
    clean = launch(name, *args(), grid=grid, bug=False)
    assert not clean.errors, clean.errors


@needs_nvcc
def test_blocks_that_write_apart():
    assert not launch("apart", torch.ones(512), torch.zeros(512)).errors


@needs_nvcc
def test_the_same_value_twice():
    """Compilers and masked tails make such stores, so they are reported only on request."""
    assert not launch("same_value", torch.zeros(128)).errors
    (error,) = launch("same_value", torch.zeros(128), same_value_races=True).errors
    assert error.kind == "global_race" and error.source == error.other_source == marked("same_value")
    (error,) = launch("last_one_wins", torch.zeros(128)).errors
    assert error.source == error.other_source == marked("last_one_wins")


@needs_nvcc
def test_a_finding_is_counted():
    """Three of four blocks race in each of 128 places: read and write, in both orders, and write and write."""
    found = launch("accumulate", torch.ones(512), torch.zeros(128))
    assert [e.count for e in found.errors] == [2 * 384, 384] and found.error_count == 3 * 384
    assert "(768 times)" in str(found.errors[0])


@needs_nvcc
def test_a_block_that_waits_for_another():
    (error,) = launch("waits_for_the_next", ints(4), budget=1_000_000).errors
    assert error.kind == "budget" and error.source == marked("waits_for_the_next")
    assert "waits for another block" in error.message


@pytest.mark.parametrize("block", [32, 256])
@pytest.mark.parametrize("name", ["accumulate", "under_a_lock"])
def test_triton(name, block):
    """With 32 elements, all four warps load all of them. That is no race with the store of one warp."""
    pytest.importorskip("triton")
    import racing

    for bug in (True, False):
        x, out, extra = torch.ones(4 * block), torch.zeros(block), [ints(1)] if name == "under_a_lock" else []
        with ptx.machine(raise_errors=False) as m:
            getattr(racing, name)[(4,)](x, *extra, out, BUG=bug, BLOCK=block)
        errors = m.launches[0].errors
        pair = {marked(name, word, "racing.py") for word in ("bug", "other")} if bug else set()
        assert {e.kind for e in errors} == ({"global_race"} if bug else set()), errors
        assert {e.source for e in errors} | {e.other_source for e in errors} == pair
        assert bug or out.tolist() == [4] * block


RELEASE = """
.reg .b32 %block;
mov.u32 %block, %ctaid.x;
setp.ne.u32 %p0, %block, 0;
@%p0 bra SECOND;
st.global.u32 [%buffer0], 7;
{store} [%buffer0 + 16], 1;
bra DONE;
SECOND:
{load} %r1, [%buffer0 + 16];
ld.global.u32 %r2, [%buffer0];
DONE:
"""


@pytest.mark.parametrize(
    ("store", "load", "clean"),
    [
        ("st.release.gpu.global.u32", "ld.acquire.gpu.global.u32", True),
        ("st.relaxed.gpu.global.u32", "ld.acquire.gpu.global.u32", False),
        ("st.release.cta.global.u32", "ld.acquire.cta.global.u32", False),
        ("fence.acq_rel.gpu;\nst.volatile.global.u32", "ld.volatile.global.u32", True),
        ("fence.acq_rel.cta;\nst.volatile.global.u32", "ld.volatile.global.u32", False),
        ("fence.acq_rel.gpu;\nst.global.u32", "ld.global.u32", False),
    ],
)
def test_release_and_acquire(store: str, load: str, clean: bool) -> None:
    out = np.zeros(8, np.uint32)
    report = launch_text(kernel(RELEASE.format(store=store, load=load), 1), out, grid=(2, 1, 1), block=(1, 1, 1))
    assert {e["kind"] for e in report["errors"]} == (set() if clean else {"global_race"}), report["errors"]


def test_what_follows_a_release_is_not_covered() -> None:
    body = RELEASE.format(store="st.release.gpu.global.u32", load="ld.acquire.gpu.global.u32")
    late = body.replace("bra DONE;", "st.global.u32 [%buffer0], 8;\nbra DONE;")
    out = np.zeros(8, np.uint32)
    (error,) = launch_text(kernel(late, 1), out, grid=(2, 1, 1), block=(1, 1, 1))["errors"]
    assert error["kind"] == "global_race"
    assert "read of buffer 'buffer0' at byte 0 by block (1, 0, 0) and write by block (0, 0, 0)" in error["message"]
