"""The ops, one file each. ``gpt2fast.ops.layer_norm(x, weight, bias)`` runs on whatever backend is active.

An op is found by its file: what a module of this folder declares under its own name is here by that name.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from .. import backends
from ..op import OPS

if TYPE_CHECKING:  # for type checkers and editors, which see no loop
    from .adamw_ import adamw_
    from .add_layer_norm import add_layer_norm
    from .attention import attention, attention_backward
    from .bias_gelu import bias_gelu
    from .cross_entropy import cross_entropy, cross_entropy_backward
    from .decode_attention import decode_attention
    from .embedding import embedding, embedding_backward
    from .gelu import gelu, gelu_backward
    from .gradient_norm import gradient_norm
    from .layer_norm import layer_norm, layer_norm_backward
    from .linear import linear, linear_backward
    from .linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_backward
    from .mlp import mlp, mlp_backward
    from .sample import sample

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f".{_module.name}", __name__)
_here = {op.name: op for op in OPS.values() if op.reference.__module__.startswith(f"{__name__}.")}
globals().update(_here)
__all__ = sorted(_here)

backends.start()
