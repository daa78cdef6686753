"""Whether the native model stands for a transformers model: every part of it is there, is stock, and is set as usual.

What is looked for is what must be there. A part that is missing, is no module or is of any other class is an obstacle,
whoever put it there.
"""

from torch import nn
from transformers.models.gpt2 import modeling_gpt2 as stock

from .. import activations
from ..checks import embedding_obstacle, keep_forwards, obstacle, weight_obstacle
from ..config import Config
from ..model import GPT2
from . import blocks

_NORM = (blocks.LayerNorm, nn.LayerNorm)
# The modules of a model and of a block, with the classes that the native model stands for.
_MODEL = {
    "wte": (nn.Embedding,),
    "wpe": (nn.Embedding,),
    "drop": blocks.DROPOUT,
    "h": (nn.ModuleList,),
    "ln_f": _NORM,
}
_BLOCK = {
    "": (blocks.GPT2Block, stock.GPT2Block),
    "ln_1": _NORM,
    "attn": (blocks.GPT2Attention, stock.GPT2Attention),
    "attn.c_attn": blocks.CONV1D,
    "attn.c_proj": blocks.CONV1D,
    "attn.attn_dropout": blocks.DROPOUT,
    "attn.resid_dropout": blocks.DROPOUT,
    "ln_2": _NORM,
    "mlp": (blocks.GPT2MLP, stock.GPT2MLP),
    "mlp.c_fc": blocks.CONV1D,
    "mlp.act": tuple(blocks.ACTIVATIONS),
    "mlp.c_proj": blocks.CONV1D,
    "mlp.dropout": blocks.DROPOUT,
}
_HEAD = (nn.Linear,)
keep_forwards(stock.GPT2Block, stock.GPT2Attention, stock.GPT2MLP)


def twin_obstacle(model: nn.Module) -> str | None:
    """Why ``GPT2.from_transformers`` would make something else of a GPT2Model, or of one with a head for text."""
    try:
        config = Config.from_dict(model.config.to_dict())
    except (ValueError, TypeError) as error:
        return f"its config: {error}"
    root = getattr(model, "transformer", model)
    for module in {model, root}:
        if found := obstacle(module, (type(module),)):
            return f"{type(module).__name__}: {found}"
        kinds = [kind for kind in type(module).__mro__ if "forward" in vars(kind)]
        if not kinds[0].__module__.startswith((stock.__name__, __package__ + ".")):
            return f"{type(module).__name__} has a forward of its own"
    return parts_obstacle(model, config)


def parts_obstacle(model: nn.Module, config: Config, for_text: bool = False) -> str | None:
    """What of the parts is not as it must be; ``for_text``: dropout must be idle, and there must be a head."""
    root = getattr(model, "transformer", model)
    prefix = "" if root is model else "transformer."
    expected = {prefix + name: stock for name, stock in _MODEL.items()}
    if for_text or getattr(model, "lm_head", None) is not None:
        expected["lm_head"] = _HEAD
    for layer in range(config.n_layer):
        expected |= {f"{prefix}h.{layer}.{leaf}".rstrip("."): stock for leaf, stock in _BLOCK.items()}
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
    named = type(stock.ACT2FN[config.activation_function])  # which the native model has too, fused or not
    if leaf == "mlp.act" and not for_text:
        kinds = (named, *kinds)
    if getattr(module, "weight", None) is None:
        found = obstacle(module, kinds)
    elif kinds == _MODEL["wte"]:
        found = embedding_obstacle(module, trained=False)
    else:
        found = weight_obstacle(module, kinds)
    if found:
        return found
    if isinstance(module, nn.LayerNorm) and module.eps != config.layer_norm_epsilon:
        return "its eps is not the config's"
    if for_text and isinstance(module, nn.Dropout) and module.training and module.p > 0:
        return "dropout is active"
    form = activations.FUSED.get(config.activation_function)
    if leaf == "mlp.act" and type(module) is not named and blocks.ACTIVATIONS[type(module)] != form:
        return f"it is not the config's {config.activation_function!r}"
    return _attention_obstacle(module, int(layer), config, for_text) if leaf == "attn" else None


def _attention_obstacle(attn: nn.Module, layer: int, config: Config, for_text: bool) -> str | None:
    if attn.is_cross_attention or not attn.is_causal:
        return "is_causal was changed"
    if for_text and attn.training and attn.attn_dropout.p > 0:
        return "dropout is active"
    sizes = (attn.num_heads, attn.head_dim, attn.split_size) == (config.n_head, config.head_size, config.n_embd)
    same = sizes and attn.scaling == config.scale(layer) and attn.layer_idx == layer
    return None if same else "its heads, scaling or layer are not the config's"
