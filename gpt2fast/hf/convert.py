"""optimize() and restore(). They change the class of each module of a GPT-2 in place.

Parameters, hooks and attributes of the modules stay as they are.
"""

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
    """The metaclass of our model classes. It lets pickle find them, although their ``__module__`` is transformers'.

    They have transformers' ``__module__`` because libraries such as PEFT write it into saved files. A file with our
    module's name could be read with gpt2fast only. Pickle finds our classes by ``_by_name``.
    """


def _by_name(name: str) -> type:
    return getattr(sys.modules[f"{__package__}.models"], name)


def _reduce(kind: type):
    return (_by_name, (kind.__name__,)) if kind in to_ours().values() else kind.__qualname__


copyreg.pickle(_Named, _reduce)


class Optimized(metaclass=_Named):
    """The base of our model classes. A model is built or loaded by transformers, then switched to our modules."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        _swap(self, to_ours())

    def __setstate__(self, state):
        super().__setstate__(state)
        _enable_recording(self)


def to_ours() -> dict[type, type]:
    """A dict from the classes of transformers (or torch) to ours."""
    models = sys.modules[f"{__package__}.models"]
    pairs = {getattr(stock, name): getattr(models, name) for name in MODELS}
    return pairs | {part.__bases__[0]: part for part in PARTS}


def optimize(model: nn.Module, fused_loss: bool = False) -> nn.Module:
    """Switches every GPT-2 in ``model`` to our modules, in place. ``model`` is one of transformers' or contains one.

    A module changes its class only if that is exactly the one of transformers or torch. Subclasses, adapters, quantised
    layers and parametrized modules stay as they are and are still called.

    With ``fused_loss``, a GPT2LMHeadModel in training mode that gets labels computes its loss without storing all
    logits, which take most of the memory of a training step. The output's ``logits`` are None then.

    Returns the same object; restore() undoes the switch. Raises TypeError where ``model`` has no GPT-2, and ValueError
    for ``fused_loss`` where it has no GPT2LMHeadModel.
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
    """Undoes optimize(), in place: every module of our classes gets its class of transformers or torch back."""
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
    """Updates a bound ``forward`` in the module's attributes to that of the new class.

    Hooks of accelerate store it as ``_old_forward``; when they are removed, it stays as ``forward``.
    """
    for name in ("forward", "_old_forward"):
        kept = module.__dict__.get(name)
        if kept is not None and is_own_forward(module, kept):
            module.__dict__[name] = other.forward.__get__(module)


def _enable_recording(model) -> None:
    """transformers looks up by class name which outputs (hidden states, attentions) a model's class can record."""
    _CAN_RECORD_REGISTRY[model] = model._can_record_outputs
