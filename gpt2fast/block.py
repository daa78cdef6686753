"""The arithmetic of a block: which op gets which tensors, and where activation, dropout and residual are fused.

``gpt2fast.GPT2``, the drop-in's forward and its ``generate`` all run these functions. Here, ``linear`` is a layer with
a weight (in, out) and a bias, and ``norm`` is a layer with weight, bias and eps. Most functions read a layer's
parameters and call an op, so that the layer's hooks do not run. The caller has made sure that a call of the layer would
do no more than the op. The docstrings say where a layer is called as a module, with its hooks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops
from .cache import Cache
from .checks import is_autocast, keeps_grad
from .ops.mlp import trains_as_one
from .packed import PackedEmbedding, PackedLinear

Step = Callable[[Tensor], Tensor]


def normalize(norm: Any, x: Tensor) -> Tensor:
    """layer_norm(x) over the last dimension, in x's shape."""
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)


def project(linear: Any, x: Tensor, activation: str = "none") -> Tensor:
    """activation(x @ weight + bias), from x (..., in) to (..., out)."""
    if type(linear) is PackedLinear:
        return linear.forward(x, activation)
    weight, bias = linear.weight, linear.bias
    keep = activation != "none" and torch.is_grad_enabled() and keeps_grad(x, weight, bias)
    return ops.linear(x, weight, bias, None, activation, False, keep)


def embed(
    wte: Any, wpe: Any, tokens: Tensor, positions: Tensor | None, token_types: Tensor | None, start: int
) -> Tensor:
    """wte[tokens] + wpe[positions] (+ wte[token_types]), (B, T, C), from two tables as modules."""
    if type(wte) is PackedEmbedding:
        return wte.look_up(tokens, wpe.weight, positions, token_types, start)
    return ops.embedding(tokens, wte.weight, wpe.weight, positions, token_types, start)


def head(table: Any, x: Tensor) -> Tensor:
    """The logits (..., V) of x (..., C), from the table of tokens or from a head of its own."""
    if type(table) is PackedEmbedding:
        return table.head(x)
    return ops.linear(x, table.weight, transposed=True)


def heads(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """Splits x (B, T, 3 H D) into q, k and v (B, T, H, D), with H = ``count``. They are views of x."""
    B, T, C = x.shape
    return x.view(B, T, 3, count, C // (3 * count)).unbind(2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    cache: Cache | None = None,
    layer: int = 0,
    *,
    scale: float,
    dropout: float = 0.0,
    bias: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Attention up to, and without, the output projection: (B, T, H D).

    Args: q (B, T, H, D); k, v (B, S, H, D), which are appended to the layer's earlier ones where there is a cache;
    padding (B, S) bool, False hides a key; bias (B or 1, H or 1, T, S), added to the scores; dropout: the probability
    of dropping an attention weight.
    """
    if cache is not None:
        k, v = cache.append(layer, k, v)
        if cache.decodes(q.shape[1]):
            return ops.decode_attention(q, k, v, cache.lengths, cache.starts, scale=scale).flatten(2)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=q.device) if dropout else None
    return ops.attention(q, k, v, padding, bias, seed, causal, 0, scale, dropout).flatten(2)


def join(linear: Any, x: Tensor, residual: Tensor | None, dropout: Step | None = None, bare: bool = True) -> Tensor:
    """residual + dropout(linear(x)), with x (..., in) and residual (..., out) or None.

    This is one op where the residual is added directly to the product. Otherwise ``linear`` is called as a module.
    ``dropout`` None means no dropout. ``bare`` says that a call of ``linear`` does no more than the op. Under autocast
    the product has a lower dtype than the residual stream, so that the sum is a second op.
    """
    if type(linear) is PackedLinear and bare and dropout is None:
        return linear.forward(x, "none", residual)
    if bare and dropout is None and residual is not None and x.dtype == residual.dtype and not is_autocast(x):
        return ops.linear(x, linear.weight, linear.bias, residual, "none", False, False)
    y = linear(x)
    y = y if dropout is None else dropout(y)
    return y if residual is None else residual + y


def mlp(
    c_fc: Any,
    c_proj: Any,
    x: Tensor,
    residual: Tensor | None,
    fused: str | None,
    act: Step | None = None,
    dropout: Step | None = None,
    bare: bool = True,
    call: Callable[[Any, Tensor, str], Tensor] = project,
) -> Tensor:
    """residual + dropout(c_proj(act(c_fc(x)))), with x and residual (B, T, C).

    ``fused`` is the op's name for the activation, which then runs inside c_fc's op. If it is None, c_fc and ``act`` are
    called as modules. ``call`` runs c_fc with a fused activation. ``dropout`` and ``bare`` go to ``join`` for c_proj.
    """
    if fused is None:
        x = act(c_fc(x))
        return join(c_proj, x, residual, dropout, bare)
    packed = type(c_fc) is PackedLinear or type(c_proj) is PackedLinear
    # Decoding must not spend time on looking up the weights.
    if torch.is_grad_enabled() and bare and dropout is None and not packed:
        weights = c_fc.weight, c_proj.weight
        if trains_as_one(x, residual, *weights):
            biases = c_fc.bias, c_proj.bias
            return ops.mlp(x, *weights, *biases, residual, fused, keep=keeps_grad(x, *weights, *biases))
    x = call(c_fc, x, fused)
    return join(c_proj, x, residual, dropout, bare)
