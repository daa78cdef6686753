"""Decoding on a CPU in C++, csrc/torch/decode_step.cpp: a step of the model and the draw after it, for many tokens.

It runs the kernels of the ops with the same arguments, so that logits and tokens are the same. What it leaves out is
the time between the ops: Python, the dispatcher, and a parallel region for each op.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import activations, backends
from .cache import Cache
from .checks import is_autocast
from .extension import _C
from .op import OPS

# The ops whose kernels the step runs.
STAND_FOR = (
    "embedding", "layer_norm", "linear", "decode_attention", "int8_embedding", "int8_linear", "int4_linear", "sample",
)  # fmt: skip
_PLAIN = (Tensor, torch.nn.Parameter)


def obstacle(model: Any) -> str | None:
    """Why a step of this model must call the modules and ops, or None.

    ``model`` is a ``GPT2`` or a ``Bare``, in evaluation mode.
    """
    weight, config = model.ln_f.weight, model.config
    if _C is None:
        return "the C++ kernels are not built"
    if backends.active() not in ("auto", "cpu") or backends.cpu_counts_as_cuda():
        return f"backend {backends.active()!r} is in force"
    for name in STAND_FOR:
        if OPS[name].reference.__module__ != f"{__package__}.ops.{name}":
            return f"the op {name} was declared again"
    if torch.is_grad_enabled() or is_autocast(weight):
        return "autograd or autocast is on"
    if torch._C._len_torch_dispatch_stack() or torch._C._is_torch_function_mode_enabled():
        return "a mode of torch sees every op"
    if found := model.step_obstacle():
        return found
    if config.activation_function not in activations.FUSED:
        return f"activation {config.activation_function!r} is not part of the kernels"
    for name, buffer in model.named_buffers():
        if not (buffer.is_cpu and buffer.is_contiguous()):
            return f"{name} is no contiguous tensor on the CPU"
    for name, parameter in model.named_parameters():
        if type(parameter) not in _PLAIN or not parameter.is_cpu or not parameter.is_contiguous():
            return f"{name} is no contiguous tensor on the CPU"
        if parameter.dtype != weight.dtype:
            return f"{name} is {parameter.dtype}, ln_f.weight is {weight.dtype}"
    example = weight.new_empty(1, 1, 1, config.head_size)
    return _C.cpu_objection(OPS["decode_attention"].qualified, example)


class Step:
    """The step of a model for batches of one size, with the parameters that the model has now."""

    def __init__(self, model: Any, batch: int):
        config = model.config
        layers, scales = [], []
        for index, block in enumerate(model.h):
            attn, mlp = block.attn, block.mlp
            parameters = [block.ln_1.weight, block.ln_1.bias, *_linear(attn.c_attn), *_linear(attn.c_proj)]
            parameters += [block.ln_2.weight, block.ln_2.bias, *_linear(mlp.c_fc), *_linear(mlp.c_proj)]
            layers.append(parameters)
            scales.append(config.scale(index))
        head = model.wte if model.lm_head is None else model.lm_head
        self._native = _C.DecodeStep(
            batch, config.n_head, config.vocab_size, config.layer_norm_epsilon,
            activations.FUSED[config.activation_function], layers, scales, _linear(model.wte), model.wpe.weight,
            model.ln_f.weight, model.ln_f.bias, _linear(head),
        )  # fmt: skip
        self._keys: list[Tensor] | None = None

    def logits(self, tokens: Tensor, positions: Tensor | None, cache: Cache) -> Tensor:
        """Adds one token for each row to the cache and returns the logits (B, V). The next call overwrites them.

        tokens (B, 1) and positions (B, 1) int64; by default, positions continue from the cache's length. Raises
        ValueError or TypeError for a wrong shape or dtype, a token or position out of range, or a cache that does not
        fit.
        """
        column = cache.length
        self._reserve(cache, 1)
        cache.advance(1)
        return self._native.logits(tokens, positions, cache.lengths, cache.starts, column)

    def set_draw(self, seed: Tensor, rows: Tensor | None, options: dict[str, Any]) -> None:
        """Sets how ``decode`` draws: seed (1,), rows (B,) and the other arguments of the op ``sample``."""
        names = "temperature", "top_k", "top_p", "min_p", "repetition_penalty"
        self._native.set_draw(seed, rows, *(options[name] for name in names))

    def decode(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        real: Tensor,
        seen: Tensor | None,
        cache: Cache,
        most: int,
        alive: Tensor,
        pad: int,
        ends: Sequence[int],
    ) -> Tensor:
        """Reads ``tokens`` and draws the next ones, up to ``most`` times. Returns the new tokens (B, n) int64.

        tokens (B, 1) were drawn last and are not read yet. positions (B, 1) and real (B,), the number of tokens of a
        row without padding, are those of the tokens before them. All are brought up to date. seen (B, columns) has the
        tokens for the repetition penalty and gets the new ones. Rows for which alive (B,) is False get ``pad``. After a
        turn in which another row draws one of ``ends``, no further one is run. Errors as for ``logits`` and for the op
        ``sample``. After an error or an interrupt, neither the cache nor these tensors can be used.
        """
        self._reserve(cache, most)
        out = tokens.new_empty(cache.batch, most)
        lengths = cache.lengths.clone()
        count = self._native.decode(
            tokens, positions, lengths, cache.starts, cache.length, real, seen, out, alive, pad, list(ends)
        )
        cache.advance(count)
        return out[:, :count]

    def _reserve(self, cache: Cache, columns: int) -> None:
        """Makes room for so many new columns."""
        if cache.mask is not None or cache.fixed:
            raise ValueError("gpt2fast.Step: cache must have no mask but padding on the left, and must not be fixed")
        cache.reserve(cache.length + columns)
        if self._keys is not cache.keys:  # the cache has new memory
            self._native.set_cache(cache.keys, cache.values)
            self._keys = cache.keys


def _linear(module: Any) -> list[Tensor | None]:
    """Weight, bias and scale of a linear layer or a table, packed or not."""
    return [module.weight, getattr(module, "bias", None), getattr(module, "scale", None)]
