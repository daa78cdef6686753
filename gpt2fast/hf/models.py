"""transformers' GPT-2 models over our blocks: the same class names, weights, keys, arguments and outputs."""

import sys

import torch
from torch import Tensor, nn
from transformers import modeling_utils
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, CausalLMOutputWithCrossAttentions
from transformers.models.gpt2 import modeling_gpt2 as stock
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .. import ops
from ..block import embed
from ..checks import embedding_obstacle, is_autocast, keep_forwards, obstacle, stands_in, weight_obstacle
from ..ops.linear_cross_entropy import gradients_to_keep
from ..packed import PackedEmbedding
from ..values import within
from .blocks import needs_their_mask
from .convert import MODELS, Optimized
from .generation import FastGeneration
from .masks import cross_attention_mask, padding_mask, self_attention_mask
from .packed import PackedModel

LINEAR = (nn.Linear,)


def _kept(hidden: Tensor, positions: int | Tensor) -> Tensor:
    """The rows of (B, T, C) for which logits are wanted, selected as the installed transformers does."""
    if (cut := getattr(modeling_utils, "slice_logits_to_keep", None)) is not None:
        return cut(hidden, positions)
    return hidden[:, slice(-positions, None) if isinstance(positions, int) else positions, :]


def apply_head(head: nn.Module, x: Tensor) -> Tensor:
    """The logits (..., V): x (..., C) times the head's weight (V, C), transposed, plus its bias."""
    if weight_obstacle(head, LINEAR) is not None:
        return head(x)
    return ops.linear(x, head.weight, head.bias, transposed=True)


def causal_lm_loss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs):
    """transformers' ForCausalLMLoss without a float32 copy of the logits. Logits of token i meet the label of i + 1."""
    targets = _targets(labels, shift_labels, ignore_index, logits.device)
    rows = logits.reshape(-1, vocab_size)
    rows = rows.float() if rows.dtype == torch.float64 else rows
    reduction = "mean" if num_items_in_batch is None else "sum"
    return _per_item(ops.cross_entropy(rows, targets, ignore_index, reduction=reduction), num_items_in_batch)


def fused_causal_lm_loss(x, head, labels, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs):
    """The same loss from the input of the head, x (B, T, C). Only a part of the logits is in memory at a time."""
    targets = _targets(labels, shift_labels, ignore_index, x.device)
    reduction, keep = "mean" if num_items_in_batch is None else "sum", gradients_to_keep(x, head.weight)
    rows = x.reshape(-1, x.shape[-1])
    loss = ops.linear_cross_entropy(rows, head.weight, targets, ignore_index, reduction=reduction, keep=keep)
    return _per_item(loss, num_items_in_batch)


def _targets(labels, shift_labels, ignore_index: int, device) -> Tensor:
    """The labels (B T,) int64 for the logits of each token: those of the next token."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return shift_labels.reshape(-1).to(device=device, dtype=torch.int64)


def _per_item(loss: Tensor, items) -> Tensor:
    if items is None:
        return loss
    return loss / (items.to(loss.device) if isinstance(items, Tensor) else items)


class GPT2Model(Optimized, stock.GPT2Model):
    @stands_in(stock.GPT2Model)
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        use_cache=None,
        **kwargs,
    ):
        traced = torch.jit.is_tracing() and torch.is_grad_enabled()
        if traced and any(p.requires_grad for p in self.parameters()):
            raise RuntimeError(
                "gpt2fast: torch.jit.trace, and ONNX export by it, must run without gradients, got a model that "
                "has some: trace gpt2fast.restore(model), or trace under torch.no_grad(), or use torch.export"
            )
        for name in ("output_attentions", "output_hidden_states"):
            kwargs.pop(name, None)  # capture_outputs has handled them
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("gpt2fast: exactly one of input_ids and inputs_embeds must be given")
        if input_ids is not None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        shape = input_ids.shape if input_ids is not None else inputs_embeds.shape[:-1]
        T = shape[-1]
        if T == 0:
            raise ValueError(f"gpt2fast: there must be at least one token a row, got shape {tuple(shape)}")
        past = self._cache(past_key_values, use_cache)
        checkpointing = self.gradient_checkpointing and self.training
        if checkpointing and past is not None and (seen := past.get_seq_length()) > 0:
            raise ValueError(
                "gpt2fast: past_key_values must be empty under gradient checkpointing, which runs every block twice, "
                f"got one of {int(seen)} tokens: model.gradient_checkpointing_disable() or pass the tokens themselves"
            )
        embeds = self._embed(input_ids, inputs_embeds, token_type_ids, position_ids, past, T)
        if attention_mask is not None and attention_mask.ndim < 4:
            attention_mask = padding_mask(attention_mask, embeds.shape[0], T, past)

        asking = [needs_their_mask(block, kwargs) for block in self.h]
        fused, full = not all(asking), any(asking)
        mask = self_attention_mask(self.config, embeds, attention_mask, past, position_ids, fused, full)
        if encoder_hidden_states is not None:
            encoder_attention_mask = cross_attention_mask(
                self.config, embeds, encoder_attention_mask, encoder_hidden_states, fused, full
            )
        if position_ids is None:
            before = past.get_seq_length() if past is not None else 0
            position_ids = (torch.arange(T, device=embeds.device) + before).unsqueeze(0)

        x = self.drop(embeds)
        for block, asks in zip(self.h, asking):
            x = block(
                x,
                None if checkpointing else past,
                mask.theirs if fused and asks else mask,
                encoder_hidden_states,  # positional, because gradient checkpointing looks for gradients there
                encoder_attention_mask=encoder_attention_mask,
                use_cache=use_cache,
                position_ids=position_ids,
                **kwargs,
            )
        x = self.ln_f(x)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=x.view((-1,) + tuple(shape[1:]) + (x.shape[-1],)),
            past_key_values=past if use_cache else None,
        )

    def _cache(self, past, use_cache):
        if not use_cache:
            return past
        past = DynamicCache(config=self.config) if past is None else past
        if self.config.add_cross_attention and not isinstance(past, EncoderDecoderCache):
            past = EncoderDecoderCache(past, DynamicCache(config=self.config))
        return past

    def _embed(self, input_ids, inputs_embeds, token_type_ids, position_ids, past, T: int) -> Tensor:
        """Token, position and token-type embeddings, summed: (B, T, C)."""
        ids = None if input_ids is None else input_ids.view(-1, T)
        types = None if token_type_ids is None else token_type_ids.view(-1, T)
        before = 0 if past is None or position_ids is not None else past.get_seq_length()
        if isinstance(before, Tensor):
            device = (ids if ids is not None else inputs_embeds).device
            position_ids = (torch.arange(T, device=device) + before.to(device)).unsqueeze(0)
        if (
            ids is not None
            and (position_ids is None or position_ids.dim() == 2 and position_ids.shape[0] in (1, ids.shape[0]))
            and tables_obstacle(self) is None
        ):
            ids, position_ids, types = map(_widened, (ids, position_ids, types))
            start = before if position_ids is None else 0
            return embed(self.wte, self.wpe, ids, position_ids, types, start)
        embeds = self.wte(ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = (torch.arange(T, device=embeds.device) + before).unsqueeze(0)
        if not is_tracing(position_ids):
            within("embedding", "positions", position_ids, getattr(self.wpe, "num_embeddings", sys.maxsize))
        x = embeds + self.wpe(position_ids).to(embeds.device)
        return x if types is None else x + self.wte(types)


def tables_obstacle(model: GPT2Model) -> str | None:
    """Why the embeddings cannot be looked up and summed in one op, or None."""
    wte, wpe = model._modules.get("wte"), model._modules.get("wpe")
    if wte is None or wpe is None:
        return "wte or wpe is missing"
    if type(wte) is PackedEmbedding:
        return obstacle(wte, (PackedEmbedding,)) or embedding_obstacle(wpe)
    if found := embedding_obstacle(wte) or embedding_obstacle(wpe):
        return found
    return None if wte.weight.dtype == wpe.weight.dtype else "wte and wpe differ in dtype"


def _widened(numbers: Tensor | None) -> Tensor | None:
    """Converts int32, which torch's embeddings accept too, to int64 for the op. The op refuses other dtypes."""
    return numbers.long() if numbers is not None and numbers.dtype == torch.int32 else numbers


class GPT2LMHeadModel(Optimized, FastGeneration, PackedModel, stock.GPT2LMHeadModel):
    fused_loss = False  # see optimize()

    @property
    def loss_function(self):
        # This repeats transformers' code, because torch.compile cannot trace super() of a property.
        if hasattr(self, "_loss_function"):
            return self._loss_function
        found = LOSS_MAPPING.get(self.loss_type, LOSS_MAPPING["ForCausalLM"])
        return causal_lm_loss if found is ForCausalLMLoss else found

    @loss_function.setter
    def loss_function(self, value):
        self._loss_function = value

    @stands_in(stock.GPT2LMHeadModel)
    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        found = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        x, loss, logits = found.last_hidden_state, None, None
        if labels is None or not fuses_loss(self) or isinstance(logits_to_keep, Tensor) or logits_to_keep:
            logits = apply_head(self.lm_head, _kept(x, logits_to_keep))
        if labels is not None and logits is None:
            loss = fused_causal_lm_loss(x, self.lm_head, labels, **kwargs)
        elif labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
            cross_attentions=found.cross_attentions,
        )


def fuses_loss(model: GPT2LMHeadModel) -> bool:
    """Whether a call with labels computes its loss without the logits."""
    return model.fused_loss and model.training and fused_loss_obstacle(model) is None


def fused_loss_obstacle(model: GPT2LMHeadModel) -> str | None:
    """Why head and loss cannot be one op, or None."""
    if model.loss_function is not causal_lm_loss:
        return "loss_function is replaced"
    head = model.lm_head
    if found := weight_obstacle(head, LINEAR):
        return f"of lm_head {found}"
    if head.bias is not None:
        return "lm_head has a bias"
    return "the model is in float64" if head.weight.dtype == torch.float64 else None


class GPT2DoubleHeadsModel(Optimized, FastGeneration, stock.GPT2DoubleHeadsModel):
    @stands_in(stock.GPT2DoubleHeadsModel)
    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        mc_token_ids=None,
        labels=None,
        mc_labels=None,
        use_cache=None,
        **kwargs,
    ):
        found = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        x = found.last_hidden_state
        logits = apply_head(self.lm_head, x)
        choices = self.multiple_choice_head(x, mc_token_ids).squeeze(-1)
        loss = mc_loss = None
        if mc_labels is not None:
            mc_loss = nn.functional.cross_entropy(choices.view(-1, choices.shape[-1]), mc_labels.view(-1))
        if labels is not None:
            loss = causal_lm_loss(logits, labels, logits.shape[-1])
            loss = loss if is_autocast(logits) else loss.to(logits.dtype)  # as in transformers
        return stock.GPT2DoubleHeadsModelOutput(
            loss=loss,
            mc_loss=mc_loss,
            logits=logits,
            mc_logits=choices,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
        )


class GPT2ForSequenceClassification(Optimized, stock.GPT2ForSequenceClassification):
    pass


class GPT2ForTokenClassification(Optimized, stock.GPT2ForTokenClassification):
    pass


class GPT2ForQuestionAnswering(Optimized, stock.GPT2ForQuestionAnswering):
    pass


keep_forwards(GPT2Model, GPT2LMHeadModel, GPT2DoubleHeadsModel)
for _name in MODELS:
    globals()[_name].__module__ = stock.__name__  # see convert._Named
