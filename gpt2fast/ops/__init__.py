"""The ops, one file for each op and its backward op. ``gpt2fast.ops.layer_norm(x, weight, bias)`` runs on the backend
in force.

A file holds test cases, the ways of plain PyTorch (``_fused``, ``_naive``, ``_baseline``) and the declaration, whose
body is the reference. Every module of this folder is imported here. The ops that they declare become attributes of this
package.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from .. import backends
from ..op import OPS

if TYPE_CHECKING:  # type checkers and editors do not understand the loop below
    from .adamw_ import adamw_
    from .add_layer_norm import add_layer_norm
    from .attention import attention, attention_backward
    from .bias_gelu import bias_gelu
    from .cross_entropy import cross_entropy, cross_entropy_backward
    from .decode_attention import decode_attention
    from .embedding import embedding, embedding_backward
    from .gelu import gelu, gelu_backward
    from .gradient_norm import gradient_norm
    from .int4_linear import int4_linear
    from .int8_embedding import int8_embedding
    from .int8_linear import int8_linear
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
