"""Decides whether a module's formula may replace a call of the module.

It may, if a call would do what the module's stock class does and nothing else. The functions here return an obstacle,
in words, or None. They are asked for every module on every call, so that they see a hook, an adapter or a
parametrization that was added at any time.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook

_CAPTURE = "transformers.utils.output_capturing"
_PLAIN = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)  # the last two stand for plain ones in torch.export
_FORWARDS: dict[type, tuple[tuple[type, Callable], ...]] = {}


def keep_forwards(*kinds: type) -> None:
    """Stores the present ``forward`` of each class and its base classes, so that obstacle() sees a replaced one."""
    for kind in kinds:
        defining = [base for base in kind.__mro__ if "forward" in base.__dict__ and base is not nn.Module]
        _FORWARDS[kind] = tuple((base, base.forward) for base in defining)


def stands_in(kind: type) -> Callable:
    """Decorator for our forward that overrides the one of ``kind``: if somebody replaces the latter, it is called."""
    known = kind.forward

    def decorate(ours: Callable) -> Callable:
        @functools.wraps(ours)
        def forward(self, *args, **kwargs):
            if kind.forward is known:
                return ours(self, *args, **kwargs)
            return kind.forward(self, *args, **kwargs)

        return forward

    return decorate


def obstacle(module: nn.Module, stock: tuple[type, ...]) -> str | None:
    """Why ``module`` must be called as a module, or None where a call does no more than its stock class' formula."""
    own, kind = module.__dict__, type(module)
    if kind not in stock:
        return f"{_name(kind)} is not the stock class"
    if "forward" in own and not is_own_forward(module, own["forward"]):
        return f"its forward is replaced by {_source(own['forward'])}"
    for base, known in _FORWARDS.get(kind, ()):  # as class_obstacle, but without a call: this runs for every call
        if base.forward is not known:
            return class_obstacle(kind)
    if "_compiled_call_impl" in own:
        return "it is compiled on its own"
    if own["_forward_pre_hooks"] or own["_forward_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        if found := _hook_obstacle(own):
            return found
    return "a hook on all modules is registered" if _has_any_global_hook() else None


def _hook_obstacle(own: dict) -> str | None:
    if own["_forward_pre_hooks"]:
        return "it has a forward pre-hook"
    if own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return "it has a backward hook"
    # transformers captures attentions by hooks. These see None from every fused attention, transformers' own included,
    # so that nothing is lost without them.
    if any(getattr(hook, "__module__", "") != _CAPTURE for hook in own["_forward_hooks"].values()):
        return "it has a forward hook"
    return None


def class_obstacle(kind: type) -> str | None:
    """Says where somebody has replaced the forward of a class or of one of its base classes; else None."""
    for base, known in _FORWARDS.get(kind, ()):
        if base.forward is not known:
            return f"the forward of {_name(base)} is replaced"
    return None


def weight_obstacle(module: nn.Module, stock: tuple[type, ...]) -> str | None:
    """As ``obstacle``, for a module with a weight, which must be a plain tensor (not quantised, not distributed)."""
    found = obstacle(module, stock)
    if found is None and type(module.weight) not in _PLAIN:
        found = f"its weight is a {_name(type(module.weight))}"
    return found


def embedding_obstacle(table: nn.Module, trained: bool = True) -> str | None:
    """As ``obstacle``, for an embedding. ``trained`` False: its gradients do not matter."""
    found = weight_obstacle(table, (nn.Embedding,))
    if found is not None:
        return found
    if table.max_norm is not None or (trained and (table.sparse or table.scale_grad_by_freq)):
        return "it has max_norm, sparse or scale_grad_by_freq"
    return "it has a padding_idx" if trained and table.padding_idx is not None else None


def is_plain(tensor: Tensor | None) -> bool:
    return tensor is None or type(tensor) in _PLAIN


def is_own_forward(module: nn.Module, function) -> bool:
    """Whether ``function`` is the class' own forward, bound to the module.

    Removed hooks leave such an attribute behind. The decorators of forward, which handle ``return_dict`` and the like,
    may be missing: accelerate's ``unwrap_model`` removes them.
    """
    if getattr(function, "__self__", None) is not module:
        return False
    known = type(module).forward
    while known is not function.__func__ and hasattr(known, "__wrapped__"):
        known = known.__wrapped__
    return known is function.__func__


def is_autocast(x: Tensor) -> bool:
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def keeps_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward pass through an op with these tensors may follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _source(function: Callable) -> str:
    """The module and name of a function. For a wrapper such as accelerate's, those of the wrapper."""
    found = function if hasattr(function, "__qualname__") else type(function)
    return f"{found.__module__}.{found.__qualname__}"


def _name(kind: type) -> str:
    return f"{kind.__module__.split('.')[0]}.{kind.__qualname__}"


keep_forwards(nn.Dropout, nn.Embedding, nn.LayerNorm, nn.Linear)
