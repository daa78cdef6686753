"""A decoder block of one's own in gpt2fast's GPT-2: RMSNorm in the place of layer norm, SwiGLU in that of GELU.

``GPT2(config, block=Block)`` makes the model. The attention is gpt2fast's, the two other ops are those of the packages
rms_norm and swiglu beside this one.
"""

import torch
from rms_norm import rms_norm
from swiglu import swiglu
from torch import Tensor, nn

from gpt2fast.cache import Cache
from gpt2fast.config import Config
from gpt2fast.model import Attention, Linear


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Block(nn.Module):
    """What ``GPT2`` calls: x (B, T, C), the padding mask, and the cache of keys and values while it generates."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.norm_1 = RMSNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.norm_2 = RMSNorm(config.n_embd, config.layer_norm_epsilon)
        self.c_fc = Linear(config.n_embd, 2 * config.inner)
        self.c_proj = Linear(config.inner, config.n_embd)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = self.attn(self.norm_1(x), x, mask, cache)
        gate, up = self.c_fc(self.norm_2(x)).chunk(2, dim=-1)
        return self.c_proj.add_to(x, swiglu(gate, up), dropout=0.0)
