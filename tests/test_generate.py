"""Generation: it gives transformers' texts; padding, ends, stop strings, streamers, seeds, and refused arguments."""

from types import SimpleNamespace

import pytest
import torch
from greedy import reference_model
from transformers import GPT2LMHeadModel

import gpt2fast
from gpt2fast.decoding import Turns
from gpt2fast.model import GPT2
from gpt2fast.step import Step


@pytest.fixture(scope="module")
def model() -> GPT2:
    return GPT2.from_transformers(reference_model())


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 331, shape, generator=torch.Generator().manual_seed(seed))


def padded(right: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = tokens(3, 9, seed=3), torch.ones(3, 9, dtype=torch.int64)
    for row, count in ((0, 4), (2, 7)):
        hidden = slice(9 - count, 9) if right else slice(0, count)
        ids[row, hidden], mask[row, hidden] = 0, 0
    return ids, mask


@pytest.mark.parametrize("options", [
    dict(repetition_penalty=1.7),
    dict(eos_token_id=[5, *range(100, 200)], pad_token_id=7),
    dict(eos_token_id=[5, *range(100, 200)], pad_token_id=7, min_new_tokens=6),
    dict(eos_token_id=list(range(1, 331)), pad_token_id=0),
])  # fmt: skip
def test_options_mean_what_they_mean_in_transformers(model, options):
    ids, mask = padded()
    want = reference_model().generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **options)
    assert torch.equal(model.generate(ids, mask, max_new_tokens=12, **options), want)


def test_right_padding_is_hidden_as_in_transformers_with_a_warning(model):
    ids, mask = padded(right=True)
    want = reference_model().generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    with pytest.warns(UserWarning, match="pad on the left"):
        assert torch.equal(model.generate(ids, mask, max_new_tokens=8), want)


def test_a_mask_with_holes_is_kept_through_decoding(model):
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, 3:5] = mask[1, :2] = mask[1, 6] = 0
    want = reference_model().generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, mask, max_new_tokens=8), want)


def test_seeds(model):
    ids = tokens(2, 5).repeat(2, 1)
    options = dict(max_new_tokens=16, do_sample=True, temperature=1.3, eos_token_id=[])
    first = model.generate(ids, seed=3, **options)
    assert torch.equal(first, model.generate(ids, seed=torch.tensor([3]), **options))
    assert not torch.equal(first, model.generate(ids, seed=4, **options))
    assert not torch.equal(first[0], first[2]), "rows of one prompt must differ"
    torch.manual_seed(5)
    drawn = model.generate(ids, **options)
    torch.manual_seed(5)
    assert torch.equal(drawn, model.generate(ids, **options))
    assert not torch.equal(drawn, model.generate(ids, **options))


def test_a_draw_depends_on_the_row_and_its_tokens_not_on_padding(model):
    ids, mask = padded()
    options = dict(max_new_tokens=16, do_sample=True, seed=9, eos_token_id=[])
    together = model.generate(ids, mask, **options)
    alone = model.generate(ids[:1, 4:], **options)
    assert torch.equal(together[0, 4:], alone[0])


@pytest.mark.parametrize("options", [dict(top_k=3), dict(top_k=None, top_p=0.3), dict(top_k=0, min_p=0.5)])
def test_sampling_stays_among_the_tokens_that_transformers_leaves(model, options):
    from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    ids = tokens(1, 6).repeat(64, 1)
    logits = reference_model()(ids[:1]).logits[:, -1]
    if options["top_k"]:
        logits = TopKLogitsWarper(options["top_k"])(ids, logits)
    if "top_p" in options:
        logits = TopPLogitsWarper(options["top_p"])(ids, logits)
    if "min_p" in options:
        logits = MinPLogitsWarper(options["min_p"])(ids, logits)
    out = model.generate(ids, max_new_tokens=1, do_sample=True, seed=1, **options)
    allowed = set(logits[0].isfinite().nonzero().flatten().tolist())
    assert set(out[:, -1].tolist()) <= allowed and len(set(out[:, -1].tolist())) > min(len(allowed), 2) - 1


@pytest.mark.parametrize("mask", ("none", "left", "holes"))
@pytest.mark.parametrize(
    "options", [dict(), dict(do_sample=True, temperature=1.5, seed=7), dict(repetition_penalty=1.7)], ids=str
)
def test_rows_that_have_ended_leave_the_batch(model, options, mask, monkeypatch):
    """The others get the tokens that they would have got, and the model runs on fewer rows."""
    ids, seen = tokens(7, 6, seed=5), None if mask == "none" else torch.ones(7, 6, dtype=torch.int64)
    if seen is not None:
        seen[2, :3] = seen[5, 0] = 0
        seen[4, 2] = 1 if mask == "left" else 0
    options |= dict(max_new_tokens=20, pad_token_id=0)
    ends = {5, *range(60, 90)}
    want = model.generate(ids, seen, eos_token_id=[], **options)
    lengths = []
    for row in want:
        last = next((i for i in range(6, 26) if int(row[i]) in ends), 25)
        lengths.append(last + 1)
        row[last + 1 :] = 0
    running, draw = [], Turns._draw
    monkeypatch.setattr(Turns, "_draw", lambda self, x, *a: running.append(len(x)) or draw(self, x, *a))
    decode = Step.decode  # the draws in C++, one in a call because of the streamer
    monkeypatch.setattr(Step, "decode", lambda self, x, *a: running.append(len(x)) or decode(self, x, *a))
    taken = []
    streamer = SimpleNamespace(put=lambda t: taken.append(t), end=lambda: None)
    got = model.generate(ids, seen, eos_token_id=sorted(ends), streamer=streamer, **options)
    assert torch.equal(got, want[:, : max(lengths)])
    assert torch.equal(torch.stack(taken[1:], 1), got[:, 6:])
    alive = [sum(length > 6 + turn for length in lengths) for turn in range(max(lengths) - 6)]
    expected = [7]
    for count in alive[1:]:
        expected.append(count if 2 * count <= expected[-1] else expected[-1])
    assert running == expected and running[-1] < 7


def test_returns_a_tensor_that_training_can_use(model):
    out = model.generate(tokens(1, 4), max_new_tokens=2)
    assert out.dtype == torch.int64 and not out.is_inference()
    assert torch.equal(model.generate(tokens(1, 4), max_new_tokens=0), tokens(1, 4))


class Recorder:
    def __init__(self):
        self.got, self.ended = [], 0

    def put(self, value):
        self.got.append(value)

    def end(self):
        self.ended += 1


def test_streamer_gets_prompt_and_tokens(model):
    recorder = Recorder()
    out = model.generate(tokens(1, 4), max_new_tokens=6, streamer=recorder, eos_token_id=[])
    assert recorder.ended == 1 and [tuple(t.shape) for t in recorder.got] == [(1, 4)] + [(1,)] * 6
    assert torch.equal(torch.cat([t.flatten() for t in recorder.got]), out[0])


class Letters:
    """Token n is the text "<n>", except that tokens 1 and 2 are the two bytes of one character."""

    def decode(self, ids):
        return b"".join({1: b"\xc3", 2: b"\xa9"}.get(n, b"<%d>" % n) for n in ids).decode(errors="replace")


def test_stop_strings_end_a_row_when_they_are_complete(model):
    ids = tokens(1, 5)
    text = model.generate(ids, max_new_tokens=12, eos_token_id=[])[0, 5:].tolist()
    third = f"{text[2]}>"
    first = next(i for i, token in enumerate(text) if str(token).endswith(str(text[2])))
    out = model.generate(ids, max_new_tokens=12, eos_token_id=[], stop_strings=["nowhere", third], tokenizer=Letters())
    assert out[0, 5:].tolist() == text[: first + 1]
    both = tokens(2, 5)
    out = model.generate(both, max_new_tokens=12, pad_token_id=9, stop_strings=third, tokenizer=Letters())
    assert out.shape[0] == 2 and out[0, 5 + first + 1 :].eq(9).all()


@pytest.mark.parametrize("recent, ends", [
    ([7, 1, 2], True), ([7, 1], False), ([1, 2, 7], False), ([2], False),
])  # fmt: skip
def test_stop_strings_see_whole_characters(recent, ends):
    from gpt2fast.generate import Stops

    assert Stops("é", Letters()).ends(torch.tensor(recent)) is ends


BAD = {
    "no prompt": (dict(input_ids=torch.zeros(1, 0, dtype=torch.int64)), ValueError, "at least one token"),
    "no rows": (dict(input_ids=torch.zeros(0, 3, dtype=torch.int64)), ValueError, "at least one row"),
    "a list": (dict(input_ids=[[1]]), TypeError, "must be a tensor, got list"),
    "one dimension": (dict(input_ids=torch.tensor([1])), ValueError, r"shape \(B, T\), got \(1,\)"),
    "int32": (dict(input_ids=torch.ones(1, 3, dtype=torch.int32)), TypeError, "int64, got int32"),
    "negative": (dict(input_ids=torch.tensor([[1, -4]])), ValueError, "vocab_size = 331.*got -4"),
    "too large": (dict(input_ids=torch.tensor([[1, 331]])), ValueError, "vocab_size = 331.*got 331"),
    "device": (dict(input_ids=torch.ones(1, 3, device="meta").long()), ValueError, "on cpu as the model is, got meta"),
    "mask device": (
        dict(attention_mask=torch.ones(1, 4, device="meta").bool()),
        ValueError,
        "attention_mask must be on",
    ),
    "a count of text": (dict(max_new_tokens="3"), TypeError, "max_new_tokens must be an integer, got '3'"),
    "a broken count": (dict(min_new_tokens=2.5), TypeError, "min_new_tokens must be an integer, got 2.5"),
    "a broken top_k": (dict(do_sample=True, top_k=2.5), TypeError, "top_k must be an integer, got 2.5"),
    "a NaN for top_p": (dict(do_sample=True, top_p=float("nan")), ValueError, r"top_p must lie in \(0, 1\], got nan"),
    "mask size": (dict(attention_mask=torch.ones(1, 4)[:, :3].long()), ValueError, r"\(1, 4\), got \(1, 3\)"),
    "mask dtype": (dict(attention_mask=torch.ones(1, 4)), TypeError, "bools or integers, got float32"),
    "mask of zeros": (dict(attention_mask=torch.zeros(1, 4).bool()), ValueError, "zeros in row 0"),
    "too long": (dict(max_new_tokens=61), ValueError, r"n_positions = 64, got 4 \+ 61"),
    "negative count": (dict(max_new_tokens=-1), ValueError, "max_new_tokens must be at least 0"),
    "negative minimum": (dict(min_new_tokens=-1), ValueError, "min_new_tokens must be at least 0"),
    "temperature": (dict(do_sample=True, temperature=0.0), ValueError, "temperature must be above 0"),
    "top_p of 0": (dict(do_sample=True, top_p=0.0), ValueError, r"top_p must lie in \(0, 1\]"),
    "top_p above 1": (dict(do_sample=True, top_p=1.1), ValueError, r"top_p must lie in \(0, 1\]"),
    "top_k": (dict(do_sample=True, top_k=-1), ValueError, "top_k must be at least 0"),
    "min_p": (dict(do_sample=True, min_p=1.5), ValueError, r"min_p must lie in \[0, 1\]"),
    "penalty": (dict(repetition_penalty=0.0), ValueError, "repetition_penalty must be above 0"),
    "eos": (dict(eos_token_id="x"), ValueError, "eos_token_id must be an integer"),
    "seed dtype": (dict(seed=torch.ones(1)), TypeError, "seed must be one int64"),
    "seed size": (dict(seed=2**63), ValueError, "64 bits"),
    "stop without tokenizer": (dict(stop_strings="x"), ValueError, "tokenizer must be given"),
    "empty stop": (dict(stop_strings=[""], tokenizer=Letters()), ValueError, "non-empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_computed(model, name, monkeypatch):
    change, error, message = BAD[name]
    monkeypatch.setattr(gpt2fast.ops, "linear", lambda *a, **k: pytest.fail("computed before the check"))
    with pytest.raises(error, match=message):
        model.generate(**(dict(input_ids=tokens(1, 4)) | change))


def test_nan_logits_are_refused():
    broken = GPT2LMHeadModel(reference_model().config)
    broken.transformer.ln_f.weight.data[0] = torch.nan
    for sampled in (False, True):
        with pytest.raises(ValueError, match="logits must not hold NaN"):
            GPT2.from_transformers(broken).generate(tokens(1, 4), do_sample=sampled)


@pytest.mark.parametrize("options", [dict(), dict(do_sample=True), dict(repetition_penalty=1.2)], ids=str)
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_nan_logits_of_later_tokens_are_refused(value, options):
    """They are drawn in one call of C++, which must look at the logits as the op does."""
    broken = GPT2LMHeadModel(reference_model().config)
    broken.transformer.wpe.weight.data[7] = value
    found = GPT2.from_transformers(broken)
    assert found.generate(tokens(2, 4), max_new_tokens=4, eos_token_id=[], **options).shape == (2, 8)
    with pytest.raises(ValueError, match="gpt2fast::sample: logits must not hold NaN"):
        found.generate(tokens(2, 4), max_new_tokens=8, eos_token_id=[], **options)


def test_odd_tokens_that_end(model):
    """None of these can be drawn, so that none has an effect."""
    plain = model.generate(tokens(2, 5), max_new_tokens=6, eos_token_id=[])
    assert torch.equal(model.generate(tokens(2, 5), max_new_tokens=6, eos_token_id=[-3, 2**70, 10**6]), plain)
    with pytest.raises(TypeError, match="pad_token_id must be an integer, got 0.5"):
        model.generate(tokens(2, 5), pad_token_id=0.5)


def test_generates_off_the_kernels_too(model):
    """The reference sees the whole cache, including the part that nothing has written."""
    input_ids = tokens(2, 5)
    expected = model.generate(input_ids, max_new_tokens=6, eos_token_id=[])
    with gpt2fast.use_backend("reference"):
        assert torch.equal(model.generate(input_ids, max_new_tokens=6, eos_token_id=[]), expected)
    double = GPT2.from_state(model.config, {n: p.detach().double() for n, p in model.state_dict().items()})
    assert torch.equal(double.generate(input_ids, max_new_tokens=6, eos_token_id=[]), expected)
