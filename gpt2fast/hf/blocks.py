"""The modules of a block on our ops. Each is a subclass of the transformers or torch module that it replaces.

It has the same name and the same weights. A block calls its parts as modules, with three exceptions: the activation is
fused into c_fc, the residual is fused into c_proj, and the containers ``attn`` and ``mlp`` are not called themselves.
An exception applies only while checks.obstacle finds nothing that a call as a module would do in addition.
"""

from torch import Tensor, nn
from transformers import activations, pytorch_utils
from transformers.cache_utils import EncoderDecoderCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import modeling_gpt2 as stock

from .. import ops
from ..block import attend, join, mlp
from ..checks import is_autocast, is_plain, keep_forwards, obstacle, stands_in, weight_obstacle
from ..packed import PackedEmbedding, PackedLinear
from .masks import Visible, from_theirs, maker_obstacle, theirs

_SDPA_OPTIONS = ("is_causal", "position_bias", "softcap", "cache")


class Conv1D(pytorch_utils.Conv1D):
    @stands_in(pytorch_utils.Conv1D)
    def forward(self, x):
        weight = self.weight
        if not is_plain(weight):
            return super().forward(x)
        return ops.linear(x, weight, self.bias, None, "none", False, False)


class LayerNorm(nn.LayerNorm):
    @stands_in(nn.LayerNorm)
    def forward(self, input):
        weight, bias = self.weight, self.bias  # a module's attributes are slow to look up
        if norm_obstacle(weight, bias) is not None or (input.dtype != weight.dtype and not is_autocast(input)):
            return super().forward(input)
        return ops.layer_norm(input, weight, bias, self.eps)


def norm_obstacle(weight: Tensor | None, bias: Tensor | None) -> str | None:
    """Why no op of ours can compute a LayerNorm with these parameters, or None."""
    if weight is None or bias is None:
        return "it has no weight or no bias"
    if weight.dim() != 1:
        return "it normalises over several dimensions"
    return None if is_plain(weight) else f"its weight is a {type(weight).__name__}"


class NewGELUActivation(activations.NewGELUActivation):
    @stands_in(activations.NewGELUActivation)
    def forward(self, input):
        return ops.gelu(input, "tanh")


class GELUTanh(activations.GELUTanh):
    @stands_in(activations.GELUTanh)
    def forward(self, input):
        return ops.gelu(input, "tanh")


class AccurateGELUActivation(activations.AccurateGELUActivation):
    @stands_in(activations.AccurateGELUActivation)
    def forward(self, input):
        return ops.gelu(input, "tanh")


class GELUActivation(activations.GELUActivation):
    @stands_in(activations.GELUActivation)
    def forward(self, input):
        return ops.gelu(input, "none")


CONV1D = (Conv1D, pytorch_utils.Conv1D)
LINEAR = (*CONV1D, PackedLinear)  # whose products block.py fuses
DROPOUT = (nn.Dropout,)
ACTIVATIONS = {
    NewGELUActivation: "gelu_tanh",
    GELUTanh: "gelu_tanh",
    AccurateGELUActivation: "gelu_tanh",
    GELUActivation: "gelu_erf",
}
ACTIVATIONS |= {kind.__bases__[0]: form for kind, form in ACTIVATIONS.items()}


def linear_obstacle(linear: nn.Module) -> str | None:
    """Why a linear layer of a block must be called as a module, or None."""
    return weight_obstacle(linear, LINEAR)


def dropout_obstacle(dropout: nn.Module) -> str | None:
    """Why a dropout cannot be left out, or None."""
    return obstacle(dropout, DROPOUT) or ("dropout is active" if dropout.training and dropout.p > 0 else None)


def act_obstacle(act: nn.Module, c_fc: nn.Module) -> str | None:
    """Why an activation cannot be fused into the product c_fc before it, or None."""
    if type(act) not in ACTIVATIONS:
        return "its activation is no GELU"
    return obstacle(act, (type(act),)) or linear_obstacle(c_fc)


def _needed(dropout: nn.Module) -> nn.Module | None:
    return None if dropout_obstacle(dropout) is None else dropout


class GPT2MLP(stock.GPT2MLP):
    @stands_in(stock.GPT2MLP)
    def forward(self, hidden_states):
        return self.run(hidden_states, None)

    def run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        act, c_fc, c_proj = self.act, self.c_fc, self.c_proj
        fused = ACTIVATIONS[type(act)] if act_obstacle(act, c_fc) is None else None
        return mlp(c_fc, c_proj, x, residual, fused, act, _needed(self.dropout), linear_obstacle(c_proj) is None)


def attention_obstacle(attn: nn.Module, options: dict) -> str | None:
    """Why transformers' own attention code must run, with its own masks, instead of our op; or None."""
    implementation = attn.config._attn_implementation
    if implementation != "sdpa":
        return f"attn_implementation is {implementation!r}"
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:
        return "another function is registered as 'sdpa'"
    if found := maker_obstacle():
        return found
    if attn.is_causal == attn.is_cross_attention:
        return "is_causal was changed"
    if attn.training and attn.attn_dropout.p >= 1:
        return "attention dropout of 1"
    for name in _SDPA_OPTIONS:
        if options.get(name) is not None:
            return f"{name} was passed"
    return None


class GPT2Attention(stock.GPT2Attention):
    @stands_in(stock.GPT2Attention)
    def forward(
        self,
        hidden_states,
        past_key_values=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        output_attentions=False,
        **kwargs,
    ):
        if attention_obstacle(self, kwargs) is not None:
            return super().forward(
                hidden_states,
                past_key_values,
                theirs(attention_mask),
                encoder_hidden_states,
                theirs(encoder_attention_mask),
                output_attentions,
                **kwargs,
            )
        mask = attention_mask if encoder_hidden_states is None else encoder_attention_mask
        return self.run(hidden_states, None, past_key_values, mask, encoder_hidden_states), None

    def run(self, x: Tensor, residual: Tensor | None, past, mask, encoder: Tensor | None = None) -> Tensor:
        """residual + attention(x). It runs the parts directly, so that ``attn`` itself is not called as a module.

        x (B, T, C) is the output of the norm. ``past`` is a Cache of transformers or None, ``mask`` a Visible or
        transformers' mask, and ``encoder`` (B, S, C) or None.
        """
        q, k, v = self._heads(x, past, encoder)
        if not isinstance(mask, Visible):
            mask = from_theirs(mask, q.shape[1], k.shape[1], q.dtype, self.is_causal)
        if mask.length is not None:
            k, v = k[:, : mask.length], v[:, : mask.length]
        p = self.attn_dropout.p if self.training else 0.0
        y = attend(q, k, v, mask.padding, scale=self.scaling, dropout=p, bias=mask.bias, causal=mask.causal)
        c_proj = self.c_proj
        return join(c_proj, y, residual, _needed(self.resid_dropout), linear_obstacle(c_proj) is None)

    def _heads(self, x: Tensor, past, encoder: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, T, H, D), and keys and values (B, S, H, D). They are views of the projections and of the cache."""
        if encoder is None:
            B, T = x.shape[:2]
            q, k, v = self.c_attn(x).reshape(B, T, 3, -1, self.head_dim).unbind(2)
            if past is not None:
                past = past.self_attention_cache if isinstance(past, EncoderDecoderCache) else past
                k, v = past.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
                k, v = k.transpose(1, 2), v.transpose(1, 2)
            return q, k, v
        if not self.is_cross_attention:
            raise ValueError("gpt2fast: encoder_hidden_states were given to a self-attention, which has no q_attn")
        q = self._split(self.q_attn(x))
        if isinstance(past, EncoderDecoderCache) and past.is_updated.get(self.layer_idx):
            layer = past.cross_attention_cache.layers[self.layer_idx]
            return q, layer.keys.transpose(1, 2), layer.values.transpose(1, 2)
        k, v = (self._split(t) for t in self.c_attn(encoder).split(self.split_size, dim=2))
        if isinstance(past, EncoderDecoderCache):
            past.cross_attention_cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
            past.is_updated[self.layer_idx] = True
        return q, k, v

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class GPT2Block(stock.GPT2Block):
    @stands_in(stock.GPT2Block)
    def forward(
        self,
        hidden_states,
        past_key_values=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        use_cache=False,
        **kwargs,
    ):
        x, attn, mlp = hidden_states, self.attn, self.mlp
        normed = self.ln_1(x)
        # A Visible comes from a model that has checked for obstacles already.
        if isinstance(attention_mask, Visible) or attention_step_obstacle(attn, kwargs) is None:
            x = attn.run(normed, x, past_key_values, attention_mask)
        else:
            x = x + attn(
                normed,
                past_key_values=past_key_values,
                attention_mask=theirs(attention_mask),
                use_cache=use_cache,
                **kwargs,
            )[0]  # fmt: skip
        if encoder_hidden_states is not None:
            x = self._cross(x, past_key_values, attention_mask, encoder_hidden_states, encoder_attention_mask)
        normed = self.ln_2(x)
        if obstacle(mlp, (GPT2MLP,)) is None:
            return mlp.run(normed, x)
        return x + mlp(normed)

    def _cross(self, x, past, attention_mask, encoder, mask):
        if not hasattr(self, "crossattention"):
            raise ValueError(
                "gpt2fast: encoder_hidden_states were given to a block without cross attention: "
                "make the model with config.add_cross_attention=True"
            )
        attn, normed = self.crossattention, self.ln_cross_attn(x)
        asked = isinstance(attention_mask, Visible) or attention_step_obstacle(attn, {}) is None
        if asked and (past is None or isinstance(past, EncoderDecoderCache)):
            return attn.run(normed, x, past, mask, encoder)
        return x + attn(
            normed,
            past_key_values=past,
            attention_mask=theirs(attention_mask),
            encoder_hidden_states=encoder,
            encoder_attention_mask=theirs(mask),
        )[0]  # fmt: skip


def attention_step_obstacle(attn: nn.Module, options: dict) -> str | None:
    """Why a block must call its attention as a module, or None."""
    return obstacle(attn, (GPT2Attention,)) or attention_obstacle(attn, options)


def needs_their_mask(block: nn.Module, options: dict) -> bool:
    """Whether the block needs transformers' own mask: it, or a part of it, is called as a module with the mask."""
    if obstacle(block, (GPT2Block,)) is not None or attention_step_obstacle(block.attn, options) is not None:
        return True
    cross = block._modules.get("crossattention")
    return cross is not None and attention_step_obstacle(cross, options) is not None


keep_forwards(*LINEAR, PackedEmbedding, *ACTIVATIONS, LayerNorm, GPT2MLP, GPT2Attention, GPT2Block)
