"""generate: transformers prepares and validates, as ever; the loop itself is the native model's, on the same weights.

What that loop does not cover (beams, other processors, hooks, adapters ...) runs in transformers' own loop over our
forward, and a warning says so once a reason.
"""

import functools
import logging

import torch
from torch import Tensor, nn
from transformers.generation import logits_process as processors
from transformers.generation import stopping_criteria as criteria

from .. import activations
from ..model import GPT2
from . import blocks
from .checks import is_autocast, obstacle, weight_obstacle

_CONTAINERS = (nn.ModuleList, nn.Dropout)
_WEIGHTED = (*blocks.CONV1D, blocks.LayerNorm, nn.LayerNorm, nn.Embedding, nn.Linear)
_OVERRIDABLE = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
_ORDER = (  # as transformers applies them, and as ops.sample does
    processors.RepetitionPenaltyLogitsProcessor,
    processors.MinLengthLogitsProcessor,
    processors.MinNewTokensLengthLogitsProcessor,
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
    processors.MinPLogitsWarper,
)
_SAMPLING = _ORDER[3:]
_EXPECTED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "tokenizer"}


class FastGeneration:
    """Overrides the decoding loops that GenerationMixin.generate calls once everything is prepared."""

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
        options, reason = {}, native_obstacle(self)
        if reason is None and synced_gpus:
            reason = "synced_gpus is set"
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
        twin = GPT2.from_transformers(self)
        streamer = None if streamer is None else _Continuation(streamer)
        return twin.generate(input_ids, model_kwargs.get("attention_mask"), streamer=streamer, **options)

    def _beam_search(self, *args, **kwargs):
        _say_once("beam search is asked for")
        return super()._beam_search(*args, **kwargs)

    def _assisted_decoding(self, *args, **kwargs):
        _say_once("assisted decoding is asked for")
        return super()._assisted_decoding(*args, **kwargs)


class _Continuation:
    """A streamer that has been given the prompt already."""

    def __init__(self, streamer):
        self.streamer, self.prompt_seen = streamer, False

    def put(self, tokens: Tensor) -> None:
        if self.prompt_seen:
            self.streamer.put(tokens)
        self.prompt_seen = True

    def end(self) -> None:
        self.streamer.end()


def native_obstacle(model: nn.Module) -> str | None:
    """Why the native model would not compute what calling this GPT2LMHeadModel does, or None."""
    config = model.config
    if config.add_cross_attention:
        return "the model has cross attention"
    if model.training and any(p > 0 for p in (config.attn_pdrop, config.resid_pdrop, config.embd_pdrop)):
        return "the model is in training mode"
    if is_autocast(model.transformer.wte.weight):
        return "autocast is on"
    for name in _OVERRIDABLE:
        if name in model.__dict__:
            return f"{name} is replaced"
    models = (type(model), type(model.transformer))
    if not all(kind.__module__.startswith(__package__ + ".") for kind in models):
        return f"{models[0].__module__}.{models[0].__qualname__} is not the stock class"
    form = activations.FUSED.get(config.activation_function)
    known = (*models, blocks.GPT2Block, blocks.GPT2Attention, blocks.GPT2MLP, *_CONTAINERS)
    for name, module in model.named_modules():
        if isinstance(module, _WEIGHTED):
            found = weight_obstacle(module, _WEIGHTED)
            if found is None and isinstance(module, nn.LayerNorm) and module.eps != config.layer_norm_epsilon:
                found = "its eps is not the config's"
        elif type(module) in blocks.ACTIVATIONS:
            found = obstacle(module, (type(module),))
            if found is None and blocks.ACTIVATIONS[type(module)] != form:
                found = f"it is not the config's {config.activation_function!r}"
        else:
            found = obstacle(module, known) or _attention_obstacle(module)
        if found is not None:
            return f"{name or 'the model'}: {found}"
    first = model.transformer.wte.weight
    if any(p.dtype != first.dtype or p.device != first.device for p in model.parameters()):
        return "its parameters differ in dtype or device"
    return None


def _attention_obstacle(module: nn.Module) -> str | None:
    if not isinstance(module, blocks.GPT2Attention):
        return None
    if found := blocks.attention_obstacle(module, {}):
        return found
    config = module.config
    scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
    scale /= module.layer_idx + 1 if config.scale_attn_by_inverse_layer_idx else 1
    same = module.scaling == scale and module.num_heads == config.n_head
    return None if same else "its heads or scaling are not the config's"


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
    """The native loop's arguments for prepared processors and criteria; or the reason why it has none."""
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
    for found in logits_processor:
        kind = type(found)
        if kind not in _ORDER or _ORDER.index(kind) <= last or (kind in _SAMPLING and not sampled):
            return {}, f"logits processor {kind.__name__}"
        last = _ORDER.index(kind)
        if getattr(found, "filter_value", -torch.inf) != -torch.inf or getattr(found, "min_tokens_to_keep", 1) != 1:
            return {}, f"logits processor {kind.__name__} with other settings than generate's"
        if kind is processors.RepetitionPenaltyLogitsProcessor:
            mask, ignored = given.get("attention_mask"), found.prompt_ignore_length
            padding = 0 if mask is None else (mask != 0).int().argmax(1)
            if bool(torch.as_tensor((0 if ignored is None else ignored) != padding).any()):
                return {}, "a repetition penalty that leaves out more than padding"
            options["repetition_penalty"] = found.penalty
        elif kind is processors.MinLengthLogitsProcessor:
            options["min_new_tokens"] = max(found.min_length - T, 0)
            ends.append(found.eos_token_id)
        elif kind is processors.MinNewTokensLengthLogitsProcessor:
            options["min_new_tokens"] = max(found.min_new_tokens, options["min_new_tokens"])
            ends.append(found.eos_token_id)
            if found.prompt_length_to_skip != T:
                return {}, "min_new_tokens counted from elsewhere"
        else:
            name = {"TemperatureLogitsWarper": "temperature", "TopKLogitsWarper": "top_k"}.get(kind.__name__)
            name = name or {"TopPLogitsWarper": "top_p", "MinPLogitsWarper": "min_p"}[kind.__name__]
            options[name] = getattr(found, name)
    if any(end.tolist() != options["eos_token_id"] for end in ends):
        return {}, "a minimal length for other tokens than those that end a text"
    if options.get("top_p", 1.0) <= 0:
        return {}, "top_p is 0"
    return options, None


@functools.cache
def _say_once(reason: str) -> None:
    logging.getLogger("gpt2fast").warning("gpt2fast: generate runs transformers' own loop over our forward: %s", reason)
