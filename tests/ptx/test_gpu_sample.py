"""Sampling on the PTX machine, in Triton and in CUDA C++: exactly the reference's tokens, with ties and any cuts.

The machine raises an error if a kernel breaks memcheck or racecheck, so that every launch here is a test of both.
"""

import itertools

import pytest
import torch
from both import kernels_of

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.op import OPS

POSITIONS = torch.arange(6) + 3
run = kernels_of("sample")


def both(run, logits, **options):
    """What the kernel draws, what the reference draws, and the kernel's launches."""
    args = dict(logits=logits, seed=torch.tensor([-77]), positions=POSITIONS[: len(logits)]) | options
    found, launches = run("sample", args)
    return found, OPS["sample"].reference(**args), launches


def random(V, seed=0, scale=3.0):
    return scale * torch.randn(6, V, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("V", (1, 2, 127, 4096, 4097, 9000))
@pytest.mark.parametrize("options", (dict(), dict(top_k=1), dict(top_k=5), dict(top_p=0.6), dict(min_p=0.1)), ids=str)
def test_ends_of_the_vocabulary(run, V, options):
    found, expected, _ = both(run, random(V, V), **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("seed", range(4))
def test_cuts_among_equal_scores(run, seed):
    """Logits with few values. Of equal scores, top-k keeps all, and top-p drops the first tokens. No top-p is exactly
    the sum of some shares."""
    logits = random(300, seed, 1.0).round()
    for top_k, top_p, min_p in itertools.product((0, 3, 40, 299), (1.0, 0.8731, 0.4517, 0.0713, 1e-6), (0.0, 0.3, 1.0)):
        found, expected, _ = both(run, logits, top_k=top_k, top_p=top_p, min_p=min_p)
        assert torch.equal(found, expected), (top_k, top_p, min_p)


def test_all_scores_equal_and_both_zeros(run):
    zeros = torch.zeros(6, 50)
    zeros[:, ::3] = -0.0
    for options in (dict(top_k=7), dict(top_p=0.3137), dict(top_p=1e-9), dict()):
        found, expected, _ = both(run, zeros, **options)
        assert torch.equal(found, expected), options


def test_more_than_a_lane_each_for_top_k(run):
    for top_k in (512, 513, 4096, 4097, 8999):  # as many as a kernel has lanes, and more
        found, expected, _ = both(run, random(9000), top_k=top_k, temperature=5.0)
        assert torch.equal(found, expected), top_k


def test_tokens_that_cannot_be_drawn(run):
    logits = random(500)
    logits[:, 10:] = float("-inf")
    for options in (dict(), dict(top_k=20), dict(top_p=0.95), dict(top_k=20, top_p=0.95, min_p=0.01)):
        found, expected, _ = both(run, logits, **options)
        assert torch.equal(found, expected) and int(found.max()) < 10, options


def test_temperatures_from_sharp_to_flat(run):
    for temperature in (1e-3, 0.5, 40.0):
        for options in (dict(), dict(top_k=9), dict(top_p=0.7)):
            found, expected, _ = both(run, random(700), temperature=temperature, **options)
            assert torch.equal(found, expected), (temperature, options)


def test_greedy_takes_the_first_of_the_greatest_and_nan_first_of_all(run):
    logits = random(5000).round()
    logits[1, 4500], logits[1, 77] = float("nan"), float("inf")
    logits[2] = float("-inf")
    args = dict(logits=logits, seed=torch.tensor([1]), positions=POSITIONS, temperature=0.0)
    found, _ = run("sample", args)
    assert torch.equal(found, logits.argmax(1)) and found[1] == 4500 and found[2] == 0


def test_penalty_of_tokens_that_came_twice_or_not_at_all(run):
    logits = random(5000)
    tokens = torch.randint(-1, 5000, (6, 300), generator=torch.Generator().manual_seed(1))
    tokens[:, 1] = tokens[:, 0] = logits.argmax(1)
    for penalty in (1.7, 0.6):
        for options in (dict(temperature=0.0), dict(top_k=4), dict()):
            found, expected, launches = both(run, logits, tokens=tokens, repetition_penalty=penalty, **options)
            assert torch.equal(found, expected), (penalty, options)
            assert len(launches) == 2


def test_a_row_does_not_depend_on_its_batch(run):
    logits, rows = random(700), torch.tensor([4, 2, 9, 0, 7, 5])
    together, expected, _ = both(run, logits, rows=rows, top_p=0.9, temperature=2.0)
    assert torch.equal(together, expected)
    for b in range(6):
        alone, *_ = both(
            run, logits[b : b + 1], rows=rows[b : b + 1], top_p=0.9, temperature=2.0, positions=POSITIONS[b, None]
        )
        assert alone[0] == together[b]


def test_what_is_drawn_follows_the_probabilities(run):
    """4000 draws of seven tokens. A chi-squared sum with 6 degrees of freedom is above 35 once in 200000 times."""
    p = torch.tensor([0.02, 0.05, 0.08, 0.1, 0.15, 0.2, 0.4])
    args = dict(logits=p.log().expand(4000, 7), seed=torch.tensor([5]), positions=torch.arange(4000))
    drawn, _ = run("sample", args)
    counts = drawn.bincount(minlength=7)
    assert ((counts - 4000 * p).square() / (4000 * p)).sum() < 35


KINDS = (dict(), dict(temperature=0.0), dict(top_k=9), dict(top_p=0.8, min_p=0.01))


@pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, torch.float16), ids=("float32", "bfloat16", "float16")
)
def test_a_first_logit_of_any_alignment(run, dtype):
    for first in range(0, 19, 3):
        memory = random(2311, first).to(dtype).reshape(-1)
        for logits in (memory[first:][: 5 * 2311].view(5, 2311), memory.view(6, 2311)[:5, first : first + 2011]):
            for options in KINDS:
                found, expected, _ = both(run, logits, **options)
                assert torch.equal(found, expected), (first, options)


def test_strides(run):
    wide, tokens = random(1400), torch.randint(-1, 700, (6, 40), generator=torch.Generator().manual_seed(2))
    for options in KINDS:
        options = options | dict(tokens=tokens[:, ::2], repetition_penalty=1.4)
        for logits in (wide[:, ::2], wide[:, :700], wide[0, :700].expand(6, 700), wide[:, 3:703].t().contiguous().t()):
            found, expected, _ = both(run, logits, **options)
            assert torch.equal(found, expected), options
        found, expected, _ = both(run, wide[:, :700], **options | dict(tokens=tokens[:, 5:9]))
        assert torch.equal(found, expected), options


def test_rows_2_to_the_31_apart(run, tmp_path):
    """Row offsets are computed in 64 bits. The sparse file has blocks only for the two rows."""
    file, far = tmp_path / "far", 2**31
    with file.open("wb") as f:
        f.truncate(2 * (far + 64))
    logits = torch.from_file(str(file), shared=True, size=far + 64, dtype=torch.bfloat16).as_strided((2, 64), (far, 1))
    logits.copy_(random(64)[:2])
    for options in (*KINDS, dict(tokens=torch.tensor([[3, 4], [5, -1]]), repetition_penalty=1.2)):
        found, expected, _ = both(run, logits, **options)
        assert torch.equal(found, expected), options
    file.unlink()


def test_cuts_in_a_whole_vocabulary(run):
    logits = random(50257, 5)[:2]
    for top_k, top_p, temperature in itertools.product((0, 40, 700), (1.0, 0.95, 0.2), (0.7, 3.0)):
        found, expected, _ = both(run, logits, top_k=top_k, top_p=top_p, temperature=temperature, min_p=1e-4)
        assert torch.equal(found, expected), (top_k, top_p, temperature)


def test_no_row_and_no_earlier_token(run):
    for options in KINDS:
        options = options | dict(repetition_penalty=1.3)
        found, _, _ = both(run, random(70)[:0], tokens=torch.zeros(0, 3, dtype=torch.int64), **options)
        assert found.shape == (0,) and found.dtype == torch.int64
        found, expected, _ = both(run, random(70), tokens=torch.zeros(6, 0, dtype=torch.int64), **options)
        assert torch.equal(found, expected), options
