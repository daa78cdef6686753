"""Prompt lookup: the tokens of plain decoding in fewer passes, and the drafts themselves."""

import json

import pytest
import torch

from gpt2fast import PromptLookup, cli, packed
from gpt2fast.config import Config
from gpt2fast.model import GPT2
from gpt2fast.registration import FLOATING

SIZES = dict(n_embd=48, n_layer=2, n_head=4, n_positions=128, vocab_size=97)


def make(weights: str | torch.dtype) -> GPT2:
    torch.manual_seed(0)
    model = GPT2(Config(**SIZES)).eval()
    if isinstance(weights, str):
        return packed.pack(model, weights)
    return model.to(weights)


def tokens(count: int = 9) -> torch.Tensor:
    """A text that repeats itself."""
    return torch.tensor([[5, 17, 23, 5, 17, 31, 5, 17, 23, 40, 5, 17][:count]])


OPTIONS = [
    dict(),
    dict(do_sample=True, seed=3),
    dict(do_sample=True, seed=3, temperature=0.3, top_k=5),
    dict(repetition_penalty=1.05),
    dict(do_sample=True, seed=1, temperature=0.2, repetition_penalty=1.02),
    dict(min_new_tokens=20, eos_token_id=[5]),
    dict(eos_token_id=list(range(0, 97, 7))),
]


@pytest.mark.parametrize("weights", [*FLOATING, "int8", "int4"], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("padded", (False, True))
def test_the_tokens_of_plain_decoding(weights, options, padded):
    model, mask = make(weights), torch.ones(1, 9, dtype=torch.int64)
    mask[0, :2] = 1 - padded
    options = dict(max_new_tokens=100, eos_token_id=[]) | options
    lookup = PromptLookup()
    found = model.generate(tokens(), mask, prompt_lookup=lookup, **options)
    assert torch.equal(found, model.generate(tokens(), mask, **options))
    new = found.shape[1] - 9
    assert lookup.passes <= new - 1 <= lookup.passes + lookup.accepted and lookup.accepted <= lookup.drafted


def test_text_that_repeats_takes_fewer_passes():
    """An untrained model says one token again and again. All drafts are accepted then."""
    lookup, model = PromptLookup(), make(torch.float32)
    out = model.generate(tokens(), max_new_tokens=100, eos_token_id=[], prompt_lookup=lookup)
    assert len(set(out[0, -50:].tolist())) < 10
    assert lookup.accepted > 60 and lookup.passes == 99 - lookup.accepted


@pytest.mark.parametrize("count", (1, 2, 3, 8, 119))
def test_no_more_tokens_than_asked_for(count):
    lookup = PromptLookup()
    out = make(torch.float32).generate(tokens(), max_new_tokens=count, eos_token_id=[], prompt_lookup=lookup)
    assert out.shape[1] == 9 + count


def test_streamer_and_stop_strings():
    """Each token comes by itself, and a stop string in the middle of a draft ends the text there."""

    class Streamer:
        def __init__(self):
            self.seen: list[list[int]] = []

        def put(self, value):
            self.seen.append(value.flatten().tolist())

        def end(self):
            self.seen.append([])

    class Letters:
        def decode(self, ids):
            return "".join(chr(40 + i) for i in ids)

    model = make(torch.float32)
    plain = model.generate(tokens(), max_new_tokens=60, eos_token_id=[])
    for end in (12, 20, 40):
        stop = Letters().decode(plain[0, end - 3 : end].tolist())
        options = dict(max_new_tokens=60, eos_token_id=[], stop_strings=stop, tokenizer=Letters())
        streamer = Streamer()
        found = model.generate(tokens(), prompt_lookup=PromptLookup(), streamer=streamer, **options)
        assert torch.equal(found, model.generate(tokens(), **options))
        assert streamer.seen == [tokens()[0].tolist(), *([t] for t in found[0, 9:].tolist()), []]


def test_drafts():
    lookup = PromptLookup(num_tokens=4)
    lookup.begin([1, 2, 3, 4, 5, 1, 2])
    assert lookup.draft(9) == [3, 4, 5, 1] and lookup.draft(2) == [3, 4] and lookup.draft(0) == []
    lookup.add(9)
    assert lookup.draft(9) == []  # (2, 9) is new
    lookup.begin([7, 7, 7])
    assert lookup.draft(9) == [7, 7, 7, 7]  # the text goes on as it repeats
    lookup.begin([1, 2, 3, 8, 2, 3, 9, 1, 2, 3])
    assert lookup.draft(1) == [8]  # the longest match counts, not the last one


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(num_tokens=8), "num_tokens must be an integer from 1 to 7, got 8"),
        (dict(num_tokens=0), "num_tokens must be an integer from 1 to 7, got 0"),
        (dict(num_tokens=2.0), "num_tokens must be an integer from 1 to 7, got 2.0"),
        (dict(least_matched=0), "least_matched must be an integer at least 1, got 0"),
        (dict(most_matched=1), "most_matched must be an integer at least 2, got 1"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(ValueError, match=said):
        PromptLookup(**options)


def test_bad_calls():
    model = make(torch.float32)
    with pytest.raises(ValueError, match="input_ids must be one row with prompt_lookup, got 2 rows"):
        model.generate(tokens().repeat(2, 1), prompt_lookup=PromptLookup())
    with pytest.raises(ValueError, match="prompt_lookup must be a PromptLookup, got int"):
        model.generate(tokens(), prompt_lookup=3)
    with pytest.raises(ValueError, match="cuda_graph must be None or False with prompt_lookup, got True"):
        model.generate(tokens(), prompt_lookup=PromptLookup(), cuda_graph=True)


def test_cache_takes_columns_back():
    model = make(torch.float32)
    cache, ids = model.new_cache(1), tokens(12)
    with torch.inference_mode():
        model(ids, cache=cache)
        cache.drop(5)
        assert cache.length == 7 and cache.lengths.tolist() == [7]
        found = model(ids[:, 7:], cache=cache)
        assert torch.equal(found, model(ids)[:, 7:])
    with pytest.raises(ValueError, match="drop takes back columns that are there, got 13 of 12"):
        cache.drop(13)


def test_the_command(capsys):
    args = ["generate", "import os\nimport sys\nimport os\n", "-n", "40", "--temperature", "0"]
    texts = []
    for more in ([], ["--prompt-lookup", "5"]):
        assert cli.main([*args, *more, "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0]["tokens"] == texts[1]["tokens"] and "prompt_lookup" not in texts[0]
    counts = texts[1]["prompt_lookup"]
    assert counts["passes"] + counts["accepted"] >= 39 and counts["accepted"] <= counts["drafted"]
    assert cli.main([*args, "--prompt-lookup", "5"]) == 0
    assert f"{counts['accepted']} of {counts['drafted']} drafted tokens accepted" in capsys.readouterr().err
    assert cli.main([*args, "--prompt-lookup", "9"]) == 1
    assert "num_tokens must be an integer from 1 to 7, got 9" in capsys.readouterr().err
