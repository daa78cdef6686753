"""Counts for ``torch.utils.flop_counter``: an op of ours counts as its declaration's ``flops=`` says.

That module imports triton, which takes longer than the rest of a start. So it is not imported here: the counts are
registered when somebody else imports it, or at once where that has been done.
"""

import importlib.machinery
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .op import Op

COUNTER = "torch.utils.flop_counter"
_waiting: list["Op"] = []


def register(declared: "Op") -> None:
    if COUNTER in sys.modules:
        _register(declared)
    else:
        _waiting.append(declared)


def _register(declared: "Op") -> None:
    sys.modules[COUNTER].flop_registry[getattr(getattr(torch.ops, declared.namespace), declared.name)] = count(declared)


def count(declared: "Op") -> Callable[..., int]:
    """What the counter calls with the arguments of a call, tensors as they are."""

    def flops(*args, out_val=None, **kwargs) -> int:
        values = declared.bind(args, kwargs)
        sizes = declared.check(values)
        rows = math.prod(sizes.pop("...", ()))
        plain = {name: value for name, value in values.items() if name not in declared.tensors and value is not None}
        return int(declared.flops(dict(B=rows, T=1) | plain | sizes))

    flops._get_raw = True  # tensors, not their shapes
    return flops


class _WhenImported:
    """A finder that lets the others find the counter's module, and registers what waits once it has been run."""

    def find_spec(self, name, path=None, target=None):
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module) -> None:
                run(module)
                for declared in _waiting:
                    _register(declared)

            spec.loader.exec_module = exec_module
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())
