"""The turns of generate's loop. A turn is a forward call and a draw.

On a GPU, a turn is captured as a CUDA graph, once per batch size. A graph runs the launches of the turn again, on the
same memory, without Python. Everything that differs from turn to turn must therefore be in tensors that are changed in
place, and a turn must not depend on numbers that the host counts.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import backends, lookup, ops, step
from .cuda import library
from .step import Step

GPU_BACKENDS = ("triton", "cuda")  # their kernels neither make the host wait nor read values on it
LEAST_TURNS = 16  # fewer turns in a call are not worth a capture, which takes as long as some turns
MOST_KEPT = 4  # the number of captured turns that are kept for a model; each has its own cache
LEAST_COLUMNS = 128  # the smallest capacity of their caches; larger ones are powers of 2
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# For each model the captured turns. Their key is everything that the launches depend on. A call removes the turns from
# here while it uses them.
_kept: WeakKeyDictionary[Any, dict[tuple, "Turns"]] = WeakKeyDictionary()


class Turns:
    """The state of a batch between two turns.

    It has the cache, the tokens (B, 1) that were drawn last, and their positions (B, 1). ``real`` (B,) int64 is the
    number of tokens of each row without padding. ``seen`` (B, columns) int64 has the tokens for the repetition penalty,
    with -1 for none.
    """

    def __init__(self, model: Any, batch: int, columns: int, options: dict[str, float], by_graph: bool):
        self.options, self.by_graph = options, by_graph
        self.cache = model.new_cache(batch, columns)
        self.real = self.cache.lengths.clone()
        self.tokens, self.positions = self.real[:, None].clone(), self.real[:, None].clone()
        self.seed = self.real.new_zeros(1)
        self.rows: Tensor | None = None  # the row of the first batch that each row was, for its draws
        self.seen = None
        if options["repetition_penalty"] != 1.0:
            self.seen = self.real.new_full((batch, self.cache.capacity), -1)
        self.padded = self.compiled = False
        self.step: Step | None = None  # the C++ call that stands for the model in turns after the first
        self.replay: Callable[[], None] | None = None

    def begin(self, model: Any, prompt: Tensor, mask: Tensor | None, seed: Tensor, banned: Sequence[int]) -> None:
        """Reads the prompt (B, T), with mask (B, T) bool or None, and draws the first tokens."""
        T = prompt.shape[1]
        self.cache.clear()
        self.seed.copy_(seed)
        positions, self.padded = None, mask is not None
        if mask is None:
            self.real.fill_(T)
        else:
            positions = (mask.cumsum(1) - 1).masked_fill(~mask, 0)
            self.real.copy_(mask.sum(1))
            self.positions.copy_(positions[:, -1:])
        if self.seen is not None:
            self.seen.fill_(-1)[:, :T] = prompt
            if mask is not None:  # as in transformers, only padding on the left does not count
                self.seen[:, :T].masked_fill_(mask.cumsum(1) == 0, -1)
        self._draw(model(prompt, positions, mask, self.cache, logits_to_keep=1)[:, -1], banned)
        if not self.by_graph and self.cache.mask is None and step.obstacle(model) is None:
            self.step = step.Step(model, len(prompt))

    def next(self, model: Any, banned: Sequence[int]) -> None:
        """Runs the model on the tokens that were drawn last and draws the next ones.

        A turn that bans tokens is not captured. The first turn without banned tokens is not captured either: it may
        have to compile kernels.
        """
        if not self.by_graph or banned:
            return self._run(model, banned)
        if not self.cache.fixed:
            if not self.padded:
                self.positions.fill_(self.cache.length - 1)
            self.cache.fix()
        if not self.compiled:
            self._run(model)
            self.compiled = True
            return None
        if self.replay is None:
            self.replay = capture(lambda: self._run(model))
        return self.replay()

    def several(self, model: Any, most: int, alive: Sequence[int], pad: int, ends: Sequence[int]) -> Tensor:
        """Runs up to ``most`` turns in one call of C++ or, where that cannot be, one turn.

        Returns the new tokens (B, n) int64. In several turns, a row that is not among ``alive`` gets ``pad``, and the
        turn in which another row draws one of ``ends`` is the last.
        """
        if self.step is None:
            self.next(model, ())
            return self.tokens
        places = torch.zeros(len(self.real), dtype=torch.bool)
        places[alive] = True
        positions = self.positions if self.padded else None
        ends = [token for token in ends if 0 <= token < model.config.vocab_size]  # no other token can be drawn
        self.step.set_draw(self.seed, self.rows, self.options)
        return self.step.decode(self.tokens, positions, self.real, self.seen, self.cache, most, places, pad, ends)

    def verify(self, model: Any, draft: Tensor) -> Tensor:
        """Reads the token that was drawn last and a draft (k,) of the next ones in one pass, for a batch of one row.

        Returns the tokens (n,) int64, n from 1 to k + 1, that turns without a draft would have drawn.
        """
        ahead = torch.arange(1, len(draft) + 2, device=draft.device)
        ids = torch.cat([self.tokens[0], draft])
        positions = self.positions + ahead if self.padded else None
        logits = model(ids[None], positions, None, self.cache)[0]
        seen = None
        if self.seen is not None:  # each position has seen the draft's tokens before it
            first = self.cache.length - len(draft)
            seen = self.seen[:, : self.cache.length].repeat(len(ids), 1)
            later = torch.arange(len(draft), device=draft.device) >= ahead[:, None] - 1
            seen[:, first:] = draft.masked_fill(later, -1)
        drawn = ops.sample(logits, self.seed, self.real + ahead, seen, torch.zeros_like(ids), **self.options)
        count = lookup.accepted(draft, drawn) + 1
        self.cache.drop(len(ids) - count)
        self.real += count
        if self.padded:
            self.positions += count
        self.tokens.copy_(drawn[count - 1])
        return drawn[:count]

    def keep(self, model: Any, places: list[int]) -> None:
        """Leaves only these rows of the batch, in this order. Their draws stay what they would have been."""
        index = torch.tensor(places, device=self.real.device)
        self.rows = index if self.rows is None else self.rows[index]
        self.cache.select(index)
        self.real, self.tokens, self.positions = self.real[index], self.tokens[index], self.positions[index]
        self.seen = None if self.seen is None else self.seen[index]
        self.step = None if self.step is None else step.Step(model, len(places))

    def record(self, tokens: Tensor, column: int) -> None:
        """Adds the tokens (B,) of that column to those of the repetition penalty."""
        if self.seen is not None:
            self.seen[:, column] = tokens

    def _run(self, model: Any, banned: Sequence[int] = ()) -> None:
        self.real += 1
        positions = None  # by default the model counts positions on the host; not with padding or a graph
        if self.padded or self.cache.fixed:
            self.positions += 1
            positions = self.positions
        if self.step is not None:
            logits = self.step.logits(self.tokens, positions, self.cache)
        else:
            logits = model(self.tokens, positions, None, self.cache, logits_to_keep=1)[:, -1]
        self._draw(logits, banned)

    def _draw(self, logits: Tensor, banned: Sequence[int]) -> None:
        seen = self.seen
        if banned:
            logits[:, banned] = -torch.inf
        if seen is not None and not self.cache.fixed:
            seen = seen[:, : self.cache.length]
        self.tokens.copy_(ops.sample(logits, self.seed, self.real, seen, self.rows, **self.options)[:, None])


@contextlib.contextmanager
def turns(
    model: Any, batch: int, columns: int, options: dict[str, float], padded: bool, by_graph: bool
) -> Iterator[Turns]:
    """The turns of one call. With a graph, those of an earlier call are used again if they fit, and kept afterwards."""
    if not by_graph:
        yield Turns(model, batch, columns, options, False)
        return
    key = (batch, padded, *options.values(), *_launch_state(model))
    found = _kept.setdefault(model, {}).pop(key, None)  # no other thread can take it meanwhile
    if found is None or found.cache.capacity < columns:
        rounded = max(LEAST_COLUMNS, 1 << (columns - 1).bit_length())
        found = Turns(model, batch, rounded, options, True)
    yield found
    if found.replay is not None:  # after an exception, a turn may be half done: it is not kept
        kept = _kept[model]
        kept[key] = found
        while len(kept) > MOST_KEPT:
            kept.pop(next(iter(kept)), None)


def _launch_state(model: Any) -> Iterator[Any]:
    """Everything besides the batch that the launches of a turn depend on: tensors, numbers, the stream."""
    yield backends.active()
    if model.wte.weight.is_cuda:
        yield torch.cuda.current_stream(model.wte.weight.device).cuda_stream
    for parameter in model.parameters():
        yield parameter.data_ptr(), parameter.dtype, parameter.shape, parameter.stride()
    for module in model.modules():
        yield tuple(v for v in vars(module).values() if isinstance(v, int | float | str) or callable(v))


def capture(turn: Callable[[], None]) -> Callable[[], None]:
    """Records the launches of ``turn`` as a CUDA graph. Returns the function that runs them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        turn()
    return graph.replay


def graph_obstacle(model: Any) -> str | None:
    """Why a turn of the model must not be captured, or None.

    It must not where something in it may read values on the host or change between turns.
    """
    weight = model.wte.weight
    if not (weight.is_cuda or backends.cpu_counts_as_cuda() and torch.cuda.is_available()):
        return f"the model is on {weight.device}, not on a GPU"
    active = backends.active()
    usable = backends.status() | dict(cuda=library.reason())  # our own cuda kernels count, not a package's
    if active not in ("auto", *GPU_BACKENDS):
        return f"backend {active!r} is in force"
    missing = [usable[name] for name in GPU_BACKENDS if active in ("auto", name)]
    if all(missing):
        return "; ".join(missing)
    if torch.is_autocast_enabled(weight.device.type):
        return "autocast is on"
    if found := model.graph_obstacle():
        return found
    for name, parameter in model.named_parameters():
        if parameter.dtype not in DTYPES or parameter.device != weight.device:
            return f"{name} is {str(parameter.dtype).removeprefix('torch.')} on {parameter.device}"
    return None
