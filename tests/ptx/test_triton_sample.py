"""Sampling in Triton on the PTX machine: the reference's very tokens, ties, cuts of any size, what a row reads."""

import itertools

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.kernels import sample as kernels
from gpt2fast.op import OPS
from gpt2fast.testing import ptx

POSITIONS = torch.arange(6) + 3


def both(logits, **options):
    """What the kernel draws, and the reference."""
    args = dict(logits=logits, seed=torch.tensor([-77]), positions=POSITIONS[: len(logits)]) | options
    with ptx.machine() as machine:
        found = kernels.sample(**args)
    return found, OPS["sample"].reference(**args), machine.launches


def random(V, seed=0, scale=3.0):
    return scale * torch.randn(6, V, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("V", (1, 2, 127, 4096, 4097, 9000))
@pytest.mark.parametrize("options", (dict(), dict(top_k=1), dict(top_k=5), dict(top_p=0.6), dict(min_p=0.1)), ids=str)
def test_ends_of_the_vocabulary(V, options):
    found, expected, _ = both(random(V, V), **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("seed", range(4))
def test_cuts_among_equal_scores(seed):
    """Logits of few values: of equal scores top-k keeps all, top-p drops the first tokens. No share is hit exactly."""
    logits = random(300, seed, 1.0).round()
    for top_k, top_p, min_p in itertools.product((0, 3, 40, 299), (1.0, 0.8731, 0.4517, 0.0713, 1e-6), (0.0, 0.3, 1.0)):
        found, expected, _ = both(logits, top_k=top_k, top_p=top_p, min_p=min_p)
        assert torch.equal(found, expected), (top_k, top_p, min_p)


def test_all_scores_equal_and_both_zeros():
    zeros = torch.zeros(6, 50)
    zeros[:, ::3] = -0.0
    for options in (dict(top_k=7), dict(top_p=0.3137), dict(top_p=1e-9), dict()):
        found, expected, _ = both(zeros, **options)
        assert torch.equal(found, expected), options


def test_more_than_a_lane_each_for_top_k():
    for top_k in (kernels.BLOCK, kernels.BLOCK + 1, 8999):
        found, expected, _ = both(random(9000), top_k=top_k, temperature=5.0)
        assert torch.equal(found, expected), top_k


def test_tokens_that_cannot_be_drawn():
    logits = random(500)
    logits[:, 10:] = float("-inf")
    for options in (dict(), dict(top_k=20), dict(top_p=0.95), dict(top_k=20, top_p=0.95, min_p=0.01)):
        found, expected, _ = both(logits, **options)
        assert torch.equal(found, expected) and int(found.max()) < 10, options


def test_temperatures_from_sharp_to_flat():
    for temperature in (1e-3, 0.5, 40.0):
        for options in (dict(), dict(top_k=9), dict(top_p=0.7)):
            found, expected, _ = both(random(700), temperature=temperature, **options)
            assert torch.equal(found, expected), (temperature, options)


def test_greedy_takes_the_first_of_the_greatest_and_nan_first_of_all():
    logits = random(5000).round()
    logits[1, 4500], logits[1, 77] = float("nan"), float("inf")
    logits[2] = float("-inf")
    with ptx.machine():
        found = kernels.sample(logits, torch.tensor([1]), POSITIONS, temperature=0.0)
    assert torch.equal(found, logits.argmax(1)) and found[1] == 4500 and found[2] == 0


def test_penalty_of_tokens_that_came_twice_or_not_at_all():
    logits = random(5000)
    tokens = torch.randint(-1, 5000, (6, 300), generator=torch.Generator().manual_seed(1))
    tokens[:, 1] = tokens[:, 0] = logits.argmax(1)
    for penalty in (1.7, 0.6):
        for options in (dict(temperature=0.0), dict(top_k=4), dict()):
            found, expected, launches = both(logits, tokens=tokens, repetition_penalty=penalty, **options)
            assert torch.equal(found, expected), (penalty, options)
            assert len(launches) == 2


def test_a_row_does_not_depend_on_its_batch():
    logits, rows = random(700), torch.tensor([4, 2, 9, 0, 7, 5])
    together, expected, _ = both(logits, rows=rows, top_p=0.9, temperature=2.0)
    assert torch.equal(together, expected)
    for b in range(6):
        alone, *_ = both(
            logits[b : b + 1], rows=rows[b : b + 1], top_p=0.9, temperature=2.0, positions=POSITIONS[b, None]
        )
        assert alone[0] == together[b]


def test_what_is_drawn_follows_the_probabilities():
    """4000 draws of seven tokens: a chi-squared sum of 6 degrees of freedom, above 35 once in 200000 times."""
    p = torch.tensor([0.02, 0.05, 0.08, 0.1, 0.15, 0.2, 0.4])
    with ptx.machine():
        drawn = kernels.sample(p.log().expand(4000, 7), torch.tensor([5]), torch.arange(4000))
    counts = drawn.bincount(minlength=7)
    assert ((counts - 4000 * p).square() / (4000 * p)).sum() < 35


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_bytes(dtype):
    """A pass for the greatest, two for the draw or one for the list of those that may survive; none for any bit."""
    V = 12 * kernels.BLOCK  # whole tiles
    logits = random(V, scale=4.0).to(dtype)[:2].contiguous()
    size = 2 * V * dtype.itemsize
    for options, passes in ((dict(temperature=0.0), 1), (dict(), 3), (dict(top_k=50), 2), (dict(top_p=0.9), 2)):
        *_, (launch,) = both(logits, **options)
        read = launch.per_buffer["logits_ptr"]
        assert read["read_bytes"] == passes * size and read["read_sectors"] * 32 == passes * size, options
        if not ("top_k" in options or "top_p" in options):  # a list's last tile is read number by number
            assert not {place: why for place, why in launch.inefficient().items() if "global load" in why}
        if "top_k" in options:
            assert launch.per_buffer["ids_ptr"]["written_bytes"] < 2 * 4 * 200  # few more than 50 are listed
        for target in ("sm_80", "sm_90", "sm_100"):
            assert launch.resources(target).spill_stores == 0
