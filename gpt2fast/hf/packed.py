"""Packed weights (gpt2fast/packed.py) in the drop-in: ``GPT2LMHeadModel.from_pretrained(source, weights="int8")``.

The model is transformers' with packed modules in the places of its linear layers, its table of tokens and its head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GPT2Config

from .. import weights as checkpoint
from ..model import GPT2
from ..packed import PackedEmbedding, layers_of, refuse_training, weights_of

HUB = ("revision", "token", "cache_dir")


class PackedHead(nn.Module):
    """The head of a model with packed weights. It reads ``table``, which is the table of tokens where both are tied."""

    def __init__(self, table: PackedEmbedding):
        super().__init__()
        object.__setattr__(self, "table", table)  # no submodule: a tied table belongs to the model already
        self.bias = None

    @property
    def weight(self) -> Tensor:
        return self.table.weight

    @property
    def scale(self) -> Tensor:
        return self.table.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.table.head(x)


class PackedModel:
    """The part of GPT2LMHeadModel that knows packed weights."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, weights=None, mmap=False, **kwargs):
        """As transformers'. ``weights`` is a format of gpt2fast.GPT2.from_pretrained, which also describes ``mmap``.

        ``"int8"`` and ``"int4"`` give a model for inference on a CPU; they take no other options than those of the hub.
        """
        dtype = checkpoint.parse_dtype(weights)
        if weights is None or dtype is not None:
            if mmap:
                raise ValueError("gpt2fast: mmap must come with weights='int8' or 'int4', got it alone")
            chosen = {} if dtype is None else dict(dtype=dtype)
            return super().from_pretrained(pretrained_model_name_or_path, *args, **chosen, **kwargs)
        if args or (unknown := kwargs.keys() - set(HUB)):
            found = f"{len(args)} arguments" if args else sorted(unknown)[0]
            raise TypeError(f"gpt2fast: with weights={weights!r} the options must be {', '.join(HUB)}, got {found}")
        folder = checkpoint.locate(pretrained_model_name_or_path, **kwargs)
        native = GPT2.from_pretrained(folder, weights=weights, mmap=mmap)
        with torch.device("meta"):
            model = cls(GPT2Config.from_pretrained(folder))
        adopt(model, native)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model

    def save_pretrained(self, save_directory, *args, unpack=False, **kwargs):
        """As transformers'. Packed weights are written as packed.safetensors or, with ``unpack``, as float32."""
        if weights_of(self) is None:
            return super().save_pretrained(save_directory, *args, **kwargs)
        if args or kwargs:
            raise TypeError(f"gpt2fast: a packed model is saved without other options, got {args or kwargs}")
        to_native(self).save_pretrained(save_directory, unpack)
        self.generation_config.save_pretrained(save_directory)
        return None

    def requires_grad_(self, requires_grad: bool = True):
        if weights := weights_of(self):
            refuse_training(requires_grad, weights)
        return super().requires_grad_(requires_grad)

    def resize_token_embeddings(self, *args, **kwargs):
        if weights := weights_of(self):
            raise TypeError(
                f"gpt2fast: a model with {weights} weights cannot be resized; load it with weights='float32', resize "
                "it, save it, and load that with packed weights"
            )
        return super().resize_token_embeddings(*args, **kwargs)


def adopt(model: nn.Module, native: GPT2) -> None:
    """Puts the packed modules and the parameters of a native model into a GPT2LMHeadModel without contents."""
    share(native, model.transformer)
    model.lm_head = PackedHead(native.wte if native.lm_head is None else native.lm_head)
    if native.lm_head is not None:
        model.lm_head.add_module("own", native.lm_head)
    if left := [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]:
        raise ValueError(f"gpt2fast: a model with packed weights must be a plain GPT-2, got one with {left[0]}")
    model.eval()


def to_native(model: nn.Module) -> GPT2:
    """A native model that shares the packed modules and the parameters of a GPT2LMHeadModel."""
    from .native import native_config  # imported here, because it imports this module

    config = native_config(model)
    with torch.device("meta"):
        native = GPT2(config)
    share(model.transformer, native)
    native.lm_head = None if config.tie_word_embeddings else model.lm_head.table
    return native.eval()


def share(source: nn.Module, target: nn.Module) -> None:
    """Puts tables, linear layers and norms of a GPT-2 without its head, native or transformers', into another one."""
    target.wte, target.wpe.weight = source.wte, source.wpe.weight
    pairs = [(target.ln_f, source.ln_f)]
    for ours, others in zip(target.h, source.h, strict=True):
        for (parent, name), (other, _) in zip(layers_of(ours), layers_of(others), strict=True):
            setattr(parent, name, getattr(other, name))
        pairs += [(ours.ln_1, others.ln_1), (ours.ln_2, others.ln_2)]
    for norm, other in pairs:
        norm.weight, norm.bias = other.weight, other.bias


def part_obstacle(module: nn.Module, config: Any, name: str) -> str | None:
    """Why a packed module does not have the sizes of the config, or None."""
    sizes = {
        "attn.c_attn": (3 * config.n_embd, config.n_embd),
        "attn.c_proj": (config.n_embd, config.n_embd),
        "mlp.c_fc": (config.inner, config.n_embd),
        "mlp.c_proj": (config.n_embd, config.inner),
    }
    expected = sizes.get(name, (config.vocab_size, config.n_embd))
    packed = module.table if isinstance(module, PackedHead) else module
    found = packed.outputs, packed.inputs
    return None if found == expected else f"its sizes must be {expected}, got {found}"
