"""The arithmetic of a block, once: which op gets what, and where activation, dropout and residual are fused.

``gpt2fast.GPT2``, the drop-in's forward and its ``generate`` run these functions. A ``linear`` is a layer with a weight
(in, out) and a bias, a ``norm`` one with weight, bias and eps. They are called as modules, which runs their hooks, only
where that is said; elsewhere the caller knows that the op is all that a call would do.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops
from .cache import Cache
from .checks import is_autocast, keeps_grad
from .ops.mlp import trains_as_one

Step = Callable[[Tensor], Tensor]


def normalize(norm: Any, x: Tensor) -> Tensor:
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)


def project(linear: Any, x: Tensor, activation: str = "none") -> Tensor:
    """activation(x @ weight + bias), with x (..., in): (..., out)."""
    weight, bias = linear.weight, linear.bias
    keep = activation != "none" and torch.is_grad_enabled() and keeps_grad(x, weight, bias)
    return ops.linear(x, weight, bias, activation=activation, keep_preactivation=keep)


def heads(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """q, k and v (B, T, H, D), H being ``count``: views of x (B, T, 3 H D)."""
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
    """What the tokens see, (B, T, H D), before the projection that follows.

    Args: q (B, T, H, D); k, v (B, S, H, D), which join the layer's earlier ones where there is a cache; padding (B, S)
    bool, False hides a key; bias (B or 1, H or 1, T, S), added to the scores; dropout: of the probabilities.
    """
    if cache is not None:
        k, v = cache.append(layer, k, v)
        if cache.decodes(q.shape[1]):
            return ops.decode_attention(q, k, v, cache.lengths, cache.starts, scale=scale).flatten(2)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=q.device) if dropout else None
    return ops.attention(q, k, v, padding, bias, seed, causal, 0, scale, dropout).flatten(2)


def join(linear: Any, x: Tensor, residual: Tensor | None, dropout: Step | None = None, bare: bool = True) -> Tensor:
    """residual + dropout(linear(x)): one op where nothing comes in between, else ``linear`` is called as a module.

    x (..., in), residual (..., out) or None. ``dropout`` None: it does nothing; ``bare``: the op is all of ``linear``.
    Under autocast the residual stream keeps its dtype, and the product has a lower one: two ops.
    """
    if bare and dropout is None and residual is not None and x.dtype == residual.dtype and not is_autocast(x):
        return ops.linear(x, linear.weight, linear.bias, residual)
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

    ``fused``: the op's name for the activation, which runs inside c_fc's op; None: c_fc and ``act`` are called as
    modules. ``call``: how a fused c_fc is run. ``dropout`` and ``bare`` are those of ``join``, for c_proj.
    """
    if fused is None:
        x = act(c_fc(x))
        return join(c_proj, x, residual, dropout, bare)
    if torch.is_grad_enabled() and bare and dropout is None:  # in decoding, the weights are not even looked up
        weights = c_fc.weight, c_proj.weight
        if trains_as_one(x, residual, *weights):
            biases = c_fc.bias, c_proj.bias
            return ops.mlp(x, *weights, *biases, residual, fused, keep=keeps_grad(x, *weights, *biases))
    x = call(c_fc, x, fused)
    return join(c_proj, x, residual, dropout, bare)
