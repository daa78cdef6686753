"""linear_cross_entropy and its gradients on a GPU backend: products over chunks of rows, and one kernel between them.

For each chunk of rows, a product makes the logits, a kernel turns them into losses and gradients, and two more products
make dx and dweight. The logits of one chunk are in memory at a time. The functions take three functions of a backend:

- ``product(a, b, out, add=False)``: out = a @ b, or out += a @ b.
- ``row(logits, targets, loss, lse, dloss, stride_dloss, V, ignore_index, label_smoothing, gradients)`` computes loss
  and lse of each row of logits. Only the first V columns are logits. Where ``gradients`` is true, it overwrites the
  logits by their gradients, for ``dloss`` or for 1 where that is None, and the other columns by 0.
- ``total(loss, targets, ignore_index, reduction)``: the sum or the mean of the rows' losses.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from . import backends
from .ops.common import multiply
from .ops.linear_cross_entropy import GRADIENTS, accumulate, chunks, part, scaled
from .products import PLANS, Matrix

ALIGNED = 16  # the rows of the buffer are a multiple of this number of columns


def product_of(backend: str, prepare: Callable, is_slower: Callable) -> Callable:
    """A ``product``. It is the backend's where it is asked for by name or measured faster, and PyTorch's elsewhere."""

    @functools.lru_cache(PLANS)
    def launch_of(dtype, shape_a, strides_a, shape_b, strides_b, strides_out):
        a, b = Matrix(*shape_a, *strides_a), Matrix(*shape_b, *strides_b)
        return prepare(dtype, a, b, Matrix(a.rows, b.columns, *strides_out), strides_out[0])

    def product(a, b, out, add=False):
        if backends.active() == backend or not is_slower(a, b, False):
            launch = launch_of(a.dtype, a.shape, a.stride(), b.shape, b.stride(), out.stride())
            launch(a, b, out, residual=out if add else None)
        else:
            multiply(a, b, out, add)

    return product


def _rows(product, row, x, weight, targets, ignore_index, label_smoothing, want, dloss=None):
    """Returns loss and lse of every row (R,), dx (R, K) and dweight (V, K), all in float32.

    ``dloss`` (R,) is the gradient of each row's loss, 1 by default. Gradients that are not in ``want`` are (0,).
    """
    R, V = x.shape[0], weight.shape[0]
    x, targets = x.contiguous(), targets.contiguous()
    loss = torch.empty_like(targets, dtype=torch.float32)
    lse = torch.empty_like(loss)
    # Rows of the buffer are padded to a multiple of ALIGNED columns: the matrix units and accesses of 16 bytes need
    # that. The weight gets rows of zeros for the columns beyond V.
    missing = -V % ALIGNED
    weight = F.pad(weight, (0, 0, 0, missing)) if missing else weight.contiguous()
    turned = weight.t()
    parts = chunks(R, want)
    first = parts[0] if parts else slice(0, 0)
    buffer = x.new_empty(R if first is None else first.stop, V + missing)
    stride = 0 if dloss is None else dloss.stride(0)

    def dlogits_of(rows):
        logits = buffer if rows in (None, first) else buffer[: rows.stop - rows.start]
        product(part(x, rows), turned, logits)
        scale = None if dloss is None else part(dloss, rows)
        row(
            logits, part(targets, rows), part(loss, rows), part(lse, rows), scale, stride, V, ignore_index,
            label_smoothing, bool(want),
        )  # fmt: skip
        return logits

    dx, dweight = accumulate(x, weight, want, dlogits_of, product)
    return loss, lse, dx, dweight[:V] if missing else dweight


def linear_cross_entropy(
    product, row, total, x, weight, targets, ignore_index=-100, label_smoothing=0.0, reduction="mean", keep="none"
):
    want = GRADIENTS[keep] if reduction != "none" else ""
    loss, lse, dx, dweight = _rows(product, row, x, weight, targets, ignore_index, label_smoothing, want)
    if reduction != "none":
        loss = total(loss, targets.contiguous(), ignore_index, reduction)
    return loss, lse, dx, dweight


def linear_cross_entropy_backward(
    product, row, dloss, x, weight, targets, lse, ignore_index=-100, label_smoothing=0.0, reduction="mean",
    want="dx dweight",
):  # fmt: skip
    per_row = dloss if reduction == "none" else None
    _, _, *gradients = _rows(product, row, x, weight, targets, ignore_index, label_smoothing, want, per_row)
    if reduction == "none":
        return tuple(g.to(x.dtype) for g in gradients)
    return tuple(scaled(gradients, dloss, targets, ignore_index, reduction, x.dtype))
