"""The turns of generate's loop, each a forward call and a draw; on a GPU as a CUDA graph, captured once per batch size.

A graph runs the launches of one turn again, on the same memory, without Python. So whatever differs from turn to turn
lies in tensors that are changed in place, and nothing that the host counts takes part in a turn.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import backends, ops
from .cuda import library

GPU_BACKENDS = ("triton", "cuda")  # whose kernels neither wait nor look at values
LEAST_TURNS = 16  # of one call that are worth a capture, which takes as long as some turns do
MOST_KEPT = 4  # captured turns of a model; each has a cache of its own
LEAST_COLUMNS = 128  # of their caches, which grow by factors of 2
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# model -> what was captured, by all that its launches depend on; a call takes it out for as long as it uses it
_kept: WeakKeyDictionary[Any, dict[tuple, "Turns"]] = WeakKeyDictionary()


class Turns:
    """A batch between two turns: its cache and the tokens (B, 1) last drawn, with their positions (B, 1).

    ``real`` (B,) int64 counts each row's tokens without padding; ``seen`` (B, columns) is what the repetition penalty
    counts, -1 for none.
    """

    def __init__(self, model: Any, batch: int, columns: int, options: dict[str, float], by_graph: bool):
        self.options, self.by_graph = options, by_graph
        self.cache = model.new_cache(batch, columns)
        self.real = self.cache.lengths.clone()
        self.tokens, self.positions = self.real[:, None].clone(), self.real[:, None].clone()
        self.seed = self.real.new_zeros(1)
        self.seen = None
        if options["repetition_penalty"] != 1.0:
            self.seen = self.real.new_full((batch, self.cache.capacity), -1)
        self.padded = self.compiled = False
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
            if mask is not None:  # as in transformers, padding on the left does not count, any other does
                self.seen[:, :T].masked_fill_(mask.cumsum(1) == 0, -1)
        self._draw(model(prompt, positions, mask, self.cache, logits_to_keep=1), banned)

    def next(self, model: Any, banned: Sequence[int]) -> None:
        """Puts the tokens last drawn into the model and draws the next ones.

        A turn that bans tokens is not captured. Nor is the first of the others: it compiles what has to be compiled.
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

    def record(self, tokens: Tensor, column: int) -> None:
        """Has the tokens (B,) in that column count for the repetition penalty."""
        if self.seen is not None:
            self.seen[:, column] = tokens

    def _run(self, model: Any, banned: Sequence[int] = ()) -> None:
        self.real += 1
        positions = None  # the model counts for itself, unless there is padding or nothing may be counted
        if self.padded or self.cache.fixed:
            self.positions += 1
            positions = self.positions
        self._draw(model(self.tokens, positions, None, self.cache, logits_to_keep=1), banned)

    def _draw(self, logits: Tensor, banned: Sequence[int]) -> None:
        logits, seen = logits[:, -1], self.seen
        if banned:
            logits[:, banned] = -torch.inf
        if seen is not None and not self.cache.fixed:
            seen = seen[:, : self.cache.length]
        self.tokens.copy_(ops.sample(logits, self.seed, self.real, seen, **self.options)[:, None])


@contextlib.contextmanager
def turns(
    model: Any, batch: int, columns: int, options: dict[str, float], padded: bool, by_graph: bool
) -> Iterator[Turns]:
    """The turns of one call: new ones, or captured ones of an earlier call that fit, which are kept for the next."""
    if not by_graph:
        yield Turns(model, batch, columns, options, False)
        return
    key = (batch, padded, *options.values(), *_launch_state(model))
    found = _kept.setdefault(model, {}).pop(key, None)  # nobody else has it meanwhile
    if found is None or found.cache.capacity < columns:
        rounded = max(LEAST_COLUMNS, 1 << (columns - 1).bit_length())
        found = Turns(model, batch, rounded, options, True)
    yield found
    if found.replay is not None:  # not after an exception, which leaves a turn half done
        kept = _kept[model]
        kept[key] = found
        while len(kept) > MOST_KEPT:
            kept.pop(next(iter(kept)), None)


def _launch_state(model: Any) -> Iterator[Any]:
    """All that the launches of a turn have in them beside the batch: tensors, numbers, the stream."""
    yield backends.active()
    if model.wte.weight.is_cuda:
        yield torch.cuda.current_stream(model.wte.weight.device).cuda_stream
    for parameter in model.parameters():
        yield parameter.data_ptr(), parameter.dtype, parameter.shape, parameter.stride()
    for module in model.modules():
        yield tuple(v for v in vars(module).values() if isinstance(v, int | float | str) or callable(v))


def capture(turn: Callable[[], None]) -> Callable[[], None]:
    """Records the launches of ``turn`` as a CUDA graph; returns what runs them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        turn()
    return graph.replay


def graph_obstacle(model: Any) -> str | None:
    """Why a turn of the model must not be captured: something in it may look at values, or change between turns."""
    weight = model.wte.weight
    if not (weight.is_cuda or backends.cpu_counts_as_cuda() and torch.cuda.is_available()):
        return f"the model is on {weight.device}, not on a GPU"
    active = backends.active()
    usable = backends.status() | dict(cuda=library.reason())  # without ours, cuda may have kernels of a package
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
