"""Greedy decoding against transformers over 204 prompts, singly and in left-padded batches; for every model of ours."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

NEW_TOKENS = 8
BATCH = 12
PROMPTS = 204
VOCABULARY = 331
MOST_EXCUSED = 0.005


@functools.cache
def reference_model() -> GPT2LMHeadModel:
    """Small, random, float32, with logits far enough apart that texts differ between prompts."""
    torch.manual_seed(11)
    config = GPT2Config(
        n_layer=2, n_embd=48, n_head=3, vocab_size=VOCABULARY, n_positions=64, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@functools.cache
def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(12)
    lengths = torch.randint(1, 41, (PROMPTS,), generator=generator).tolist()
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]


def batches(size: int) -> list[tuple[Tensor, Tensor]]:
    """(input_ids, attention_mask) of every prompt, ``size`` rows at a time, padded on the left."""
    found = []
    for first in range(0, PROMPTS, size):
        rows = prompts()[first : first + size]
        longest = max(map(len, rows))
        ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.int64)
        for row, tokens in enumerate(rows):
            ids[row, longest - len(tokens) :] = tokens
            mask[row, longest - len(tokens) :] = 1
        found.append((ids, mask))
    return found


def _texts(generate: Callable[[Tensor, Tensor], Tensor], size: int) -> list[Tensor]:
    """What follows each prompt, (NEW_TOKENS,) each."""
    texts: list[Tensor] = []
    for ids, mask in batches(size):
        out = generate(ids, mask)
        assert torch.equal(out[:, : ids.shape[1]], ids)
        texts.extend(torch.nn.functional.pad(out[:, ids.shape[1] :], (0, NEW_TOKENS + ids.shape[1] - out.shape[1])))
    return texts


@functools.cache
def expected(size: int) -> list[Tensor]:
    """transformers' own texts."""
    generate = functools.partial(reference_model().generate, max_new_tokens=NEW_TOKENS, min_new_tokens=2)
    return _texts(lambda ids, mask: generate(ids, attention_mask=mask, do_sample=False), size)


def check_greedy(generate: Callable[[Tensor, Tensor], Tensor], size: int) -> None:
    """``generate(input_ids, attention_mask)`` must give what transformers gives, with NEW_TOKENS and min_new_tokens=2.

    A different token is excused where the float64 gap between the two is below transformers' own error there.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model so small only waits for its other threads
    try:
        theirs, ours = expected(size), _texts(generate, size)
    finally:
        torch.set_num_threads(threads)
    assert len({tuple(text.tolist()) for text in theirs}) > PROMPTS / 2, "the reference's texts hardly differ"
    excused = 0
    for prompt, own, their in zip(prompts(), ours, theirs):
        if not torch.equal(own, their):
            first = int((own != their).nonzero()[0])
            gap, error = _gap(torch.cat([prompt, their[:first]]), int(own[first]), int(their[first]))
            print(f"token {first} after {prompt.tolist()}: {own[first]} for {their[first]}, gap {gap}, error {error}")
            assert gap < error, f"ours {own.tolist()}, transformers {their.tolist()}: gap {gap}, error {error}"
            excused += 1
    assert excused <= MOST_EXCUSED * PROMPTS, f"{excused} of {PROMPTS} prompts had to be excused"


@torch.no_grad()
def _gap(tokens: Tensor, ours: int, theirs: int) -> tuple[float, float]:
    """The float64 distance of two tokens' logits after ``tokens``, and the float32 model's largest error there."""
    model = reference_model()
    truth = _wide_model()(tokens[None]).logits[0, -1]
    error = (model(tokens[None]).logits[0, -1].double() - truth).abs().max()
    return float((truth[ours] - truth[theirs]).abs()), float(error)


@functools.cache
def _wide_model() -> GPT2LMHeadModel:
    model = GPT2LMHeadModel(reference_model().config).eval()
    model.load_state_dict(reference_model().state_dict())
    return model.double()
