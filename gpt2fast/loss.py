"""The loss of a language model, from the last hidden states to cross entropy, and the check of its targets."""

from typing import Any

import torch
from torch import Tensor

from . import ops
from .dtypes import dtype_name
from .ops.linear_cross_entropy import MOST_ROWS, gradients_to_keep
from .packed import PackedEmbedding
from .values import within

IGNORED = -100


def head_loss(x: Tensor, table: Any, targets: Tensor) -> Tensor:
    """The mean loss () of the logits that the head gives: x (..., C), targets (...) int64, where -100 is ignored.

    ``table`` is a module with a weight (V, C), or a PackedEmbedding.

    ``linear_cross_entropy`` keeps only a part of the logits in memory at a time. Where the weight is trained and there
    are at most ``MOST_ROWS`` tokens, two separate ops take less time.
    """
    x, targets = x.flatten(0, -2), targets.flatten()
    if isinstance(table, PackedEmbedding):
        return ops.cross_entropy(table.head(x), targets, IGNORED)
    weight = table.weight
    keep = gradients_to_keep(x, weight)
    if keep in ("dweight", "both") and len(x) <= MOST_ROWS:
        return ops.cross_entropy(ops.linear(x, weight, transposed=True), targets, IGNORED)
    return ops.linear_cross_entropy(x, weight, targets, IGNORED, keep=keep)


def check_targets(targets: Tensor, input_ids: Tensor, vocabulary: int, logits_to_keep: int | Tensor) -> None:
    """Raises ValueError or TypeError where targets have a wrong shape, dtype or value, or logits_to_keep is given."""
    if isinstance(logits_to_keep, Tensor) or logits_to_keep:
        raise ValueError(f"gpt2fast: logits_to_keep must be 0 where targets are given, got {logits_to_keep}")
    if targets.dtype != torch.int64:
        raise TypeError(f"gpt2fast: targets must have dtype int64, got {dtype_name(targets.dtype)}")
    if targets.shape != input_ids.shape:
        expected, found = tuple(input_ids.shape), tuple(targets.shape)
        raise ValueError(f"gpt2fast: targets must have input_ids' shape {expected}, got {found}")
    if not torch.compiler.is_compiling():
        within("cross_entropy", "targets", targets, vocabulary, allowed=IGNORED)
