"""Triton kernels that have one bug each if BUG is set, and none otherwise. The lines are marked as in planted.cu."""

import triton
import triton.language as tl


@triton.jit
def off_by_one(x_ptr, y_ptr, n, BUG: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at <= n if BUG else at < n
    v = tl.load(x_ptr + at, mask=mask)  # bug: off_by_one
    tl.store(y_ptr + at, v, mask=at < n)


@triton.jit
def wrong_mask(x_ptr, y_ptr, rows, columns, BUG: tl.constexpr, BLOCK: tl.constexpr):
    r, c = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    v = tl.load(x_ptr + r * columns + c, mask=(r < rows) & (c < columns), other=0.0)
    mask = (c < columns) & (r < (BLOCK if BUG else rows))
    tl.store(y_ptr + r * columns + c, v, mask=mask)  # bug: wrong_mask


@triton.jit
def strided(x_ptr, y_ptr, n, BUG: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    v = tl.load(x_ptr + at * (16 if BUG else 1))  # bug: uncoalesced
    tl.store(y_ptr + at, v)


@triton.jit
def accumulate(x_ptr, y_ptr, n, BUG: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x_ptr + at, mask=at < n)
    if BUG:
        v += tl.load(y_ptr + at, mask=at < n)  # bug: uninitialised
    tl.store(y_ptr + at, v, mask=at < n)


@triton.jit
def row_sum(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """A sum over four warps goes through shared memory: Triton puts the barriers."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x / tl.sum(x, axis=0))
