"""generate on the drop-in gives what transformers gives. The native loop runs if it can, else that of transformers."""

import copy
import gc
import logging
import weakref

import pytest
import torch
import transformers
from hf_models import Trio, compare, one_thread, padded, tokens, trio  # noqa: F401
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

import gpt2fast
from gpt2fast.hf import generation

IDS = tokens()


@pytest.fixture(scope="module")
def models():
    found = trio()
    for model in found:
        model.generation_config.pad_token_id = 0
    return found


@pytest.fixture(autouse=True)
def forget_what_was_said():
    generation._say_once.cache_clear()


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE without merges: each byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:209]
    vocabulary = {"<pad>": 0, "<end>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    made = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


def reasons(caplog) -> list[str]:
    return [record.getMessage().rsplit(": ", 1)[1] for record in caplog.records if record.name == "gpt2fast"]


NATIVE = {
    "plain": dict(),
    "mask": dict(attention_mask=padded()),
    "two ends": dict(eos_token_id=[5, 7, 9, 150, 160, 170], pad_token_id=3),
    "no end": dict(eos_token_id=None),
    "max_length": dict(max_length=14, max_new_tokens=None),
    "min_new_tokens": dict(min_new_tokens=6, eos_token_id=list(range(2, 120))),
    "min_length": dict(min_length=13, eos_token_id=list(range(2, 120))),
    "repetition penalty": dict(repetition_penalty=1.4),
    "repetition penalty, mask": dict(repetition_penalty=1.4, attention_mask=padded()),
    "repetition reward": dict(repetition_penalty=0.7),
    "two of each": dict(num_return_sequences=1),
}
THEIRS = {
    "beam search is asked for": dict(num_beams=3),
    "max_time": dict(max_time=100.0),
    "stopping criterion Own": dict(stopping_criteria="own"),
    "logits processor Own": dict(logits_processor="own"),
    "logits processor NoRepeatNGramLogitsProcessor": dict(no_repeat_ngram_size=2),
    "logits processor NoBadWordsLogitsProcessor": dict(bad_words_ids=[[5], [6, 7]]),
    "return_dict_in_generate is set": dict(return_dict_in_generate=True, output_scores=True),
    "a repetition penalty that leaves out more": dict(logits_processor="penalty"),
    "use_cache is off": dict(use_cache=False),
    "cache_implementation is set": dict(cache_implementation="static", disable_compile=True),
    "prefill_chunk_size is set": dict(prefill_chunk_size=4),
    "position_ids are given": dict(position_ids=torch.arange(3, 12)[None]),
    "token_type_ids is given": dict(token_type_ids=IDS),
    "beams with sampling": dict(num_beams=2, num_return_sequences=2),
    "prompt and new tokens exceed n_positions": dict(max_new_tokens=45, eos_token_id=list(range(2, 211))),
    "assisted decoding is asked for": dict(prompt_lookup_num_tokens=2),
}


class Own:
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 12)


class OwnOrder:
    def __call__(self, input_ids, scores):
        return scores.flip(-1)


@pytest.mark.parametrize("name", NATIVE)
def test_native_loop(models, name, caplog):
    options = dict(do_sample=False, max_new_tokens=10) | NATIVE[name]
    expected = models.plain.generate(IDS, **options)
    assert torch.equal(models.ours.generate(IDS, **options), expected)
    assert reasons(caplog) == []


@pytest.mark.parametrize("name", THEIRS)
def test_their_loop_says_why_once(models, name, caplog):
    options = dict(do_sample=False, max_new_tokens=10) | THEIRS[name]
    ids = IDS[:1] if "assisted" in name else IDS
    if "stopping_criteria" in options:
        options["stopping_criteria"] = StoppingCriteriaList([Own()])
    if "logits_processor" in options:
        penalty = RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=9)
        options["logits_processor"] = LogitsProcessorList(
            [OwnOrder() if options["logits_processor"] == "own" else penalty]
        )
    expected = models.plain.generate(ids, **options)
    for _ in range(2):
        found = models.ours.generate(ids, **options)
        if not isinstance(found, torch.Tensor):
            assert torch.equal(found.sequences, expected.sequences) and len(found.scores) == len(expected.scores)
        else:
            assert torch.equal(found, expected)
    said = reasons(caplog)
    assert len(said) == 1
    assert name in said[0] or name in ("max_time", "beams with sampling")


def test_stop_strings_in_a_batch(models, tokenizer, caplog):
    """The native loop fills up rows that have stopped. Without an end token they go on in transformers' loop."""
    prompts = tokenizer(["ab", "hello you", "x = 1"], return_tensors="pt", padding=True)
    options = dict(max_new_tokens=12, do_sample=False, tokenizer=tokenizer)
    texts = tokenizer.batch_decode(models.plain.generate(**prompts, **options)[:, 9:])
    stops = [next(c for c in text[row + 1 :] if c != "\ufffd") for row, text in enumerate(texts)]
    fallback = "stop strings for several rows without an eos_token_id"
    for more, said in ((dict(), []), (dict(eos_token_id=None), [fallback])):
        found = [m.generate(**prompts, **options, **more, stop_strings=stops) for m in models[:2]]
        assert torch.equal(*found)
        assert reasons(caplog) == said
        assert found[0].shape[1] < 9 + 12, "nothing was stopped"
    caplog.clear()
    one = dict(input_ids=prompts["input_ids"][1:2], attention_mask=prompts["attention_mask"][1:2], eos_token_id=None)
    assert torch.equal(*(m.generate(**one, **options, stop_strings=stops) for m in models[:2]))
    assert reasons(caplog) == []


def test_int32_tokens(models, caplog):
    ids = IDS.int()
    assert torch.equal(
        models.ours(ids, attention_mask=padded()).logits, models.ours(IDS, attention_mask=padded()).logits
    )
    options = dict(attention_mask=padded().int(), max_new_tokens=6, do_sample=False)
    expected = models.plain.generate(ids, **options)
    found = models.ours.generate(ids, **options)
    assert torch.equal(found, expected)
    assert reasons(caplog) == []


def test_generate_sees_the_weights_as_they_are_now(models):
    ours = copy.deepcopy(models.ours)

    def generates() -> torch.Tensor:
        out = ours.generate(IDS, max_new_tokens=6, do_sample=False)
        logits = ours(out).logits
        assert torch.equal(logits[0, 8:-1].argmax(-1), out[0, 9:])
        return out

    generates()
    generates()
    with torch.no_grad():
        ours.transformer.h[0].mlp.c_fc.weight.mul_(3)
    generates()
    ours.transformer.ln_f.weight.data = ours.transformer.ln_f.weight.data.flip(0)
    generates()
    ours.transformer.ln_f.weight = torch.nn.Parameter(ours.transformer.ln_f.weight.detach().flip(0))
    generates()
    ours.load_state_dict(models.plain.state_dict())
    generates()
    ours.load_state_dict(models.truth.float().state_dict(), assign=True)
    ours.tie_weights()
    generates()
    models.truth.double()
    ours.lm_head.weight = torch.nn.Parameter(ours.lm_head.weight.detach() * 2)
    generates()
    ours.to(torch.bfloat16)
    ours.generate(IDS, max_new_tokens=1, do_sample=False)


def test_generate_runs_the_model_s_own_modules(models):
    ours = copy.deepcopy(models.ours)
    ours.generate(IDS, max_new_tokens=1, do_sample=False)
    bare = generation._bare[ours]
    assert bare.h is ours.transformer.h and bare.wte is ours.transformer.wte and bare.ln_f is ours.transformer.ln_f


def test_generate_does_not_keep_its_model_alive(models):
    ours = copy.deepcopy(models.ours)
    ours.generate(IDS, max_new_tokens=1, do_sample=False)
    count, key = len(generation._bare), weakref.ref(ours)
    del ours
    gc.collect()
    assert key() is None and len(generation._bare) == count - 1


def test_no_prompt_and_embedded_prompts(models):
    assert torch.equal(*(m.generate(max_new_tokens=6, do_sample=False) for m in models[:2]))
    embeds = models.plain.transformer.wte(IDS).detach()
    assert torch.equal(*(m.generate(inputs_embeds=embeds, max_new_tokens=6, do_sample=False) for m in models[:2]))


def test_continuing_a_cache(models):
    found = []
    for model in models[:2]:
        cache = DynamicCache(config=model.config)
        first = model.generate(IDS, past_key_values=cache, max_new_tokens=4, do_sample=False)
        found.append(model.generate(first, past_key_values=cache, max_new_tokens=4, do_sample=False))
    assert torch.equal(*found)
    assert torch.equal(found[1], models.ours.generate(IDS, max_new_tokens=8, do_sample=False))


def test_a_cropped_cache(models):
    """A cache grows, goes back to an earlier length, and goes on from there, as in speculative decoding."""
    models = Trio(*models)
    caches = [DynamicCache(config=models.plain.config) for _ in models]
    with torch.no_grad():
        for ids, surplus in ((IDS, 4), (IDS[:, 5:7], 1), (IDS[:, :1], 0)):
            compare(*(m(ids, past_key_values=c) for m, c in zip(models, caches)))
            for cache in caches:
                cache.crop(-surplus)
    found = []
    for model, cache in zip(models[:2], caches):
        assert cache.get_seq_length() == 7
        known = torch.cat([IDS[:, :6], IDS[:, :1], IDS[:, 8:]], 1)
        found.append(model.generate(known, past_key_values=cache, max_new_tokens=5, do_sample=False))
    assert torch.equal(*found)
    assert torch.equal(found[1], models.ours.generate(known, max_new_tokens=5, do_sample=False))


def test_hooks_and_training_mode_go_through_modules(models, caplog):
    ours = copy.deepcopy(models.ours)
    calls = []
    handle = ours.transformer.h[1].mlp.register_forward_hook(lambda *args: calls.append(1))
    expected = models.plain.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(ours.generate(IDS, max_new_tokens=5, do_sample=False), expected)
    assert len(calls) == expected.shape[1] - IDS.shape[1]
    handle.remove()
    ours.train().generate(IDS, max_new_tokens=2, do_sample=False)
    assert reasons(caplog) == ["it has a forward hook", "dropout is active"]


def test_result_can_be_trained_on(models):
    ours = copy.deepcopy(models.ours)
    out = ours.generate(IDS, max_new_tokens=5, do_sample=True)
    ours(out, labels=out).loss.backward()
    assert ours.transformer.wte.weight.grad.abs().sum() > 0
    with torch.no_grad():
        ours.transformer.h[0].mlp.c_fc.weight.mul_(3)  # generate sees the weights as they are now
    assert not torch.equal(
        ours.generate(IDS, max_new_tokens=5, do_sample=False),
        models.ours.generate(IDS, max_new_tokens=5, do_sample=False),
    )


SAMPLING = {
    "defaults": dict(),
    "temperature": dict(temperature=0.6, top_k=0),
    "top_k": dict(top_k=5),
    "top_p": dict(top_p=0.7, top_k=0),
    "min_p": dict(min_p=0.2, top_k=0),
    "all": dict(temperature=1.4, top_k=40, top_p=0.95, min_p=0.02, repetition_penalty=1.5),
}


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_distribution(models, name, caplog):
    """The next token after one prompt: a chi-squared test of 4000 draws against transformers' own probabilities."""
    options = dict(do_sample=True, max_new_tokens=1) | SAMPLING[name]
    wanted = models.truth.generate(
        IDS[:1].clone(), return_dict_in_generate=True, output_scores=True, **options
    ).scores[0][0].double().softmax(-1)  # fmt: skip
    torch.manual_seed(0)
    drawn = models.ours.generate(IDS[:1], num_return_sequences=4000, **options)[:, -1]
    counts = torch.bincount(drawn, minlength=211).double()
    assert not counts[wanted == 0].any()
    expected = 4000 * wanted
    common = expected >= 5
    cells = torch.cat([counts[common], counts[~common].sum()[None]])
    means = torch.cat([expected[common], expected[~common].sum()[None]])
    cells, means = cells[means > 0], means[means > 0]
    freedom = len(cells) - 1
    statistic = ((cells - means) ** 2 / means).sum().item() if freedom else 0.0
    # Wilson and Hilferty: the cube root is near normal; 5 deviations
    if freedom:
        z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
        assert z < 5
    assert reasons(caplog) == []


def test_sampling_follows_manual_seed(models):
    def draw(seed):
        torch.manual_seed(seed)
        return models.ours.generate(IDS, do_sample=True, max_new_tokens=8)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_streamers_and_stop_strings(models, tokenizer, caplog, capsys):
    prompt = tokenizer("ab", return_tensors="pt")
    texts = []
    for model in models[:2]:
        out = model.generate(**prompt, max_new_tokens=12, do_sample=False, streamer=TextStreamer(tokenizer))
        texts.append((out.tolist(), capsys.readouterr().out))
    assert texts[0] == texts[1] and texts[0][1].startswith("ab")
    new = tokenizer.decode(texts[0][0][0][2:])
    stop = next(c for c in new[3:] if c != "\ufffd")
    found = [
        m.generate(**prompt, max_new_tokens=12, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
        for m in models[:2]
    ]
    assert torch.equal(*found) and found[1].shape[1] < 14
    later = TextIteratorStreamer(tokenizer, skip_prompt=True)
    models.ours.generate(**prompt, max_new_tokens=12, do_sample=False, streamer=later)
    assert "".join(later) == texts[1][1].rstrip("\n")[2:]
    assert reasons(caplog) == []


def test_pipeline(models, tokenizer):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    prompts = ["ab", "hello you"]
    results = []
    for model in models[:2]:
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        results.append(pipe(prompts, max_new_tokens=8, do_sample=False, batch_size=2))
    assert results[0] == results[1]
    assert results[1][1][0]["generated_text"].startswith("hello you")


def test_bfloat16(models):
    for dtype in (torch.bfloat16, torch.float16):
        ours = copy.deepcopy(models.ours).to(dtype)
        out = ours.generate(IDS, max_new_tokens=8, do_sample=False)
        rows = [ours.generate(IDS[i : i + 1], max_new_tokens=8, do_sample=False)[0] for i in range(3)]
        assert all(torch.equal(row, out[i, : len(row)]) for i, row in enumerate(rows))


def test_double_heads_generates(caplog):
    heads = trio("GPT2DoubleHeadsModel")
    assert isinstance(heads.ours, gpt2fast.GPT2DoubleHeadsModel)
    options = dict(attention_mask=padded(), max_new_tokens=6, do_sample=False, pad_token_id=0)
    before = [m.generate(IDS, **options) for m in heads[:2]]
    assert torch.equal(*before)
    heads.apply(lambda model: model.multiple_choice_head.register_forward_hook(lambda *args: None))
    assert torch.equal(*(m.generate(IDS, **options) for m in heads[:2]))
    heads.apply(lambda model: model.transformer.h[0].mlp.register_forward_hook(lambda m, a, out: out * 2))
    after = [m.generate(IDS, **options) for m in heads[:2]]
    assert torch.equal(*after) and not torch.equal(before[1], after[1])
    said = [record.getMessage() for record in caplog.records if record.name == "gpt2fast"]
    assert len(said) == 2 and "multiple_choice_head: it has" in said[0] and "h.0.mlp: it has" in said[1]
