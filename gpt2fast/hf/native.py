"""Decides whether the native model can replace a transformers model, and runs the latter's modules by our formulas.

It can, if every expected part is there, is of the stock class and has the usual settings. A part that is missing, or is
of another class, is an obstacle, and so is a part that is not expected.
"""

import torch
from torch import Tensor, nn
from transformers.models.gpt2 import modeling_gpt2 as stock

from .. import activations
from .. import weights as checkpoint
from ..block import attend, heads, join, mlp, normalize, project
from ..cache import Cache
from ..checks import embedding_obstacle, keep_forwards, obstacle, weight_obstacle
from ..config import Config
from ..model import GPT2
from ..packed import Packed, PackedEmbedding, PackedLinear, weights_of
from . import blocks
from .convert import to_ours
from .packed import PackedHead, part_obstacle

_NORM = (blocks.LayerNorm, nn.LayerNorm)
# The expected modules of a model and of a block, and the classes that they may have.
_MODEL = {
    "wte": (nn.Embedding, PackedEmbedding),
    "wpe": (nn.Embedding,),
    "drop": blocks.DROPOUT,
    "h": (nn.ModuleList,),
    "ln_f": _NORM,
}
_BLOCK = {
    "": (blocks.GPT2Block, stock.GPT2Block),
    "ln_1": _NORM,
    "attn": (blocks.GPT2Attention, stock.GPT2Attention),
    "attn.c_attn": blocks.LINEAR,
    "attn.c_proj": blocks.LINEAR,
    "attn.attn_dropout": blocks.DROPOUT,
    "attn.resid_dropout": blocks.DROPOUT,
    "ln_2": _NORM,
    "mlp": (blocks.GPT2MLP, stock.GPT2MLP),
    "mlp.c_fc": blocks.LINEAR,
    "mlp.act": tuple(blocks.ACTIVATIONS),
    "mlp.c_proj": blocks.LINEAR,
    "mlp.dropout": blocks.DROPOUT,
}
_HEAD = (nn.Linear, PackedHead)
keep_forwards(PackedHead, stock.GPT2Block, stock.GPT2Attention, stock.GPT2MLP)


class Bare(GPT2):
    """The native model over the modules of a drop-in model. Each module is run by its formula, without being called.

    All parts must be stock, and no dropout may be active.
    """

    def __init__(self):
        nn.Module.__init__(self)
        self.config, self.expected = None, {}
        self.eval()

    def take(self, model: nn.Module) -> str | None:
        """Takes the present modules of a model with a head. Returns why its parameters do not fit, or None."""
        if weights_of(model) is not None:
            return self._take_packed(model)
        config, state = native_state(model)
        first = model.transformer.wte.weight
        for name, parameter in state.items():
            if type(parameter) is not nn.Parameter:
                return f"{name} is a {type(parameter).__name__}"
            if parameter.dtype != first.dtype or parameter.device != first.device:
                return "its parameters differ in dtype or device"
        if config != self.config:
            with torch.device("meta"):
                self.config, self.expected = config, GPT2(config).shapes()
        try:
            checkpoint.check(self.expected, {name: tuple(p.shape) for name, p in state.items()}, "the given state")
        except ValueError as error:
            return str(error).removeprefix("gpt2fast: ")
        self._take_modules(model, config)
        return None

    def _take_packed(self, model: nn.Module) -> str | None:
        """As ``take`` for packed weights. The parts have the sizes of the config: stock_obstacle has checked them."""
        self.config = config = native_config(model)
        dtypes = {p.dtype for p in model.parameters()}
        packed = sum(isinstance(module, Packed) for module in model.transformer.modules())
        if dtypes != {torch.float32} or packed != 1 + 4 * config.n_layer or type(model.lm_head) is not PackedHead:
            return "only a part of it is packed"
        self._take_modules(model, config)
        return None

    def _take_modules(self, model: nn.Module, config: Config) -> None:
        root = model.transformer
        self.wte, self.wpe, self.h, self.ln_f = root.wte, root.wpe, root.h, root.ln_f
        head = model.lm_head.table if type(model.lm_head) is PackedHead else model.lm_head
        self.lm_head = None if config.tie_word_embeddings else head

    def _run(self, x: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        for block in self.h:
            x = run_block(block, x, mask, cache)
        return x

    def graph_obstacle(self) -> None:
        """None, because stock_obstacle has checked the model already."""

    step_obstacle = graph_obstacle


def run_block(block: nn.Module, x: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
    """Runs a block of stock parts without dropout on x (B, T, C), by the formulas only."""
    attn, inner = block.attn, block.mlp
    q, k, v = heads(project(attn.c_attn, normalize(block.ln_1, x)), attn.num_heads)
    y = attend(q, k, v, mask, cache, attn.layer_idx, scale=attn.scaling)
    x = join(attn.c_proj, y, x)
    return mlp(inner.c_fc, inner.c_proj, normalize(block.ln_2, x), x, blocks.ACTIVATIONS[type(inner.act)])


def native_config(model: nn.Module) -> Config:
    """The native config. The head is tied where it has the weight of the table of tokens, whatever the config says."""
    config = Config.from_dict(model.config.to_dict())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    config.tie_word_embeddings = head is None or head.weight is embedding.weight
    return config


def native_state(model: nn.Module) -> tuple[Config, dict[str, nn.Parameter]]:
    """Config and parameters of a transformers GPT2Model, or of one with a language-model head, for the native model.

    Raises ValueError or TypeError for a config that the native model cannot have.
    """
    config = native_config(model)
    named = model.named_parameters(remove_duplicate=False)
    state = {checkpoint.native_name(name): p for name, p in named if not name.startswith(GPT2.UNUSED)}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return config, state


def stock_obstacle(model: nn.Module, for_text: bool = False) -> str | None:
    """Why the native model would compute something else than ``model``, or None.

    ``model`` is a GPT2Model or a model with a language-model head. ``for_text`` is for ``generate``: the model must be
    one of ours with a head, and no dropout may be active.
    """
    root = getattr(model, "transformer", model)
    for module in (model,) if root is model else (model, root):
        kind = type(module)
        if for_text and kind not in to_ours().values():
            return f"{kind.__module__}.{kind.__qualname__} is not the stock class"
        if found := obstacle(module, (kind,)):
            return f"{kind.__name__}: {found}"
        defines = next(base for base in kind.__mro__ if "forward" in vars(base))
        if not defines.__module__.startswith((stock.__name__, __package__ + ".")):
            return f"{kind.__name__} has a forward of its own"
    try:
        config = Config.from_dict(model.config.to_dict())
    except (ValueError, TypeError) as error:
        return f"its config: {error}"
    prefix = "" if root is model else "transformer."
    expected = {prefix + name: kinds for name, kinds in _MODEL.items()}
    if for_text or getattr(model, "lm_head", None) is not None:
        expected["lm_head"] = _HEAD
    if hasattr(getattr(model, "lm_head", None), "own"):  # a packed head that is not tied
        expected["lm_head.own"] = (PackedEmbedding,)
    for layer in range(config.n_layer):
        expected |= {f"{prefix}h.{layer}.{leaf}".rstrip("."): kinds for leaf, kinds in _BLOCK.items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in expected:
        if name not in modules:
            return f"missing: {name.removeprefix(prefix)}"
    for name, module in modules.items():
        if module is model or module is root:
            continue
        if name.startswith(GPT2.UNUSED):
            found = obstacle(module, (type(module),))
        elif name not in expected:
            found = "no part of a GPT-2"
        else:
            found = _part_obstacle(name.removeprefix(prefix), module, expected[name], config, for_text)
        if found:
            return f"{name}: {found}"
    return None


def _part_obstacle(name: str, module: nn.Module, kinds: tuple[type, ...], config: Config, for_text: bool) -> str | None:
    layer, _, leaf = name.removeprefix("h.").partition(".")
    named = type(stock.ACT2FN[config.activation_function])  # the native model has it too, fused or not
    if leaf == "mlp.act" and not for_text:
        kinds = (named, *kinds)
    if kinds == blocks.DROPOUT and for_text:
        found = blocks.dropout_obstacle(module)
    elif type(module) in (PackedLinear, PackedEmbedding, PackedHead):
        found = obstacle(module, kinds) or part_obstacle(module, config, leaf)
    elif getattr(module, "weight", None) is None:
        found = obstacle(module, kinds)
    elif kinds in (_MODEL["wte"], _MODEL["wpe"]):
        found = embedding_obstacle(module, trained=False)
    else:
        found = weight_obstacle(module, kinds)
    if found:
        return found
    if isinstance(module, nn.LayerNorm) and module.eps != config.layer_norm_epsilon:
        return "its eps is not the config's"
    form = activations.FUSED.get(config.activation_function)
    if leaf == "mlp.act" and type(module) is not named and blocks.ACTIVATIONS[type(module)] != form:
        return f"it is not the config's {config.activation_function!r}"
    return _attention_obstacle(module, int(layer), config, for_text) if leaf == "attn" else None


def _attention_obstacle(attn: nn.Module, layer: int, config: Config, for_text: bool) -> str | None:
    if attn.is_cross_attention or not attn.is_causal:
        return "is_causal was changed"
    if for_text and (found := blocks.attention_obstacle(attn, {})):
        return found
    if for_text and attn.training and attn.attn_dropout.p > 0:
        return "dropout is active"
    sizes = (attn.num_heads, attn.head_dim, attn.split_size) == (config.n_head, config.head_size, config.n_embd)
    same = sizes and attn.scaling == config.scale(layer) and attn.layer_idx == layer
    return None if same else "its heads, scaling or layer are not the config's"
