"""Cross entropy on the PTX machine, in Triton and in CUDA C++: rows that begin anywhere, large logits, ignored rows.

The machine raises an error if a kernel breaks memcheck or racecheck, so that every launch here is a test of both.
"""

import pytest
import torch
from both import kernels_of

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.dtypes import dtype_name
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth
from gpt2fast.testing.inputs import build, reference, truth

NAMES = ("cross_entropy", "cross_entropy_backward")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
run = kernels_of("cross_entropy")


def check(name, args, found):
    found = found if isinstance(found, tuple) else (found,)
    for what, ours, plain, exact in zip(OPS[name].outputs, found, reference(OPS[name], args), truth(OPS[name], args)):
        assert ours.dtype == plain.dtype and ours.shape == plain.shape and ours.is_contiguous()
        assert_close_to_truth(ours, plain, exact, f"{name} {what}")


def both_ways(run, logits, targets, dloss=None, **options):
    """loss, lse and dlogits. Each is checked against the truth."""
    args = dict(logits=logits, targets=targets, **options)
    loss, lse = run(NAMES[0], args)[0]
    check(NAMES[0], args, (loss, lse))
    args = dict(dloss=torch.ones(loss.shape) if dloss is None else dloss, logits=logits, targets=targets, lse=lse)
    dlogits, _ = run(NAMES[1], args | options)
    check(NAMES[1], args | options, dlogits)
    return loss, lse, dlogits


@pytest.mark.parametrize("V", (1, 4089, 4095, 4096, 4097, 8191, 12288))
@pytest.mark.parametrize("gap", (0, 3, 8))
def test_rows_that_begin_and_end_anywhere(run, V, gap):
    g = torch.Generator().manual_seed(V)
    logits = torch.randn(33, V + gap, generator=g).bfloat16()[:, :V]
    both_ways(run, logits, torch.randint(0, V, (33,), generator=g), reduction="none")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("first", range(0, 17, 3))
def test_a_first_logit_of_any_alignment(run, first, dtype):
    g = torch.Generator().manual_seed(first)
    memory = torch.randn(first + 5 * 2311, generator=g).to(dtype)
    logits = memory[first:].view(5, 2311)
    both_ways(run, logits, torch.randint(0, 2311, (5,), generator=g), reduction="none", label_smoothing=0.1)


@pytest.mark.parametrize("V", (2, 15, 16, 17, 31, 300))
def test_short_rows(run, V):
    """Some rows lie within one sector of memory, or end before the sector does."""
    g = torch.Generator().manual_seed(V)
    logits = torch.randn(37, V, generator=g)
    both_ways(run, logits, torch.randint(0, V, (37,), generator=g), reduction="none", label_smoothing=0.3)


def test_large_logits_keep_the_digits_of_their_differences(run):
    small = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)).round()
    targets = torch.arange(40)
    far, _ = run(NAMES[0], dict(logits=small + 2.0**22, targets=targets, reduction="none"))[0]
    near, _ = run(NAMES[0], dict(logits=small, targets=targets, reduction="none"))[0]
    assert torch.equal(far, near)


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
@pytest.mark.parametrize("offset", (-3e5, 257.0, 2.0**20))
def test_gradients_of_large_logits(run, offset, smoothing):
    """If lse has no digits left for the log of the sum, the sum is computed again from the row."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(7, 900, generator=g).mul(8).round() + offset
    args = dict(logits=logits, targets=torch.randint(0, 900, (7,), generator=g), reduction="none")
    args |= dict(dloss=torch.ones(7), lse=logits.logsumexp(1), label_smoothing=smoothing)
    check(NAMES[1], args, run(NAMES[1], args)[0])


def test_columns_of_minus_infinity(run):
    """Only -infinity in the first part of a row, and in all columns but one."""
    logits = torch.randn(3, 700, generator=torch.Generator().manual_seed(2))
    logits[0, :600] = logits[1, 1:] = -torch.inf
    targets = torch.tensor([650, 0, 5])
    loss, lse, dlogits = both_ways(run, logits, targets, reduction="none")
    assert loss[1] == 0 and lse[1] == logits[1, 0] and not dlogits[logits.isinf()].any()


def test_a_target_outside_the_vocabulary_is_no_number(run):
    args = dict(logits=torch.zeros(3, 5), targets=torch.tensor([4, 5, -1]), reduction="none")
    loss, _ = run(NAMES[0], args)[0]
    assert loss.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@pytest.mark.parametrize("ignore_index", (-100, 3, 2**40))
def test_ignored_rows(run, reduction, ignore_index):
    g = torch.Generator().manual_seed(3)
    targets = torch.randint(0, 77, (1500,), generator=g)
    targets[::3] = ignore_index
    ignored = targets == ignore_index
    logits = torch.randn(1500, 77, generator=g)
    dloss = torch.randn(1500 if reduction == "none" else (), generator=g)
    options = dict(ignore_index=ignore_index, reduction=reduction, label_smoothing=0.2)
    loss, _, dlogits = both_ways(run, logits, targets, dloss, **options)
    assert not dlogits[ignored].any()
    if reduction == "none":
        assert not loss[ignored].any()


def test_no_row_that_counts(run):
    logits, targets = torch.randn(4, 50), torch.full((4,), -100)
    for reduction, expected in (("mean", torch.nan), ("sum", 0.0)):
        loss, lse = run(NAMES[0], dict(logits=logits, targets=targets, reduction=reduction))[0]
        assert torch.equal(loss, torch.tensor(expected)) or (loss.isnan() and reduction == "mean")
        args = dict(dloss=torch.ones(()), logits=logits, targets=targets, lse=lse, reduction=reduction)
        assert not run(NAMES[1], args)[0].any()


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_no_rows(run, reduction):
    args = dict(logits=torch.randn(0, 50), targets=torch.zeros(0, dtype=torch.int64), reduction=reduction)
    loss, lse = run(NAMES[0], args)[0]
    assert loss.shape == ((0,) if reduction == "none" else ()) and lse.shape == (0,)
    assert reduction == "none" or loss.isnan() == (reduction == "mean")
    dlogits, _ = run(NAMES[1], args | dict(dloss=torch.ones(loss.shape), lse=lse))
    assert dlogits.shape == (0, 50)


def test_strides(run):
    g = torch.Generator().manual_seed(4)
    wide = torch.randn(24, 2, 130, generator=g).bfloat16()
    targets, dloss = torch.randint(0, 60, (48,), generator=g)[::2], torch.randn(48, generator=g)[::2]
    for logits in (
        wide[:, 0],
        wide[:, 1, 3:80],
        wide[:, 0, ::2],
        wide[:, 1, :96].contiguous().t().contiguous().t(),
        wide[0, 0].expand(24, 130),
        wide[:, 0, :64].unsqueeze(-1).transpose(1, 2)[:, 0],
    ):
        both_ways(run, logits, targets, dloss, reduction="none", label_smoothing=0.1)
    apart = torch.stack((torch.zeros(24), wide[:, 0].float().logsumexp(1)), 1)[:, 1]
    args = dict(dloss=dloss.new_ones(()).expand(24), logits=wide[:, 0], targets=targets, lse=apart, reduction="none")
    check(NAMES[1], args, run(NAMES[1], args)[0])


def test_rows_2_to_the_31_apart(run, tmp_path):
    """Row offsets are computed in 64 bits. The sparse file has blocks only for the two rows."""
    file, far = tmp_path / "far", 2**31
    with file.open("wb") as f:
        f.truncate(2 * (far + 64))
    logits = torch.from_file(str(file), shared=True, size=far + 64, dtype=torch.bfloat16).as_strided((2, 64), (far, 1))
    logits.copy_(torch.randn(2, 64))
    targets = torch.tensor([5, 63])
    loss, lse = run(NAMES[0], dict(logits=logits, targets=targets))[0]
    near = logits.contiguous()
    args = dict(dloss=torch.ones(()), targets=targets, lse=lse)
    assert torch.equal(loss, run(NAMES[0], dict(logits=near, targets=targets))[0][0])
    assert torch.equal(run(NAMES[1], args | dict(logits=logits))[0], run(NAMES[1], args | dict(logits=near))[0])
    file.unlink()


@pytest.mark.parametrize("name", NAMES)
def test_bits_repeat(run, name):
    args = build(OPS[name], dict(R=67, V=5003, label_smoothing=0.1), torch.bfloat16)
    first, _ = run(name, args)
    for _ in range(2):
        again, _ = run(name, args)
        assert all(map(torch.equal, first, again)) if isinstance(first, tuple) else torch.equal(first, again)


def test_a_row_does_not_depend_on_its_batch(run):
    args = build(OPS[NAMES[0]], dict(R=9, V=1600, reduction="none", label_smoothing=0.1), torch.bfloat16)
    together, _ = run(NAMES[0], args)
    for r in (0, 4, 8):
        alone, _ = run(NAMES[0], args | dict(logits=args["logits"][r : r + 1], targets=args["targets"][r : r + 1]))
        for a, b in zip(alone, together):
            assert torch.equal(a, b[r : r + 1])
