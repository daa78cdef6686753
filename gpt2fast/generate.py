"""``generate``, with the semantics of transformers' own: (B, T) tokens in, (B, T + N) tokens out.

Each new token takes one forward call of the model and one draw. decoding.py runs these turns, on a CPU many of them in
one call of C++.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import decoding, ops
from .dtypes import dtype_name
from .lookup import PromptLookup

MOST_NEW_TOKENS = 20


def generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = MOST_NEW_TOKENS,
    min_new_tokens: int = 0,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = 50,
    top_p: float = 1.0,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    streamer: Any = None,
    seed: int | Tensor | None = None,
    cuda_graph: bool | None = None,
    prompt_lookup: PromptLookup | None = None,
) -> Tensor:
    """Continues each row until its end-of-sequence token, a stop string, or ``max_new_tokens``.

    Once half of the rows have ended, the model runs on the others only, except in a CUDA graph.

    Args:
        input_ids: (B, T) int64.
        attention_mask: (B, T), 0 for padding; by default there is none. Batches need padding on the left.
        do_sample: False takes the likeliest token.
        temperature, top_k, top_p, min_p: as in transformers (None: off). They have an effect only with do_sample.
        eos_token_id: by default the config's; [] for none.
        pad_token_id: fills rows that ended early; by default the config's, or else the first eos_token_id.
        stop_strings: need a tokenizer.
        streamer: an object with put(tokens) and end().
        seed: the seed of the draws, by default from torch's generator. A draw depends only on the seed, the index of
            the row and the tokens so far.
        cuda_graph: whether each token after the first two is one launch of a CUDA graph. The graph is captured once per
            batch size and kept with its cache. By default, a graph is used where a GPU runs a model of stock parts and
            enough tokens are asked for.
        prompt_lookup: for one row, drafts of the next tokens that occurred in the text before. One pass of the model
            verifies a draft, so that text that repeats takes fewer passes. With our kernels on a CPU, the tokens are
            the same as without it. Elsewhere rounding may depend on the number of tokens, and they have the same
            distribution. It holds the counts of the call afterwards.

    Returns: (B, T + N) int64, N <= max_new_tokens. Errors: ValueError or TypeError before anything is computed.
    """
    config = model.config
    mask = check_prompt(input_ids, attention_mask, config.vocab_size, model.wte.weight.device)
    B, T = input_ids.shape
    _integer("max_new_tokens", max_new_tokens)
    options = Options.check(
        config, do_sample, temperature, top_k, top_p, min_p, repetition_penalty, eos_token_id, min_new_tokens
    )
    _need(
        T + max_new_tokens <= config.n_positions,
        "prompt + max_new_tokens",
        f"at most n_positions = {config.n_positions}",
        f"{T} + {max_new_tokens}",
    )
    if prompt_lookup is not None:
        _need(isinstance(prompt_lookup, PromptLookup), "prompt_lookup", "a PromptLookup", type(prompt_lookup).__name__)
        _need(B == 1, "input_ids", "one row with prompt_lookup", f"{B} rows")
        _need(not cuda_graph, "cuda_graph", "None or False with prompt_lookup", cuda_graph)
        cuda_graph = False
    pad = config.pad_token_id if pad_token_id is None else pad_token_id
    if not hasattr(pad or 0, "__index__"):
        raise TypeError(f"gpt2fast.generate: pad_token_id must be an integer, got {pad!r}")
    plan = Plan(
        most=max_new_tokens,
        options=options,
        seed=make_seed(seed, input_ids.device),
        by_graph=_by_graph(cuda_graph, model, mask, max_new_tokens - min_new_tokens),
        pad=pad if pad is not None else next(iter(options.eos), 0),
        stops=Stops(stop_strings, tokenizer) if stop_strings else None,
        lookup=prompt_lookup,
    )
    with torch.inference_mode():
        out = _run(model, input_ids, mask, plan, streamer)
    return out.clone()  # autograd does not accept inference tensors


@dataclass
class Options:
    """How tokens are drawn and which ones end a text, checked.

    ``sampling`` has the arguments of the op ``sample``. ``banned`` are the tokens that must not be among the first
    ``least`` new ones.
    """

    sampling: dict[str, float]
    eos: list[int]
    banned: list[int]
    least: int

    @classmethod
    def check(
        cls,
        config: Any,
        do_sample: bool,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        min_p: float | None,
        repetition_penalty: float,
        eos_token_id: int | Sequence[int] | None,
        min_new_tokens: int,
    ) -> "Options":
        """The options from the arguments of ``generate``. Raises ValueError or TypeError that names the argument."""
        _integer("min_new_tokens", min_new_tokens)
        if not hasattr(top_k or 0, "__index__"):
            raise TypeError(f"gpt2fast.generate: top_k must be an integer, got {top_k!r}")
        sampling = dict(
            temperature=float(temperature) if do_sample else 0.0,
            top_k=(top_k or 0) if do_sample else 0,
            top_p=1.0 if top_p is None or not do_sample else float(top_p),
            min_p=0.0 if min_p is None or not do_sample else float(min_p),
            repetition_penalty=float(repetition_penalty),
        )
        _need(not do_sample or temperature > 0, "temperature", "above 0 where do_sample", temperature)
        ops.sample.check_values(**sampling)
        eos = _end_tokens(eos_token_id, config)
        banned = [token for token in eos if 0 <= token < config.vocab_size] if min_new_tokens else []
        return cls(sampling, eos, banned, min_new_tokens)


def _integer(name: str, count: Any) -> None:
    if not hasattr(count, "__index__"):
        raise TypeError(f"gpt2fast.generate: {name} must be an integer, got {count!r}")
    _need(count >= 0, name, "at least 0", count)


@dataclass
class Plan:
    """The checked arguments of ``generate``."""

    most: int
    options: "Options"
    seed: Tensor
    by_graph: bool
    pad: int
    stops: "Stops | None"
    lookup: PromptLookup | None


def _run(model: Any, input_ids: Tensor, mask: Tensor | None, plan: Plan, streamer: Any) -> Tensor:
    B, T = input_ids.shape
    out = input_ids.new_full((B, T + plan.most), plan.pad)
    out[:, :T] = input_ids
    _stream(streamer, input_ids)
    with decoding.turns(model, B, T + plan.most, plan.options.sampling, mask is not None, plan.by_graph) as turns:
        running, length = list(range(B)), T  # the rows of the batch that the model runs on
        alive = set(running)
        waiting: list[Tensor] = []  # tokens (rows,) that are drawn already
        each = streamer is not None or plan.stops is not None or plan.lookup is not None  # must see every token
        if plan.lookup is not None:
            plan.lookup.begin(input_ids[0].tolist())
        while length < T + plan.most and alive:
            banned = plan.options.banned if length - T < plan.options.least else ()
            if length == T:
                turns.begin(model, input_ids, mask, plan.seed, banned)
            elif not waiting:
                places = [place for place, row in enumerate(running) if row in alive]
                new = _next(model, turns, plan, banned, T + plan.most - length, each, places)
                if not each:  # only the last of these can end a text
                    more = new.shape[1] - 1
                    out[running, length : length + more] = new[:, :-1]
                    length += more
                    new = new[:, -1:]
                waiting = list(new.unbind(1))
            drawn = waiting.pop(0) if waiting else turns.tokens[:, 0]
            if plan.options.eos or plan.stops is not None:
                chosen = drawn.tolist()
                if len(alive) < len(running):
                    chosen = [token if row in alive else plan.pad for row, token in zip(running, chosen)]
                    drawn.copy_(torch.tensor(chosen))
                alive = {row for row, token in zip(running, chosen) if row in alive and token not in plan.options.eos}
            out[running if len(running) < B else slice(None), length] = drawn
            turns.record(drawn, length)
            if plan.lookup is not None:
                plan.lookup.add(int(drawn))
            length += 1
            if plan.stops is not None:
                alive = {row for row in alive if not plan.stops.ends(out[row, :length])}
            _stream(streamer, out[:, length - 1])
            if 0 < 2 * len(alive) <= len(running) and not plan.by_graph:  # a copy of the cache, at most log2(B) times
                turns.keep(model, [place for place, row in enumerate(running) if row in alive])
                running = [row for row in running if row in alive]
    if streamer is not None:
        streamer.end()
    return out[:, :length]


def _next(
    model: Any,
    turns: decoding.Turns,
    plan: Plan,
    banned: Sequence[int],
    most: int,
    each: bool,
    alive: Sequence[int],
) -> Tensor:
    """The tokens (rows, n) of the next passes of the model, n at most ``most``.

    With ``each``, this is one pass. Otherwise there are as many as one call of C++ can run: up to the one in which one
    of the rows ``alive`` ends.
    """
    draft = plan.lookup.draft(most - 1) if plan.lookup is not None and not banned else []
    if draft:
        drawn = turns.verify(model, turns.tokens.new_tensor(draft))
        plan.lookup.count(len(draft), len(drawn) - 1)
        return drawn[None]
    if plan.lookup is not None:
        plan.lookup.count(0, 0)
    if banned:
        turns.next(model, banned)
        return turns.tokens
    return turns.several(model, 1 if each else most, alive, plan.pad, plan.options.eos)


def _stream(streamer: Any, tokens: Tensor) -> None:
    """Gives a copy on the CPU to the streamer. It is a normal tensor, and the streamer runs outside inference mode."""
    if streamer is not None:
        with torch.inference_mode(False), torch.no_grad():
            streamer.put(tokens.to("cpu", copy=True))


def check_prompt(
    input_ids: Tensor, attention_mask: Tensor | None, vocabulary: int, device: torch.device
) -> Tensor | None:
    """Checks the prompt. Returns the mask as bools, or None where there is no padding.

    Raises ValueError or TypeError where the prompt cannot be continued.
    """
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"gpt2fast.generate: input_ids must be a tensor, got {type(input_ids).__name__}")
    if input_ids.dtype != torch.int64:
        raise TypeError(f"gpt2fast.generate: input_ids must have dtype int64, got {dtype_name(input_ids.dtype)}")
    _need(input_ids.dim() == 2, "input_ids", "of shape (B, T)", tuple(input_ids.shape))
    _need(input_ids.numel() > 0, "input_ids", "at least one token in at least one row", tuple(input_ids.shape))
    for name, tensor in dict(input_ids=input_ids, attention_mask=attention_mask).items():
        on = getattr(tensor, "device", device)
        _need(on == device, name, f"on {device} as the model is", on)
    least, most = (int(end) for end in input_ids.aminmax())
    found = least if least < 0 else most
    _need(0 <= least and most < vocabulary, "input_ids", f"tokens in [0, vocab_size = {vocabulary})", found)
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.is_floating_point():
        found = (
            dtype_name(attention_mask.dtype) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        )
        raise TypeError(f"gpt2fast.generate: attention_mask must be a tensor of bools or integers, got {found}")
    expected = tuple(input_ids.shape)
    _need(attention_mask.shape == expected, "attention_mask", f"of shape {expected}", tuple(attention_mask.shape))
    mask = attention_mask != 0
    if bool(mask.all()):
        return None
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    _need(not empty, "attention_mask", "nonzero somewhere in each row", f"zeros in row {empty[0] if empty else 0}")
    if not bool(mask[:, -1].all()):
        warnings.warn("gpt2fast.generate: a row ends in padding; pad on the left to continue its text", stacklevel=3)
    return mask


def make_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed of all draws, (1,) int64. For None it comes from torch's default generator."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), device="cpu").to(device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            found = f"{tuple(seed.shape)} of {dtype_name(seed.dtype)}"
            raise TypeError(f"gpt2fast.generate: seed must be one int64, got {found}")
        return seed.reshape(1).to(device)
    _need(-(2**63) <= seed < 2**63, "seed", "an integer of 64 bits", seed)
    return torch.tensor([seed], dtype=torch.int64, device=device)


def _by_graph(wanted: bool | None, model: Any, mask: Tensor | None, turns: int) -> bool:
    """Whether a CUDA graph is used. Raises ValueError where one is asked for and cannot be used."""
    if wanted is False or (wanted is None and turns < decoding.LEAST_TURNS):
        return False
    found = decoding.graph_obstacle(model)
    if found is None and mask is not None and not bool((mask[:, 1:] >= mask[:, :-1]).all()):
        found = "attention_mask hides more than padding on the left"
    _need(not (wanted and found), "cuda_graph", "None or False here", f"True, but {found}")
    return found is None


class Stops:
    """Tells whether the last token of a row has completed a stop string. The token may go on after the string's end."""

    def __init__(self, strings: str | Sequence[str], tokenizer: Any):
        self.strings = [strings] if isinstance(strings, str) else list(strings)
        _need(all(isinstance(s, str) and s for s in self.strings), "stop_strings", "non-empty strings", self.strings)
        if tokenizer is None:
            raise ValueError("gpt2fast.generate: tokenizer must be given with stop_strings, got None")
        self.decode = tokenizer.decode
        self.window = max(len(s.encode()) for s in self.strings) + 4  # a token has 1 byte or more; 4: a split character

    def ends(self, tokens: Tensor) -> bool:
        recent = tokens[-self.window :].tolist()
        before = self.decode(recent[:-1]).rstrip("\ufffd") if len(recent) > 1 else ""
        text = self.decode(recent)
        return any(text.find(s, max(len(before) - len(s) + 1, 0)) >= 0 for s in self.strings)


def _end_tokens(eos: int | Sequence[int] | None, config: Any) -> list[int]:
    found = config.eos_token_id if eos is None else eos
    if isinstance(found, Tensor):
        found = found.tolist()
    if isinstance(found, int):
        found = [found]
    found = list(found or [])
    _need(all(isinstance(token, int) for token in found), "eos_token_id", "an integer or a list of them", found)
    return found


def _need(fine: bool, name: str, expected: str, got: Any) -> None:
    if not fine:
        raise ValueError(f"gpt2fast.generate: {name} must be {expected}, got {got}")
