"""``generate`` of the drop-in. transformers prepares and validates the call; then our native loop generates.

The native loop uses the modules of the model. What it does not cover (beams, other processors, hooks, adapters and so
on) runs in transformers' own loop over our forward. A warning then says why, once for each reason.
"""

import functools
import logging
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.generation import logits_process as processors
from transformers.generation import stopping_criteria as criteria

from ..checks import is_autocast
from .native import Bare, stock_obstacle

_STEPS = {  # the methods that a turn of transformers' loop calls, to notice one that is replaced
    name: getattr(GenerationMixin, name)
    for name in ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
}
_PROCESSORS = {  # in the order in which transformers applies them, and ops.sample does
    processors.RepetitionPenaltyLogitsProcessor: "repetition_penalty",
    processors.MinLengthLogitsProcessor: "min_length",
    processors.MinNewTokensLengthLogitsProcessor: "min_new_tokens",
    processors.TemperatureLogitsWarper: "temperature",
    processors.TopKLogitsWarper: "top_k",
    processors.TopPLogitsWarper: "top_p",
    processors.MinPLogitsWarper: "min_p",
}
_ORDER = list(_PROCESSORS.values())
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_EXPECTED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "tokenizer"}
# For each model the Bare that runs its modules in the native loop; captured turns are kept by it. It is stored here and
# not in the model, so that a copy of the model does not get it.
_bare: WeakKeyDictionary[nn.Module, Bare] = WeakKeyDictionary()


class FastGeneration:
    """Overrides the decoding loops that GenerationMixin.generate calls once everything is prepared."""

    @functools.wraps(GenerationMixin.generate)
    def generate(self, inputs=None, *args, **kwargs):
        _check_prompt(kwargs.get("input_ids") if inputs is None else inputs, kwargs)
        return super().generate(inputs, *args, **kwargs)

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **model_kwargs,
    ):
        options: dict[str, Any] = {}
        reason = "synced_gpus is set" if synced_gpus else native_obstacle(self)
        reason = reason or _request_obstacle(input_ids, generation_config, model_kwargs)
        if reason is None:
            options, reason = _options(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        if reason is None and input_ids.shape[1] + options["max_new_tokens"] > self.config.n_positions:
            reason = "prompt and new tokens exceed n_positions"
        if reason is not None:
            _say_once(reason)
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        streamer = None if streamer is None else _Continuation(streamer)
        input_ids = input_ids.long() if input_ids.dtype == torch.int32 else input_ids
        return _bare[self].generate(input_ids, model_kwargs.get("attention_mask"), streamer=streamer, **options)

    def _beam_search(self, *args, **kwargs):
        _say_once("beam search is asked for")
        return super()._beam_search(*args, **kwargs)

    def _assisted_decoding(self, *args, **kwargs):
        _say_once("assisted decoding is asked for")
        return super()._assisted_decoding(*args, **kwargs)


class _Continuation:
    """Wraps a streamer that has been given the prompt already: the first put is left out."""

    def __init__(self, streamer):
        self.streamer, self.prompt_seen = streamer, False

    def put(self, tokens: Tensor) -> None:
        if self.prompt_seen:
            self.streamer.put(tokens)
        self.prompt_seen = True

    def end(self) -> None:
        self.streamer.end()


def _check_prompt(input_ids: Tensor | None, given: dict) -> None:
    """Raises ValueError for an empty prompt or a mask of another shape.

    This runs before transformers prepares anything. transformers accepts a mask of any size, and an error would come
    later, from somewhere else.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or given.get("inputs_embeds") is not None:
        return
    expected = tuple(input_ids.shape)
    if expected[1] == 0:
        raise ValueError(f"gpt2fast.generate: input_ids must be at least one token a row, got shape {expected}")
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and given.get("past_key_values") is None and mask.dim() < 4 and mask.shape != expected:
        raise ValueError(f"gpt2fast.generate: attention_mask must be of shape {expected}, got {tuple(mask.shape)}")


def native_obstacle(model: nn.Module) -> str | None:
    """Why the native loop would not compute the same as calls of this model, which has a language-model head; or None.

    Where it is None, ``_bare`` has the present modules of the model.
    """
    if model.config.add_cross_attention:
        return "the model has cross attention"
    if is_autocast(next(model.parameters())):
        return "autocast is on"
    for name, known in _STEPS.items():
        if name in model.__dict__ or getattr(type(model), name) is not known:
            return f"{name} is replaced"
    return stock_obstacle(model, for_text=True) or _bare.setdefault(model, Bare()).take(model)


def _request_obstacle(input_ids: Tensor, config, given: dict) -> str | None:
    if config.return_dict_in_generate:
        return "return_dict_in_generate is set"
    if config.is_assistant:
        return "the model is the assistant of another"
    if not config.use_cache:
        return "use_cache is off"
    for name in ("cache_implementation", "prefill_chunk_size"):
        if getattr(config, name) is not None:
            return f"{name} is set"
    for name, value in given.items():
        if name not in _EXPECTED and value is not None and value is not False:
            return f"{name} is given"
    past = given.get("past_key_values")
    if past is not None and past.get_seq_length() > 0 or getattr(past, "_is_user_defined", False):
        return "past_key_values is given"
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if mask is not None and (mask.shape != input_ids.shape or mask.is_floating_point() or not bool(mask.any(1).all())):
        return "attention_mask is not one of the prompt, with a token in each row"
    if input_ids.shape[1] == 0:
        return "the prompt is empty"
    usual = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    if mask is not None:
        usual = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
    if positions is not None and (positions.shape[-1] != usual.shape[1] or bool((positions != usual).any())):
        return "position_ids are given"
    return None


def _options(input_ids, logits_processor, stopping_criteria, config, given) -> tuple[dict, str | None]:
    """The arguments of the native loop for the prepared processors and criteria, and the reason where it has none."""
    T, sampled = input_ids.shape[1], config.do_sample
    options = dict(do_sample=sampled, top_k=None, eos_token_id=[], min_new_tokens=0)
    last, ends = -1, []
    for found in stopping_criteria:
        if type(found) is criteria.MaxLengthCriteria:
            options["max_new_tokens"] = found.max_length - T
        elif type(found) is criteria.EosTokenCriteria:
            options["eos_token_id"] = found.eos_token_id.tolist()
            options["pad_token_id"] = int(config._pad_token_tensor)
        elif type(found) is criteria.StopStringCriteria and given.get("tokenizer") is not None:
            options |= dict(stop_strings=list(found.stop_strings), tokenizer=given["tokenizer"])
        else:
            return {}, f"stopping criterion {type(found).__name__}"
    if "max_new_tokens" not in options:
        return {}, "no maximal length"
    if "stop_strings" in options and not options["eos_token_id"] and input_ids.shape[0] > 1:
        return {}, "stop strings for several rows without an eos_token_id"  # there, stopped rows go on
    for found in logits_processor:
        kind = type(found)
        name = _PROCESSORS.get(kind, "")
        if name not in _ORDER[last + 1 :] or (name in _SAMPLING and not sampled):
            return {}, f"logits processor {kind.__name__}"
        last = _ORDER.index(name)
        if getattr(found, "filter_value", -torch.inf) != -torch.inf or getattr(found, "min_tokens_to_keep", 1) != 1:
            return {}, f"logits processor {kind.__name__} with other settings than generate's"
        if name == "repetition_penalty":
            mask, ignored = given.get("attention_mask"), found.prompt_ignore_length
            padding = 0 if mask is None else (mask != 0).int().argmax(1)
            if bool(torch.as_tensor((0 if ignored is None else ignored) != padding).any()):
                return {}, "a repetition penalty that leaves out more than padding"
            options[name] = found.penalty
        elif name == "min_length":
            options["min_new_tokens"] = max(found.min_length - T, 0)
            ends.append(found.eos_token_id)
        elif name == "min_new_tokens":
            options[name] = max(found.min_new_tokens, options[name])
            ends.append(found.eos_token_id)
            if found.prompt_length_to_skip != T:
                return {}, "min_new_tokens counted from elsewhere"
        else:
            options[name] = getattr(found, name)
    if any(end.tolist() != options["eos_token_id"] for end in ends):
        return {}, "a minimal length for other tokens than those that end a text"
    if options.get("top_p", 1.0) <= 0:
        return {}, "top_p is 0"
    return options, None


@functools.cache
def _say_once(reason: str) -> None:
    logging.getLogger("gpt2fast").warning("gpt2fast: generate runs transformers' own loop over our forward: %s", reason)
