"""Input that the drop-in refuses by name before it computes anything, and input that looks wrong but is not."""

import pytest
import torch
from hf_models import Trio, one_thread, padded, same, tokens, trio  # noqa: F401
from transformers import DynamicCache, StaticCache

from gpt2fast import ops
from gpt2fast.testing import assert_close_to_truth

IDS = tokens()
EMBEDS = torch.randn(3, 9, 64, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def models() -> Trio:
    return trio()


@pytest.fixture
def computing(monkeypatch):
    """Fails if any product is computed."""
    monkeypatch.setattr(ops, "linear", lambda *a, **k: pytest.fail("computed before the check"))


def numbers(value: float) -> torch.Tensor:
    return torch.full((3, 9), value, dtype=torch.int64)


MASK = r"attention_mask must have shape \(B, S\) = \(3, 9\), got "
GENERATED = r"gpt2fast.generate: attention_mask must be of shape \(3, 9\), got "
TOKENS, POSITIONS = r"tokens must lie in \[0, 211\)", r"positions must lie in \[0, 48\)"
FORWARD = {
    "no token": (dict(input_ids=IDS[:, :0]), ValueError, r"at least one token a row, got shape \(3, 0\)"),
    "no embedding": (dict(inputs_embeds=EMBEDS[:, :0]), ValueError, r"at least one token a row, got shape \(3, 0\)"),
    "a short mask": (dict(attention_mask=padded()[:, :5]), ValueError, MASK + r"\(3, 5\)"),
    "a long mask": (dict(attention_mask=padded(3, 12)), ValueError, MASK + r"\(3, 12\)"),
    "a mask of fewer rows": (dict(attention_mask=padded()[:2]), ValueError, MASK + r"\(2, 9\)"),
    "a mask of one row": (dict(attention_mask=padded()[0]), ValueError, MASK + r"\(9,\)"),
    "a negative token": (dict(input_ids=numbers(-1)), ValueError, TOKENS + r", got -1 at \(0, 0\)"),
    "a token beyond": (dict(input_ids=numbers(211)), ValueError, TOKENS + r", got 211 at \(0, 0\)"),
    "tokens in floating point": (dict(input_ids=IDS.float()), TypeError, "tokens must have dtype int64, got float32"),
    "a token type beyond": (dict(token_type_ids=numbers(300)), ValueError, r"token_types must lie in \[0, 211\)"),
    "too many tokens": (dict(input_ids=tokens(1, 49)), ValueError, POSITIONS + ", got start = 0 and T = 49"),
    "too many embeddings": (dict(inputs_embeds=torch.zeros(1, 49, 64)), ValueError, POSITIONS + ", got 48"),
    "a position beyond": (dict(position_ids=numbers(48)), ValueError, POSITIONS + r", got 48 at \(0, 0\)"),
    "a negative position": (dict(position_ids=numbers(-1)), ValueError, POSITIONS + r", got -1 at \(0, 0\)"),
    "too few positions": (dict(position_ids=IDS[:1, :5]), ValueError, r"positions must have shape .* got \(1, 5\)"),
}  # fmt: skip
GENERATE = {
    "no token": (dict(inputs=IDS[:, :0]), ValueError, r"at least one token a row, got shape \(3, 0\)"),
    "no token, by name": (dict(input_ids=IDS[:, :0], inputs=None), ValueError, "at least one token a row"),
    "no row": (dict(inputs=IDS[:0]), ValueError, "at least one token in at least one row"),
    "a short mask": (dict(attention_mask=padded()[:, :5]), ValueError, GENERATED + r"\(3, 5\)"),
    "a long mask": (dict(attention_mask=padded(3, 12)), ValueError, GENERATED + r"\(3, 12\)"),
    "a mask of fewer rows": (dict(attention_mask=padded()[:2]), ValueError, GENERATED + r"\(2, 9\)"),
    "a mask of one row": (dict(attention_mask=padded()[0]), ValueError, GENERATED + r"\(9,\)"),
    "a negative token": (dict(inputs=numbers(-1)), ValueError, r"tokens in \[0, vocab_size = 211\), got -1"),
    "a token beyond": (dict(inputs=numbers(211)), ValueError, r"tokens in \[0, vocab_size = 211\), got 211"),
    "a token beyond, in beams": (dict(inputs=numbers(211), num_beams=2), ValueError, TOKENS),
    "tokens in floating point": (dict(inputs=IDS.float()), TypeError, "dtype int64, got float32"),
    "too long a prompt": (dict(inputs=tokens(1, 49)), ValueError, POSITIONS),
    "too long a prompt, in beams": (dict(inputs=tokens(1, 49), num_beams=2), ValueError, POSITIONS),
    "a position beyond": (dict(position_ids=numbers(48)), ValueError, POSITIONS),
    "temperature of 0": (dict(do_sample=True, temperature=0.0), ValueError, "temperature"),
    "a negative top_p": (dict(do_sample=True, top_p=-0.5), ValueError, "top_p"),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_refuses(models, name, computing):
    change, error, message = FORWARD[name]
    given = dict() if "inputs_embeds" in change else dict(input_ids=IDS)
    with pytest.raises(error, match=message):
        models.ours(**(given | change))


@pytest.mark.parametrize("name", GENERATE)
def test_generate_refuses(models, name, computing):
    change, error, message = GENERATE[name]
    with pytest.raises(error, match=message):
        models.ours.generate(**(dict(inputs=IDS, do_sample=False, max_new_tokens=3, pad_token_id=0) | change))


def test_the_position_beyond_the_last_is_refused_when_it_is_reached(models):
    """transformers begins such a text, since it may end early. So do we, and we say where it cannot go on."""
    options = dict(attention_mask=torch.ones(1, 40, dtype=torch.int64), max_new_tokens=20, do_sample=False)
    prompt = tokens(1, 40)
    with pytest.raises(ValueError, match=POSITIONS):
        models.ours.generate(prompt, **options, eos_token_id=None)
    third = models.plain.generate(prompt, **(options | dict(max_new_tokens=3)), eos_token_id=None)[0, -1].item()
    found = [m.generate(prompt, **options, eos_token_id=third, pad_token_id=0) for m in models[:2]]
    assert torch.equal(*found) and found[1].shape[1] <= 43


def test_padding_counts_no_positions(models):
    """A padded prompt that is wider than n_positions, though no row of it is too long."""
    ids, mask = torch.cat([torch.zeros(3, 45, dtype=torch.int64), IDS], 1), torch.ones(3, 54, dtype=torch.int64)
    mask[:, :45] = 0
    found = [
        m.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in models[:2]
    ]
    assert torch.equal(*found)
    assert torch.equal(found[1][:, 54:], models.ours.generate(IDS, max_new_tokens=4, do_sample=False)[:, 9:])


def test_nan_logits_are_refused(models):
    broken = trio().ours
    broken.transformer.ln_f.weight.data[0] = torch.nan
    for sampled in (False, True):
        with pytest.raises(ValueError, match="logits must not hold NaN"):
            broken.generate(IDS, do_sample=sampled, max_new_tokens=2)


def test_a_mask_must_cover_the_cache(models):
    cache = DynamicCache(config=models.ours.config)
    with torch.no_grad():
        models.ours(IDS, past_key_values=cache)
        with pytest.raises(ValueError, match=r"\(B, S\) = \(3, 10\), got \(3, 1\)"):
            models.ours(IDS[:, :1], past_key_values=cache, attention_mask=padded(3, 1))
        assert cache.get_seq_length() == 9
        static = StaticCache(config=models.ours.config, max_cache_len=12)
        with pytest.raises(ValueError, match=r"\(3, 9\) to \(3, 12\), got \(3, 13\)"):
            models.ours(IDS, past_key_values=static, attention_mask=padded(3, 13))


@pytest.mark.parametrize("columns", (9, 11, 12))
def test_a_static_cache_takes_a_mask_of_up_to_its_room(models, columns):
    mask = torch.cat([padded(), torch.ones(3, columns - 9, dtype=torch.int64)], 1)
    with torch.no_grad():
        outputs = [
            m(IDS, past_key_values=StaticCache(config=m.config, max_cache_len=12), attention_mask=mask).logits
            for m in models
        ]
    assert torch.equal(outputs[1], models.ours(IDS, attention_mask=padded()).logits)
    assert_close_to_truth(outputs[1], outputs[0], outputs[2])


def test_one_row_takes_a_mask_without_a_batch(models):
    same(models, IDS[1:2], attention_mask=padded()[1])
