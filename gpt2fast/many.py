"""``generate_many``: many prompts through a batch of few rows. A row that has ended leaves at once for the next prompt.

The rows of the batch end at the same column of the cache, and begin where their prompts did. Our kernels on a CPU give
a row the same bits in every batch. So each prompt gets the tokens that it would get alone.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import ops, step
from .cache import Cache
from .generate import MOST_NEW_TOKENS, Options, Stops, check_prompt, make_seed

MOST_WAITING = 1024  # results that may wait for that of an earlier prompt
LEAST_PREFIX = 16  # a shorter part that two prompts share is not worth a copy


@dataclass
class Request:
    """A prompt, and what has been generated for it."""

    index: int  # of the prompt; its draws depend on it
    prompt: list[int]
    most: int
    new: list[int] = field(default_factory=list)
    ended: bool = False


def generate_many(
    model: Any,
    prompts: Iterable[Sequence[int] | Tensor],
    *,
    batch_size: int = 8,
    max_new_tokens: int | Iterable[int] = MOST_NEW_TOKENS,
    min_new_tokens: int = 0,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = 50,
    top_p: float = 1.0,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    seed: int | Tensor | None = None,
    first_index: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[list[int]]:
    """Continues many prompts. Yields the new tokens of each one, in the order of the prompts.

    The end-of-sequence token, where there is one, is the last of the new tokens. With our kernels on a CPU, results are
    those of one prompt at a time, whatever batch_size is. Elsewhere rounding may depend on the batch. Where a prompt
    begins with the tokens of the one before it, these are computed once.

    Args:
        model: a GPT2 in evaluation mode.
        prompts: token ids, lists or (T,) int64. At most batch_size + 1024 are taken before
            their results are yielded.
        batch_size: the most rows that the model runs on.
        max_new_tokens: for all prompts, or one for each prompt.
        seed: the draws of a prompt depend on the seed, its index and its tokens so far. They are those of row i of
            ``generate`` for prompt i.
        first_index: the index of the first prompt, for calls that go on where an earlier one ended.
        progress: called after each pass of the model with the numbers of prompts that have ended and of new tokens.

    The other arguments are those of ``generate``. Errors: ValueError or TypeError that names the prompt's index, when
    the prompt is taken.
    """
    from .model import GPT2  # imported here, because it imports generate

    if not isinstance(model, GPT2):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        raise TypeError(
            f"gpt2fast.generate_many: model must be a gpt2fast.GPT2, got {kind}; take GPT2.from_transformers(model)"
        )
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"gpt2fast.generate_many: batch_size must be an integer at least 1, got {batch_size!r}")
    options = Options.check(
        model.config, do_sample, temperature, top_k, top_p, min_p, repetition_penalty, eos_token_id, min_new_tokens
    )
    stops = Stops(stop_strings, tokenizer) if stop_strings else None
    device = model.wpe.weight.device
    batch = Batch(model, options, stops, make_seed(seed, device))
    return _run(batch, _requests(model, prompts, max_new_tokens, first_index), batch_size, progress)


def _requests(model: Any, prompts: Iterable, most: int | Iterable[int], first: int) -> Iterator[Request]:
    """The prompts as requests, each checked when it is taken."""
    mosts = None if isinstance(most, int) else iter(most)
    for index, prompt in enumerate(prompts, first):
        try:
            tokens = prompt if isinstance(prompt, Tensor) else torch.tensor(list(prompt), dtype=torch.int64)
            if tokens.dim() != 1:
                raise ValueError(f"must have shape (T,), got {tuple(tokens.shape)}")
            check_prompt(tokens[None], None, model.config.vocab_size, tokens.device)
            count = most if mosts is None else next(mosts, None)
            if type(count) is not int or count < 0:
                raise ValueError(f"max_new_tokens must be an integer at least 0 for each prompt, got {count!r}")
            if len(tokens) + count > model.config.n_positions:
                raise ValueError(
                    f"prompt + max_new_tokens must be at most n_positions = {model.config.n_positions}, got "
                    f"{len(tokens)} + {count}"
                )
        except (ValueError, TypeError) as error:
            reason = str(error).removeprefix("gpt2fast.generate: ")
            raise type(error)(f"gpt2fast.generate_many: prompt {index}: {reason}") from None
        yield Request(index, tokens.tolist(), count)


def _run(
    batch: "Batch", requests: Iterator[Request], size: int, progress: Callable[[int, int], None] | None
) -> Iterator[list[int]]:
    """Fills the batch, runs it, and yields results as soon as all earlier prompts have theirs."""
    order: deque[Request] = deque()  # those that were taken and not yet yielded
    exhausted, ended, tokens = False, 0, 0
    while True:
        while not exhausted and len(order) < size + MOST_WAITING and batch.running < size:
            request = next(requests, None)
            if request is None:
                exhausted = True
                break
            order.append(request)
            if request.most:
                tokens += batch.add(request)
            else:
                request.ended = True
            ended += request.ended
        if batch.running:
            before = batch.running
            tokens += before
            batch.turn()
            ended += before - batch.running
        if progress is not None:
            progress(ended, tokens)
        while order and order[0].ended:
            yield order.popleft().new
        if exhausted and not order:
            return


class Batch:
    """The rows that the model runs on. A row without a running request is free, and what it computes is not used."""

    def __init__(self, model: Any, options: Options, stops: Stops | None, seed: Tensor):
        self.model, self.options, self.stops, self.seed = model, options, stops, seed
        self.rows: list[Request | None] = []
        self.cache: Cache | None = None
        self.prefix: tuple[list[int], Cache] | None = None  # the last prompt and its keys and values
        self.step: step.Step | None = None

    @property
    def running(self) -> int:
        return sum(row is not None for row in self.rows)

    @torch.inference_mode()
    def add(self, request: Request) -> int:
        """Reads a prompt, draws its first token, and gives it a row unless it has ended. Returns 1: the new token."""
        cache, logits = self._read(request.prompt)
        self._draw([request], logits)
        if request.ended:
            return 1
        place = next((i for i, row in enumerate(self.rows) if row is None), None)
        if self.cache is None or place is None:
            place = self._grow()
        self.rows[place] = request
        self.cache.place(place, cache)
        return 1

    @torch.inference_mode()
    def turn(self) -> None:
        """Runs the model on the last token of each row and draws the next ones."""
        self._shrink()
        cache = self.cache
        for i, row in enumerate(self.rows):
            if row is None:
                cache.starts[i] = cache.length
        if cache.length == cache.capacity and (unused := int(cache.starts.min())) > 0:
            cache.shift(-unused)
        last = [[0 if row is None else row.new[-1]] for row in self.rows]
        counts = [[0 if row is None else len(row.prompt) + len(row.new) - 1] for row in self.rows]
        tokens, positions = (torch.tensor(x, device=cache.lengths.device) for x in (last, counts))
        if self.step is None and step.obstacle(self.model) is None:
            self.step = step.Step(self.model, len(self.rows))
        if self.step is not None:
            logits = self.step.logits(tokens, positions, cache)
        else:
            logits = self.model(tokens, positions, None, cache, logits_to_keep=1)[:, -1]
        places = [i for i, row in enumerate(self.rows) if row is not None]
        self._draw([self.rows[i] for i in places], logits if len(places) == len(self.rows) else logits[places])
        self.rows = [None if row is None or row.ended else row for row in self.rows]

    def _read(self, prompt: list[int]) -> tuple[Cache, Tensor]:
        """The keys and values of a prompt, and the logits (1, V) after it."""
        shared = self._shared(prompt)
        cache = self.model.new_cache(1, len(prompt))
        if shared:
            cache.copy_columns(self.prefix[1], shared)
        rest = torch.tensor([prompt[shared:]], device=cache.lengths.device)
        logits = self.model(rest, cache=cache, logits_to_keep=1)[:, -1]
        self.prefix = prompt, cache
        return cache, logits

    def _shared(self, prompt: list[int]) -> int:
        """How many tokens of the prompt need not be read, because the prompt before it began with them."""
        if self.prefix is None:
            return 0
        count, most = 0, min(len(prompt) - 1, len(self.prefix[0]))
        while count < most and prompt[count] == self.prefix[0][count]:
            count += 1
        return count if count >= LEAST_PREFIX else 0

    def _draw(self, requests: list[Request], logits: Tensor) -> None:
        """Draws a token for each request from logits (n, V), and finds out which requests have ended."""
        options, device = self.options, logits.device
        for i, request in enumerate(requests):
            if len(request.new) < options.least:
                logits[i, options.banned] = -torch.inf
        seen = None
        if options.sampling["repetition_penalty"] != 1.0:
            texts = [request.prompt + request.new for request in requests]
            width = max(map(len, texts))
            seen = torch.tensor([text + [-1] * (width - len(text)) for text in texts], device=device)
        real = torch.tensor([len(request.prompt) + len(request.new) for request in requests], device=device)
        index = torch.tensor([request.index for request in requests], device=device)
        drawn = ops.sample(logits, self.seed, real, seen, index, **options.sampling).tolist()
        for request, token in zip(requests, drawn, strict=True):
            request.new.append(token)
            request.ended = token in options.eos or len(request.new) == request.most
            if self.stops is not None and not request.ended:
                request.ended = self.stops.ends(torch.tensor(request.prompt + request.new))

    def _grow(self) -> int:
        """Adds a free row. Returns its place."""
        self.rows.append(None)
        self.step = None
        if self.cache is None:
            self.cache = self.model.new_cache(1)
            self.cache.starts = torch.zeros_like(self.cache.lengths)
        else:
            self.cache.select(torch.tensor([*range(len(self.rows) - 1), 0], device=self.cache.lengths.device))
        return len(self.rows) - 1

    def _shrink(self) -> None:
        """Leaves the free rows out once they are at least half of all."""
        places = [i for i, row in enumerate(self.rows) if row is not None]
        if 2 * len(places) <= len(self.rows):
            self.cache.select(torch.tensor(places, device=self.cache.lengths.device))
            self.rows, self.step = [self.rows[i] for i in places], None
