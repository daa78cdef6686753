"""The ops, one file each. ``gpt2fast.ops.layer_norm(x, weight, bias)`` runs on whatever backend is active."""

from .add_layer_norm import add_layer_norm
from .attention import attention, attention_backward
from .bias_gelu import bias_gelu
from .cross_entropy import cross_entropy, cross_entropy_backward
from .decode_attention import decode_attention
from .embedding import embedding, embedding_backward
from .gelu import gelu, gelu_backward
from .layer_norm import layer_norm, layer_norm_backward
from .linear import linear, linear_backward
from .sample import sample

__all__ = [
    "add_layer_norm",
    "attention",
    "attention_backward",
    "bias_gelu",
    "cross_entropy",
    "cross_entropy_backward",
    "decode_attention",
    "embedding",
    "embedding_backward",
    "gelu",
    "gelu_backward",
    "layer_norm",
    "layer_norm_backward",
    "linear",
    "linear_backward",
    "sample",
]

from .. import backends

backends.start()
