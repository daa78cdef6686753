"""Modules with packed weights (packing.py). They hold buffers, no parameters: a model made of them is for inference."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .dtypes import dtype_name
from .packing import pack_int4, pack_int8, packed_shape, unpack_int4, unpack_int8, unpack_rows_int8
from .weights import BITS

WIDE = torch.float32  # the dtype of everything that is not packed, and of the activations
AGAIN = "load the model with from_pretrained(folder, weights=...) in the format that you want"


class Packed(nn.Module):
    """The base of the packed modules: a weight (N, K) as buffers ``weight`` uint8 and, for 8 bits, ``scale`` (N,).

    The buffers keep dtype and device. What would change them raises an error that says what to do instead.
    """

    def __init__(self, outputs: int, inputs: int, bits: int):
        super().__init__()
        self.outputs, self.inputs, self.bits = outputs, inputs, bits
        self.register_buffer("weight", torch.empty(packed_shape(outputs, inputs, bits), dtype=torch.uint8))
        if bits == 8:
            self.register_buffer("scale", torch.empty(outputs, dtype=torch.float32))

    def fill(self, weight: Tensor) -> None:
        """Packs weight (N, K) into the buffers, which may be on the meta device so far."""
        if self.bits == 8:
            self.weight, self.scale = pack_int8(weight)
        else:
            self.weight = pack_int4(weight)

    def unpacked(self) -> Tensor:
        """The rounded weight (N, K), float32."""
        if self.bits == 8:
            return unpack_int8(self.weight, self.scale, self.inputs)
        return unpack_int4(self.weight, self.outputs, self.inputs)

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.outputs}, int{self.bits}: for inference, {AGAIN}"

    def _apply(self, fn: Callable, recurse: bool = True) -> "Packed":
        """Refuses what would change dtype or device, before anything is changed."""
        probe = fn(torch.empty(0, dtype=WIDE))
        if probe.dtype != WIDE or probe.device.type not in ("cpu", "meta"):
            raise TypeError(
                f"gpt2fast: a model with int{self.bits} weights must stay {dtype_name(WIDE)} on the CPU, got "
                f"{dtype_name(probe.dtype)} on {probe.device}; {AGAIN}"
            )
        return super()._apply(fn, recurse)

    def requires_grad_(self, requires_grad: bool = True) -> "Packed":
        refuse_training(requires_grad, f"int{self.bits}")
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, buffer in self.named_buffers(recurse=False):
            given = state_dict.get(prefix + name)
            if given is not None and (given.dtype != buffer.dtype or given.shape != buffer.shape):
                raise ValueError(
                    f"gpt2fast: {prefix}{name} must be packed, {dtype_name(buffer.dtype)} {tuple(buffer.shape)}, got "
                    f"{dtype_name(given.dtype)} {tuple(given.shape)}; {AGAIN}"
                )
        super()._load_from_state_dict(state_dict, prefix, *rest)


class PackedLinear(Packed):
    """activation(x @ weight^T + bias) + residual, with a weight packed in 8 or 4 bits and a bias (N,)."""

    def __init__(self, inputs: int, outputs: int, bits: int):
        super().__init__(outputs, inputs, bits)
        self.register_buffer("bias", torch.zeros(outputs, dtype=WIDE))

    def forward(self, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        """x (..., K) and residual (..., N) or None, to (..., N)."""
        if self.bits == 8:
            return ops.int8_linear(x, self.weight, self.scale, self.bias, residual, activation)
        return ops.int4_linear(x, self.weight, self.bias, residual, activation)


class PackedEmbedding(Packed):
    """A table (V, C) packed in 8 bits: rows to look up, and the head that gives logits."""

    def __init__(self, rows: int, size: int):
        super().__init__(rows, size, 8)

    def look_up(
        self, tokens: Tensor, wpe: Tensor, positions: Tensor | None, token_types: Tensor | None, start: int
    ) -> Tensor:
        """weight[tokens] + wpe[positions] (+ weight[token_types]), (B, T, C), as the op ``int8_embedding``."""
        return ops.int8_embedding(tokens, self.weight, self.scale, wpe, positions, token_types, start)

    def forward(self, tokens: Tensor) -> Tensor:
        """The rows (..., C) float32 of tokens (...) int64 or int32."""
        return unpack_rows_int8(self.weight, self.scale, self.inputs, tokens)

    def head(self, x: Tensor) -> Tensor:
        """The logits (..., V) of x (..., C)."""
        return ops.int8_linear(x, self.weight, self.scale)


def refuse_training(requires_grad: bool, weights: str) -> None:
    if requires_grad:
        raise TypeError(
            f"gpt2fast: a model with {weights} weights is for inference and has no gradients; "
            'load it with weights="float32" or "bfloat16" to train it'
        )


def convert_skeleton(model: nn.Module, weights: str) -> None:
    """Replaces the linear layers of a GPT2's blocks, and its tables of tokens, by packed modules without contents.

    ``weights`` is a key of BITS. The head and the table of tokens have 8 bits in both formats.
    """
    config = model.config
    for block in model.h:
        for parent, name in layers_of(block):
            linear = getattr(parent, name)
            inputs, outputs = linear.weight.shape
            setattr(parent, name, PackedLinear(inputs, outputs, BITS[weights]))
    model.wte = PackedEmbedding(config.vocab_size, config.n_embd)
    if model.lm_head is not None:
        model.lm_head = PackedEmbedding(config.vocab_size, config.n_embd)


def layers_of(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """The linear layers of a block, each as its parent module and its name there."""
    return [(block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc"), (block.mlp, "c_proj")]


def pack(model: nn.Module, weights: str) -> nn.Module:
    """Replaces the weights of a GPT2 in place by packed ones, one after the other. Returns the model.

    Args: model, a GPT2 of stock parts with floating-point weights on the CPU; weights, ``"int8"`` or ``"int4"``.
    Errors: ValueError for an unknown format or a weight with NaN or infinity, TypeError for a model that is packed.
    """
    from .model import GPT2  # imported here, because it imports this module

    need_format(weights)
    if not isinstance(model, GPT2):
        raise TypeError(
            f"gpt2fast.pack: model must be a gpt2fast.GPT2, got {type(model).__module__}.{type(model).__qualname__}; "
            "take GPT2.from_transformers(model), or GPT2LMHeadModel.from_pretrained(folder, weights=...)"
        )
    if weights_of(model) is not None:
        raise TypeError(f"gpt2fast.pack: model must have floating-point weights, got {weights_of(model)}")
    if found := model.graph_obstacle():
        raise ValueError(f"gpt2fast.pack: model must have stock parts in evaluation mode, got one of which {found}")
    before = dict(model.named_parameters())
    if wrong := next((name for name, p in before.items() if not p.is_cpu), None):
        raise ValueError(f"gpt2fast.pack: model must be on the CPU, got {wrong} on {before[wrong].device}")
    with torch.device("meta"):
        convert_skeleton(model, weights)
    for name in list(before):  # each one is free once it is packed
        take(model, name, before.pop(name).detach())
    return model.eval()


def take(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a parameter of the checkpoint into a model with packed modules: packed, or in float32.

    A weight of a linear layer is (K, N) in the checkpoint.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, Packed) and leaf == "weight":
        try:
            module.fill(tensor.t() if isinstance(module, PackedLinear) else tensor)
        except ValueError as error:
            raise ValueError(f"{error} (in {name})") from None
    elif isinstance(module, Packed):
        setattr(module, leaf, tensor.to(WIDE))
    else:
        setattr(module, leaf, nn.Parameter(tensor.to(WIDE), requires_grad=False))


def weights_of(model: nn.Module) -> str | None:
    """The format of a model's packed weights, or None where they are not packed."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            return f"int{module.bits}"
    return "int8" if any(isinstance(module, Packed) for module in model.modules()) else None


def need_format(weights: str) -> None:
    if weights not in BITS:
        raise ValueError(f"gpt2fast.pack: weights must be one of {', '.join(BITS)}, got {weights!r}")
