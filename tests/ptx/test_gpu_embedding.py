"""The embedding on the PTX machine, in Triton and in CUDA C++: hot tokens, tables with gaps, rows that do not exist.

The machine raises an error if a kernel breaks memcheck or racecheck, so that every launch here is a test of both.
"""

import pytest
import torch
from both import kernels_of

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth
from gpt2fast.testing.inputs import build, reference, truth

run = kernels_of("embedding")


def check(run, args, name="embedding_backward"):
    found, op = run(name, args)[0], OPS[name]
    found = (found,) if name == "embedding" else found
    for actual, plain, exact in zip(found, reference(op, args), truth(op, args)):
        assert actual.dtype == plain.dtype and actual.is_contiguous()
        assert_close_to_truth(actual, plain, exact)


def hot(before, count, C, dtype):
    """Arguments with ``before`` tokens that occur once, then ``count`` times the same token, between two others."""
    total = before + count + 2
    dy = torch.randn(1, total, C, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens = torch.full((1, total), 3 + before)
    tokens[0, :before] = torch.arange(before)
    tokens[0, before], tokens[0, -1] = before + 6, 0
    return dict(dy=dy, tokens=tokens, V=before + 7, P=total + 9, start=4)


@pytest.mark.parametrize("count", (15, 16, 17, 253, 254, 255, 256, 300, 767, 768, 5000))
@pytest.mark.parametrize("before", (0, 1, 256))
def test_a_hot_token(run, count, before):
    """One row of the table gets the sum of many rows, which begin and end anywhere in segments. Other rows get none or
    one."""
    check(run, hot(before, count, 40, torch.float32))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("C", (1, 37, 264, 520))
def test_columns_of_a_hot_token(run, C, dtype):
    """The parts of a hot token have whole and half tiles of columns, and columns that are not aligned."""
    check(run, hot(7, 1100, C, dtype))


def test_gradients_repeat_bit_for_bit_and_tokens_meet_types_in_one_sum(run):
    case = dict(B=3, T=50, C=300, V=5, P=64, positions=True, token_types=True)
    args = build(OPS["embedding_backward"], case, torch.bfloat16)
    check(run, args)
    first = run("embedding_backward", args)[0]
    assert all(map(torch.equal, first, run("embedding_backward", args)[0]))


def test_tables_and_gradients_with_gaps(run):
    args = build(OPS["embedding"], dict(B=2, T=5, C=70, V=11, P=8), torch.bfloat16)
    wide = torch.full((11, 140), torch.nan).bfloat16()
    for table in (wide[:, :70], wide[:, ::2]):
        table.copy_(args["wte"])
        assert torch.equal(run("embedding", args | dict(wte=table))[0], run("embedding", args)[0])
    dy = torch.randn(2, 5, 140)[..., ::2]
    check(run, dict(dy=dy, tokens=args["tokens"], V=11, P=8))


def test_rows_at_a_stride_of_their_own(run):
    args = build(OPS["embedding"], dict(B=2, T=5, C=72, V=11, P=8, token_types=True), torch.bfloat16)
    for name in ("wte", "wpe"):
        wide = torch.full((len(args[name]), 80), torch.nan).bfloat16()
        wide[:, :72] = args[name]
        args[name] = wide[:, :72]
    check(run, args, "embedding")
    wide = torch.randn(5, 2, 80).bfloat16()
    for dy in (wide[..., :72].transpose(0, 1), wide[:2, :, :72], wide[:1, :1, :72].expand(3, 5, 72)):
        tokens = torch.randint(0, 11, dy.shape[:2], generator=torch.Generator().manual_seed(0))
        check(run, dict(dy=dy, tokens=tokens, V=11, P=8))


def test_a_row_that_is_not_there_is_no_number(run):
    wte, wpe = torch.zeros(3, 8), torch.zeros(4, 8)
    y, _ = run("embedding", dict(tokens=torch.tensor([[2, 3, -1, 0]]), wte=wte, wpe=wpe))
    assert y.isnan().all(-1).tolist() == [[False, True, True, False]] and not y[0, 0].any()
    y, _ = run("embedding", dict(tokens=torch.tensor([[0, 0]]), wte=wte, wpe=wpe, start=3))
    assert y.isnan().all(-1).tolist() == [[False, True]]
    tokens, types = torch.tensor([[0, 1]]), torch.tensor([[5, 2]])
    y, _ = run("embedding", dict(tokens=tokens, wte=wte, wpe=wpe, token_types=types))
    assert y.isnan().all(-1).tolist() == [[True, False]]


@pytest.mark.parametrize("count", (2, 600))
def test_a_row_that_is_not_there_has_no_gradient(run, count):
    tokens = torch.tensor([[-1, 3, 1, 2]]).repeat_interleave(count, 1)
    dy = torch.randn(1, 4 * count, 8, generator=torch.Generator().manual_seed(0))
    (dwte, dwpe), _ = run("embedding_backward", dict(dy=dy, tokens=tokens, V=3, P=2, start=-1))
    inside = dict(dy=dy[:, 2 * count :], tokens=tokens[:, 2 * count :], V=3, P=4 * count)
    assert_close_to_truth(dwte, *(f(OPS["embedding_backward"], inside)[0] for f in (reference, truth)))
    assert torch.equal(dwpe, dy[0, 1:3])


def test_rows_2_to_the_31_apart(run, tmp_path):
    """Row offsets are computed in 64 bits. The sparse file has blocks only for the two rows."""
    file, far = tmp_path / "far", 2**31
    with file.open("wb") as f:
        f.truncate(2 * (far + 64))
    x = torch.from_file(str(file), shared=True, size=far + 64, dtype=torch.float16).as_strided((2, 64), (far, 1))
    near = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).half()
    x.copy_(near)
    args = dict(tokens=torch.tensor([[1, 0]]), wpe=near)
    assert torch.equal(run("embedding", args | dict(wte=x))[0], run("embedding", args | dict(wte=near))[0])
    args = dict(tokens=torch.tensor([[1, 1]]), V=2, P=2)
    for a, b in zip(*(run("embedding_backward", args | dict(dy=dy[None]))[0] for dy in (x, near))):
        assert torch.equal(a, b)
    file.unlink()
