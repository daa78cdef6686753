"""The linear layer, its gradients and those of the MLP, all made of one kernel of a GPU backend: out = a @ b.

The launches of a call depend only on shapes, strides and options. They are worked out once and stored in a plan: a
function that takes the tensors of the call, allocates the outputs, and launches. Plans are kept, so that a later call
costs the host little more than its launches.

A backend gives a function ``prepare(dtype, a, b, out, stride_residual=0, form=0, backward=False, which=0)``, where a
(M, K), b (K, N) and out (M, N) are ``Matrix``. It returns a function ``launch(a, b, out, bias=None, residual=None,
preactivation=None, sums=None)``, which takes the tensors and launches out = activation(a @ b + bias) + residual.

- ``form`` is the activation, one of ``FORMS``. Where ``preactivation`` is given, a @ b + bias is stored there.
- ``backward``: out is a @ b times the derivative of the activation at ``preactivation``.
- ``which`` 1 stores the sums of the columns of b in ``sums``, ``which`` 2 the sums of the rows of a.
"""

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .activations import FORMS
from .ops.mlp import WANT, split_wants
from .tensors import empty_as, row_stride

PLANS = 1024  # the number of plans of each kind that are kept


class Matrix(NamedTuple):
    """How a matrix lies in memory: its size, and the strides between its rows and between its columns."""

    rows: int
    columns: int
    stride: int
    step: int

    @property
    def turned(self) -> "Matrix":
        """The transpose."""
        return Matrix(self.columns, self.rows, self.step, self.stride)

    @property
    def is_dense(self) -> bool:
        return self.step == 1 and (self.stride == self.columns or self.rows <= 1)


def dense(rows: int, columns: int) -> Matrix:
    return Matrix(rows, columns, columns, 1)


def matrix(shape: Sequence[int], strides: Sequence[int]) -> Matrix | None:
    """A tensor (..., K) as a matrix (R, K). None where the rows have no common stride or are not dense."""
    stride = row_stride(shape, strides)
    return None if stride is None else Matrix(math.prod(shape[:-1]), shape[-1], stride, 1)


def weight_matrix(shape: Sequence[int], strides: Sequence[int], transposed: bool) -> Matrix:
    """A weight as a matrix (K, N), with any strides. With ``transposed``, the tensor is (N, K)."""
    found = Matrix(*shape, *strides)
    return found.turned if transposed else found


def linear(
    prepare: Callable, x, weight, bias=None, residual=None, activation="none", transposed=False,
    keep_preactivation=False,
):  # fmt: skip
    """The op linear, by the plan for these shapes and strides. Tensors that have no plan are made contiguous first."""
    strides = None if residual is None else residual.stride()
    plan = _linear_plan(
        prepare, x.dtype, x.shape, x.stride(), weight.shape, weight.stride(), strides, FORMS[activation], transposed,
        keep_preactivation,
    )  # fmt: skip
    if plan is None:
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        return linear(prepare, x, weight, bias, residual, activation, transposed, keep_preactivation)
    return plan(x, weight, bias if bias is None else bias.contiguous(), residual)


@functools.lru_cache(PLANS)
def _linear_plan(prepare, dtype, shape, strides, shape_w, strides_w, strides_residual, form, transposed, keep):
    x, W = matrix(shape, strides), weight_matrix(shape_w, strides_w, transposed)
    shape_y = (*shape[:-1], W.columns)
    residual = None if strides_residual is None else matrix(shape_y, strides_residual)
    if x is None or (residual is None and strides_residual is not None):
        return None
    launch = prepare(dtype, x, W, dense(x.rows, W.columns), 0 if residual is None else residual.stride, form)
    keep = keep and form

    def run(x, weight, bias, residual):
        y = x.new_empty(shape_y)
        kept = empty_as(y) if keep else y.new_empty(0)
        launch(x, weight, y, bias, residual, kept if keep else None)
        return y, kept

    return run


def linear_backward(prepare: Callable, dy, x, weight, transposed=False, want="dx dweight dbias"):
    """The op linear_backward, by a plan."""
    plan = _linear_backward_plan(
        prepare, x.dtype, dy.shape, dy.stride(), x.shape, x.stride(), weight.shape, weight.stride(), transposed, want
    )
    if plan is None:
        return linear_backward(prepare, dy.contiguous(), x.contiguous(), weight, transposed, want)
    return _with_empty(plan(dy, x, weight), dy)


def _with_empty(found: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Replaces each None by a tensor (0,): an op returns that for a gradient that is not wanted."""
    none = like.new_empty(0)
    return tuple([none if tensor is None else tensor for tensor in found])


@functools.lru_cache(PLANS)
def _linear_backward_plan(prepare, dtype, shape_dy, strides_dy, shape, strides, shape_w, strides_w, transposed, want):
    dy, x = matrix(shape_dy, strides_dy), matrix(shape, strides)
    if dy is None or x is None:
        return None
    return _gradients(prepare, dtype, dy, x, weight_matrix(shape_w, strides_w, transposed), transposed, want)


def _gradients(prepare: Callable, dtype, dy: Matrix, x: Matrix, W: Matrix, transposed: bool, want: str) -> Callable:
    """Returns a function of dy (..., N), x (..., K) and the weight, with W (K, N).

    It returns dx (..., K), dweight in the weight's shape and dbias (N,), or None for those that are not in ``want``.
    """
    R, K, N = dy.rows, W.rows, W.columns
    has_dx, has_dweight, has_dbias = (name in want for name in ("dx", "dweight", "dbias"))
    added_up = has_dbias and has_dweight and K and N  # the product that makes dweight also sums dbias
    a, b, which = (dy, x, 2) if transposed else (x, dy, 1)
    if has_dx:
        launch_dx = prepare(dtype, dy, W.turned, dense(R, K))
    if has_dweight:
        launch_dweight = prepare(dtype, a.turned, b, dense(a.columns, b.columns), which=which if added_up else 0)

    def run(dy, x, weight):
        dx = dweight = dbias = None
        if has_dx:
            dx = empty_as(x)
            launch_dx(dy, weight, dx)
        if has_dweight:
            dweight = empty_as(weight)
            dbias = dy.new_empty(N) if added_up else None
            if transposed:
                launch_dweight(dy, x, dweight, sums=dbias)
            else:
                launch_dweight(x, dy, dweight, sums=dbias)
        if has_dbias and not added_up:
            dbias = dy.reshape(R, N).sum(0)
        return dx, dweight, dbias

    return run


def mlp_backward(
    prepare: Callable, dy, x, weight_in, weight_out, preactivation, hidden, bias_in=None, activation="gelu_tanh",
    want=WANT,
):  # fmt: skip
    """The op mlp_backward, by a plan."""
    plan = _mlp_backward_plan(
        prepare, dy.dtype, dy.shape, dy.stride(), x.shape, x.stride(), weight_in.shape, weight_in.stride(),
        weight_out.shape, weight_out.stride(), preactivation.stride(), hidden.stride(), FORMS[activation], want,
    )  # fmt: skip
    if plan is None:
        dy, x, preactivation, hidden = (t.contiguous() for t in (dy, x, preactivation, hidden))
        return mlp_backward(prepare, dy, x, weight_in, weight_out, preactivation, hidden, None, activation, want)
    return plan(dy, x, weight_in, weight_out, preactivation, hidden)


@functools.lru_cache(PLANS)
def _mlp_backward_plan(
    prepare, dtype, shape_dy, strides_dy, shape, strides, shape_in, strides_in, shape_out, strides_out,
    strides_preactivation, strides_hidden, form, want,
):  # fmt: skip
    """The gradient at the activation's input is (dy W_out^T) * act'(preactivation).

    The kernel reads the preactivation after its last step and multiplies there. The gradient at the activation's output
    is therefore never in memory.
    """
    shape_hidden = (*shape[:-1], shape_in[1])
    dy, x = matrix(shape_dy, strides_dy), matrix(shape, strides)
    before, hidden = (matrix(shape_hidden, s) for s in (strides_preactivation, strides_hidden))
    if None in (dy, x, before, hidden) or not before.is_dense:
        return None
    outer, inner = split_wants(want)
    all_wanted = set(want.split()) == set(WANT.split())
    W_in, W_out = Matrix(*shape_in, *strides_in), Matrix(*shape_out, *strides_out)
    outer_gradients = _gradients(prepare, dtype, dy, hidden, W_out, False, outer)
    if inner:
        dbefore = dense(before.rows, before.columns)
        launch = prepare(dtype, dy, W_out.turned, dbefore, form=form, backward=True)
        inner_gradients = _gradients(prepare, dtype, dbefore, x, W_in, False, inner)

    def run(dy, x, weight_in, weight_out, preactivation, hidden):
        _, dweight_out, dbias_out = outer_gradients(dy, hidden, weight_out)
        dx = dweight_in = dbias_in = None
        if inner:
            dbefore = empty_as(preactivation)
            launch(dy, weight_out, dbefore, preactivation=preactivation)
            dx, dweight_in, dbias_in = inner_gradients(dbefore, x, weight_in)
        found = dx, dweight_in, dweight_out, dbias_in, dbias_out
        return found if all_wanted else _with_empty(found, dy)

    return run


def is_slower(measured_faster: Collection[tuple], x: Tensor, weight: Tensor, transposed: bool) -> str | None:
    """Why PyTorch's product runs unless a backend is asked for by name, or None where the backend's product runs.

    ``measured_faster`` lists the products that measured faster than PyTorch's on a GPU: (compute capability, dtype,
    rows, K, N).
    """
    if measured_faster:
        K, N = weight.shape[::-1] if transposed else weight.shape
        kind = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
        if (kind, x.dtype, math.prod(x.shape[:-1]), K, N) in measured_faster:
            return None
    return "PyTorch's product is the choice: no GPU has measured ours to be faster at this size"
