"""Registers our ops with ``torch.utils.flop_counter``, with the counts of their declarations (``flops=``).

That module imports triton, which takes longer than all other imports of this package. It is therefore not imported
here. The counts are registered when somebody else imports it, or at once if it has been imported already.
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
    """The function that the counter calls with the arguments of a call of the op."""

    def flops(*args, out_val=None, **kwargs) -> int:
        values = declared.bind(args, kwargs)
        sizes = declared.check(values)
        rows = math.prod(sizes.pop("...", ()))
        plain = {name: value for name, value in values.items() if name not in declared.tensors and value is not None}
        return int(declared.flops(dict(B=rows, T=1) | plain | sizes))

    flops._get_raw = True  # the counter then passes tensors, not their shapes
    return flops


class _WhenImported:
    """An import finder that registers the waiting ops when the counter's module has been imported.

    It leaves the finding itself to Python's own finder.
    """

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
