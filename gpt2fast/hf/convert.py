"""optimize and restore: every module of a GPT-2 changes its class, in place; parameters, hooks and attributes stay."""

import copyreg
import sys

from torch import nn
from transformers.models.gpt2 import modeling_gpt2 as stock
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from ..checks import is_own_forward
from . import blocks

ROOTS = (stock.GPT2PreTrainedModel, stock.GPT2Block, stock.GPT2Attention, stock.GPT2MLP)
MODELS = (
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2DoubleHeadsModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2ForQuestionAnswering",
)
PARTS = (
    blocks.Conv1D,
    blocks.LayerNorm,
    blocks.NewGELUActivation,
    blocks.GELUTanh,
    blocks.AccurateGELUActivation,
    blocks.GELUActivation,
    blocks.GPT2MLP,
    blocks.GPT2Attention,
    blocks.GPT2Block,
)


class _Named(type):
    """Of our model classes, which say that they are transformers': libraries write a class' module into saved files.

    PEFT does, and a file that named ours could be read with gpt2fast only. Pickle finds our classes by ``_by_name``.
    """


def _by_name(name: str) -> type:
    return getattr(sys.modules[f"{__package__}.models"], name)


def _reduce(kind: type):
    return (_by_name, (kind.__name__,)) if kind in to_ours().values() else kind.__qualname__


copyreg.pickle(_Named, _reduce)


class Optimized(metaclass=_Named):
    """What our model classes share: built or loaded like transformers' own, then switched to our modules."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        _swap(self, to_ours())

    def __setstate__(self, state):
        super().__setstate__(state)
        _enable_recording(self)


def to_ours() -> dict[type, type]:
    """transformers' (or torch's) class to ours."""
    models = sys.modules[f"{__package__}.models"]
    pairs = {getattr(stock, name): getattr(models, name) for name in MODELS}
    return pairs | {part.__bases__[0]: part for part in PARTS}


def optimize(model: nn.Module, fused_loss: bool = False) -> nn.Module:
    """Switches every GPT-2 in ``model`` (one of transformers' or anything that holds one) to our modules, in place.

    Only modules whose class is exactly transformers' or torch's change theirs: subclasses, adapters, quantised layers
    and parametrized modules stay as they are and go on being called. ``fused_loss``: a GPT2LMHeadModel in training mode
    that is given labels computes its loss without its logits, which take most of the memory of a training step; the
    output's ``logits`` are None then. Returns the same object; restore() undoes it.
    Raises TypeError where there is no GPT-2 in it, ValueError for ``fused_loss`` where none has a language-model head.
    """
    roots = _roots(model)
    pairs = to_ours()
    for root in roots:
        _swap(root, pairs)
    heads = [m for m in model.modules() if type(m) is pairs[stock.GPT2LMHeadModel]]
    if fused_loss and not heads:
        raise ValueError(f"gpt2fast: fused_loss needs a GPT2LMHeadModel, got {type(model).__name__}")
    for module in heads:
        module.fused_loss = fused_loss
    return model


def restore(model: nn.Module) -> nn.Module:
    """Gives every module that optimize() or our classes switched its class of transformers or torch back, in place."""
    pairs = {ours: theirs for theirs, ours in to_ours().items()}
    for root in _roots(model):
        _swap(root, pairs)
    for module in model.modules():
        module.__dict__.pop("fused_loss", None)
    return model


def _roots(model: nn.Module) -> list[nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"gpt2fast: model must be a torch.nn.Module, got {type(model).__name__}")
    roots = [module for module in model.modules() if isinstance(module, ROOTS)]
    if not roots:
        raise TypeError(f"gpt2fast: model must be or hold a GPT-2 of transformers, got {type(model).__name__}")
    return roots


def _swap(root: nn.Module, pairs: dict[type, type]) -> None:
    for module in root.modules():
        if (other := pairs.get(type(module))) is not None:
            _rebind(module, other)
            module.__class__ = other
            if isinstance(module, stock.GPT2PreTrainedModel):
                _enable_recording(module)


def _rebind(module: nn.Module, other: type) -> None:
    """Hooks of accelerate keep the bound forward of the class in ``_old_forward``, removed ones in ``forward``."""
    for name in ("forward", "_old_forward"):
        kept = module.__dict__.get(name)
        if kept is not None and is_own_forward(module, kept):
            module.__dict__[name] = other.forward.__get__(module)


def _enable_recording(model) -> None:
    """transformers looks up by class name which outputs (hidden states, attentions) a model's class can record."""
    _CAN_RECORD_REGISTRY[model] = model._can_record_outputs
