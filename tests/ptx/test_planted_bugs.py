"""Planted bugs are found with the right line, and the same kernel without the bug has no errors."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from gpt2fast.testing import ptx

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

HERE = Path(__file__).parent
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def marked(file: str, name: str, word: str = "bug") -> str:
    """ "planted.cu:17", the line that carries the mark."""
    lines = (HERE / file).read_text().splitlines()
    (at,) = [i for i, line in enumerate(lines, 1) if re.search(rf"{word}: {name}$", line)]
    return f"{file}:{at}"


def launch(kernel, grid, block, *args, bug=True, **options):
    text = ptx.compile_cuda(HERE / "planted.cu", flags=[f"-DBUG={int(bug)}"])
    with ptx.machine(raise_errors=False, **options) as m:
        args = [torch.empty(a) if isinstance(a, torch.Size) else a for a in args]
        found = m.launch(text, kernel, grid, block, *args)
        found.left = m.unwritten()
    return found


def ones(*shape):
    return torch.ones(*shape)


CUDA = [
    ("off_by_one", "bounds", (2,), (64,), (ones(100), torch.Size([100]), 100), None),
    ("wrong_mask", "bounds", (3,), (64,), (ones(3, 2), torch.zeros(3, 2), 3, 2), None),
    ("reverse", "race", (1,), (128,), (ones(128), torch.Size([128])), "missing_barrier"),
    ("sum_of_warp", "race", (1,), (32,), (ones(32), torch.Size([32])), "missing_warp_barrier"),
    ("copied_asynchronously", "race", (1,), (32,), (ones(256), torch.Size([128])), "missing_wait"),
    ("accumulate", "uninitialised", (2,), (64,), (ones(100), torch.Size([100]), 100), "uninitialised"),
    ("uninitialised_shared", "uninitialised", (1,), (64,), (ones(64), torch.Size([64])), None),
    ("misaligned", "misaligned", (1,), (8,), (ones(40), torch.zeros(32)), None),
]


@needs_nvcc
@pytest.mark.parametrize("kernel, kind, grid, block, args, mark", CUDA, ids=[c[0] for c in CUDA])
def test_cuda(kernel, kind, grid, block, args, mark):
    found = launch(kernel, grid, block, *args)
    assert {e.kind for e in found.errors} == {kind}, found.errors
    expected = {marked("planted.cu", mark or kernel)}
    if kind == "race" and mark != "missing_wait":
        expected.add(marked("planted.cu", mark, "other"))
        assert {e.other_source for e in found.errors} <= expected
    assert {e.source for e in found.errors} <= expected
    clean = launch(kernel, grid, block, *args, bug=False)
    assert not clean.errors, clean.errors


@needs_nvcc
def test_cuda_one_buffer_reached_through_another():
    both = torch.zeros(4096)
    x, y = both[:64].clone(), torch.zeros(64)
    apart = (y.data_ptr() - x.data_ptr()) // 4
    (error, *_) = launch("into_the_neighbour", (1,), (32,), x, y, apart).errors
    assert error.kind == "provenance" and error.source == marked("planted.cu", "provenance")
    assert "'into_the_neighbour_param_1'" in error.message  # y, which it reads
    assert "pointer into buffer 'into_the_neighbour_param_0'" in error.message  # x
    assert not launch("into_the_neighbour", (1,), (32,), x, y, apart, bug=False).errors


@needs_nvcc
def test_cuda_that_never_ends():
    (error,) = launch("never_ends", (1,), (32,), ones(1), budget=10_000).errors
    assert error.kind == "budget" and marked("planted.cu", "endless") in str(error)
    assert not launch("never_ends", (1,), (32,), ones(1), bug=False, budget=10_000).errors


@needs_nvcc
def test_cuda_output_that_nothing_wrote():
    found = launch("all_but_the_last", (2,), (64,), ones(100), torch.Size([100]), 100)
    assert not found.errors
    (error,) = found.left
    assert error.kind == "unwritten" and "4 of 400 bytes" in error.message and "the first at 396" in error.message
    assert not launch("all_but_the_last", (2,), (64,), ones(100), torch.Size([100]), 100, bug=False).left


@needs_nvcc
def test_cuda_uncoalesced_transpose():
    args = (torch.randn(64, 64), torch.Size([64, 64]), 64)
    slow, fast = (launch("transpose", (2, 2), (32, 8), *args, bug=bug) for bug in (True, False))
    assert not slow.errors and not fast.errors
    line = marked("planted.cu", "uncoalesced")
    assert list(slow.inefficient()) == [line]
    assert slow.inefficient()[line] == "global store: 32.00 sectors a request, ideal 4.00"
    assert not fast.inefficient()


@needs_nvcc
def test_cuda_bank_conflict():
    args = (torch.randn(32, 32), torch.Size([32, 32]))
    slow, fast = (launch("through_tile", (1,), (32, 32), *args, bug=bug) for bug in (True, False))
    line = marked("planted.cu", "bank_conflict")
    assert slow.inefficient() == {line: "shared load: 32.00 wavefronts a request, 992 by bank conflicts"}
    assert not fast.inefficient() and not slow.errors and not fast.errors


@pytest.fixture
def planted():
    pytest.importorskip("triton")
    import planted

    return planted


def triton_launch(kernel, grid, *args, **constants):
    with ptx.machine(raise_errors=False) as m:
        args = [torch.empty(a) if isinstance(a, torch.Size) else a for a in args]
        kernel[grid](*args, **constants)
    return m.launches[0]


TRITON = [
    ("off_by_one", "bounds", (ones(100), torch.Size([100]), 100), "off_by_one"),
    ("wrong_mask", "bounds", (ones(5, 30), torch.Size([5, 30]), 5, 30), "wrong_mask"),
    ("accumulate", "uninitialised", (ones(100), torch.Size([100]), 100), "uninitialised"),
]


@pytest.mark.parametrize("kernel, kind, args, mark", TRITON, ids=[c[0] for c in TRITON])
def test_triton(planted, kernel, kind, args, mark):
    function, grid = getattr(planted, kernel), (4 if kernel != "wrong_mask" else 1,)
    found = triton_launch(function, grid, *args, BUG=True, BLOCK=32)
    assert {e.kind for e in found.errors} == {kind}, found.errors
    assert {e.source for e in found.errors} == {marked("planted.py", mark)}
    assert not triton_launch(function, grid, *args, BUG=False, BLOCK=32).errors


def test_triton_uncoalesced(planted):
    x = torch.randn(2048)
    slow, fast = (triton_launch(planted.strided, (1,), x, torch.Size([128]), 128, BUG=bug, BLOCK=128) for bug in (1, 0))
    line = marked("planted.py", "uncoalesced")
    assert slow.inefficient() == {line: "global load: 32.00 sectors a request, ideal 4.00"}
    assert not fast.inefficient()


def without(text: str, instruction: str) -> str:
    """The PTX without the first instruction of this kind."""
    changed = re.sub(rf"^\s*{re.escape(instruction)}\b.*?;", "", text, count=1, flags=re.M)
    assert changed != text, f"the PTX holds no {instruction}"
    return changed


def relaunch(launch, text, args):
    with ptx.machine(raise_errors=False) as m:
        return m.launch(text, launch.kernel, launch.grid, launch.block, *args, shared=launch.shared)


def test_triton_missing_barrier(planted):
    """Triton inserts barriers itself, so the test removes one from the compiled code."""
    x, y = torch.rand(512), torch.zeros(512)
    clean = triton_launch(planted.row_sum, (1,), x, y, 512, BLOCK=512)
    args = [x, y] + [512] * (len(ptx.parse(clean.ptx).params("row_sum")) - 4) + [None, None]
    assert not clean.errors and not relaunch(clean, clean.ptx, args).errors
    errors = relaunch(clean, without(clean.ptx, "bar.sync"), args).errors
    assert {e.kind for e in errors} == {"race"}
    source = (HERE / "planted.py").read_text().splitlines()
    line = next(i for i, text in enumerate(source, 1) if "tl.sum(x, axis=0)" in text)
    assert any({e.source, e.other_source} == {f"planted.py:{line}"} for e in errors), errors


def test_triton_missing_wait(planted):
    import tutorials

    a, b = torch.randn(64, 128).half(), torch.randn(128, 32).half()
    with ptx.machine() as m:
        out = tutorials.matmul(a, b)
    clean = m.launches[0]
    assert clean.ptx.count("cp.async.wait_group") >= 1
    names = [p["name"] for p in ptx.parse(clean.ptx).params(clean.kernel)]
    values = [a, b, out, 64, 32, 128, a.stride(0), b.stride(0), out.stride(0), None, None]
    assert len(names) == len(values)
    assert not relaunch(clean, clean.ptx, values).errors
    loosened = re.sub(r"cp\.async\.wait_group\s+\d+", "cp.async.wait_group 7", clean.ptx)
    errors = relaunch(clean, loosened, values).errors
    # Triton gives the read of a tile from shared memory the line of its tl.load, the same as the copy.
    source = (HERE / "tutorials.py").read_text().splitlines()
    loads = {f"tutorials.py:{i}" for i, line in enumerate(source, 1) if re.search(r"[ab] = tl\.load\([ab]_ptrs,", line)}
    assert len(loads) == 2 and {e.kind for e in errors} == {"race"}
    assert {e.source for e in errors} == {e.other_source for e in errors} == loads
    early = [e for e in errors if "is read while the cp.async" in e.message]
    assert {e.source for e in early} == loads and all(e.instruction.startswith("ldmatrix") for e in early)
