"""The linear layer, its gradients and those of the MLP by one kernel of a GPU backend, out = a @ b.

``product(a, b, out, bias, residual, stride_residual, form, preactivation, backward, sums, which)`` launches it: out =
activation(a @ b + bias) + residual, the activation one of ``FORMS``, and preactivation what it is applied to, which is
kept where it is given. ``backward``: out is a @ b times the activation's derivative at preactivation. ``sums`` become
those of the columns of b for ``which`` 1, of the rows of a for 2. a (M, K), b (K, N) and out (M, N) are matrices as the
functions here make them.
"""

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from .ops.mlp import WANT, split_wants
from .tensors import dense_rows, empty_as

FORMS = dict(none=0, gelu_tanh=1, gelu_erf=2)  # as Activation in csrc/ops.h
Matrix = tuple[Tensor, int, int, int, int]  # rows, columns and their strides


def matrix(x: Tensor) -> Matrix:
    """x (..., K) as a matrix (R, K). It is no view of x, whose making would take the host longer than all else here; a
    copy only where rows do not lie at one stride."""
    x, stride = dense_rows(x)
    shape = x.shape
    return x, math.prod(shape[:-1]), shape[-1], stride, 1


def strided(x: Tensor) -> Matrix:
    """x (R, K) of any strides."""
    return x, *x.shape, *x.stride()


def turned(x: Matrix) -> Matrix:
    """The transpose."""
    x, rows, columns, stride, step = x
    return x, columns, rows, step, stride


def linear(
    product: Callable, x, weight, bias=None, residual=None, activation="none", transposed=False,
    keep_preactivation=False,
):  # fmt: skip
    W = turned(strided(weight)) if transposed else strided(weight)
    y = x.new_empty((*x.shape[:-1], W[2]))
    keep = keep_preactivation and activation != "none"
    kept = torch.empty_like(y) if keep else y.new_empty(0)
    stride_residual = 0
    if residual is not None:
        residual, stride_residual = dense_rows(residual)
    product(
        matrix(x), W, matrix(y), None if bias is None else bias.contiguous(), residual, stride_residual,
        FORMS[activation], kept if keep else None,
    )  # fmt: skip
    return y, kept


def linear_backward(product: Callable, dy, x, weight, transposed=False, want="dx dweight dbias"):
    dx, dweight, dbias = gradients(product, matrix(dy), matrix(x), weight, transposed, want)
    none = dy.new_empty(0)
    return (
        none if dx is None else dx,
        none if dweight is None else dweight,
        none if dbias is None else dbias,
    )


def gradients(
    product: Callable, dy: Matrix, x: Matrix, weight: Tensor, transposed: bool, want: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx (..., K), dweight and dbias (N,), those in ``want``, else None; dy (R, N) and x (..., K) as (R, K)."""
    W = turned(strided(weight)) if transposed else strided(weight)
    (rows_dy, R, N, _, _), (rows_x, _, K, _, _) = dy, x
    dx = dweight = dbias = None
    if "dx" in want:
        dx = empty_as(rows_x)
        product(dy, turned(W), (dx, R, K, K, 1))
    if "dweight" in want:
        dweight = empty_as(weight)
        dbias = rows_dy.new_empty(N) if "dbias" in want and dweight.numel() else None
        a, b = (dy, x) if transposed else (x, dy)
        product(turned(a), b, matrix(dweight), sums=dbias, which=0 if dbias is None else 2 if transposed else 1)
    if dbias is None and "dbias" in want:  # no product has added it up
        dbias = rows_dy.reshape(R, N).sum(0)
    return dx, dweight, dbias


def mlp_backward(
    product: Callable, dy, x, weight_in, weight_out, preactivation, hidden, bias_in=None, activation="gelu_tanh",
    want=WANT,
):  # fmt: skip
    """The gradient before the activation is dy W^T act'(preactivation): the kernel reads the preactivation after its
    last step and multiplies, so that the gradient behind the activation is never in memory."""
    outer, inner = split_wants(want)
    rows_dy = matrix(dy)
    _, dweight_out, dbias_out = gradients(product, rows_dy, matrix(hidden), weight_out, False, outer)
    dx = dweight_in = dbias_in = None
    if inner:
        before = matrix(preactivation.contiguous())
        dbefore = (empty_as(preactivation), *before[1:])
        product(
            rows_dy, turned(strided(weight_out)), dbefore, form=FORMS[activation], preactivation=before[0],
            backward=True,
        )  # fmt: skip
        dx, dweight_in, dbias_in = gradients(product, dbefore, matrix(x), weight_in, False, inner)
    none = dy.new_empty(0)
    return tuple(none if found is None else found for found in (dx, dweight_in, dweight_out, dbias_in, dbias_out))


def is_slower(measured_faster: Collection[tuple], x: Tensor, weight: Tensor, transposed: bool) -> str | None:
    """Why PyTorch's product is the choice where nobody asks for a backend's by name.

    ``measured_faster``: what a GPU has measured faster there, (compute capability, dtype, rows, K, N).
    """
    if measured_faster:
        K, N = weight.shape[::-1] if transposed else weight.shape
        kind = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
        if (kind, x.dtype, math.prod(x.shape[:-1]), K, N) in measured_faster:
            return None
    return "PyTorch's product is the choice: no GPU has measured ours to be faster at this size"
