"""y = wte[tokens] + wpe[positions] (+ wte[token_types]), summed in float32 and rounded once, and its gradients.

Forward: a program has one tile of rows and columns of y. The floor is memory traffic: the rows of the tables that are
named are read, and y is written once. docs/kernels.md counts at most 1.05 times that.

Backward: the gradient of a table row is the sum of the rows of dy that it went into. The rows of dy are sorted by table
row. One program adds up the rows of dy of one table row, 16 at a time and in their order. A token that occurs often is
shared by several programs: each has one segment of the sorted rows, and a second kernel adds up their parts. There are
no atomics, so that the bits are the same in every run.
"""

import triton
import triton.language as tl

from ..tensors import SEGMENT, dense_rows, table_gradients
from .common import objection

TILE, WIDEST, WARPS = 4096, 1024, 4  # elements of a tile; the most columns of a tile; warps
ROWS_AT_ONCE, BACKWARD_COLUMNS = 16, 256  # rows and columns of dy that a program adds in one step


@triton.jit
def _load_row(table_ptr, row, rows, stride, c, inside):
    """Rows of a table in float32. A row that the table does not have gives NaN, since no check precedes the launch."""
    known = (row >= 0) & (row < rows)
    values = tl.load(table_ptr + row * stride + c, mask=inside & known, other=0.0).to(tl.float32)
    return tl.where(known, values, float("nan"))


@triton.jit(do_not_specialize=["R", "T", "V", "P", "start", "stride_positions_b"])
def embedding_kernel(
    tokens_ptr, wte_ptr, wpe_ptr, positions_ptr, types_ptr, y_ptr, stride_wte, stride_wpe, stride_positions_b,
    R, T, C, V, P, start,
    HAS_POSITIONS: tl.constexpr, HAS_TYPES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    r = program // across * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    c = program % across * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (r < R) & (c < C)
    position = start + r % T
    if HAS_POSITIONS:
        position = tl.load(positions_ptr + r // T * stride_positions_b + r % T, mask=r < R, other=0)
    y = _load_row(wte_ptr, tl.load(tokens_ptr + r, mask=r < R, other=0), V, stride_wte, c, inside)
    y += _load_row(wpe_ptr, position, P, stride_wpe, c, inside)
    if HAS_TYPES:
        y += _load_row(wte_ptr, tl.load(types_ptr + r, mask=r < R, other=0), V, stride_wte, c, inside)
    tl.store(y_ptr + r * C + c, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "R", "rows"])
def embedding_backward_kernel(
    row_ptr, source_ptr, dy_ptr, out_ptr, parts_ptr, stride_dy_r, N, R, rows, C,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Program (i, j) has place i in the sorted list of rows and the j-th block of columns.

    It has work only if place i is the first of its table row, in the whole list or in its segment of SEGMENT places. It
    then adds up the rows of dy from place i on, until the table row or the segment ends. The sum is the gradient of the
    table row, or a part of it if the table row has places in other segments too.
    """
    i = tl.program_id(0)
    row = tl.load(row_ptr + i)
    first = i == 0
    if i > 0:
        first = tl.load(row_ptr + i - 1) != row
    if (first | (i % SEGMENT == 0)) & (row >= 0) & (row < rows):
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        end = tl.minimum(N, (i // SEGMENT + 1) * SEGMENT)
        total = tl.zeros([BLOCK_C], tl.float32)
        at = i
        same = True
        while same:
            n = at + tl.arange(0, BLOCK_N)
            ours = tl.load(row_ptr + n, mask=n < end, other=-1) == row
            # Tokens and token types are one list of 2 R numbers. Number n of that list belongs to row n % R of dy.
            r = tl.load(source_ptr + n, mask=ours, other=0) % R
            dy = tl.load(
                dy_ptr + r[:, None] * stride_dy_r + c[None, :], mask=ours[:, None] & (c < C)[None, :], other=0.0
            )
            total += tl.sum(dy.to(tl.float32), 0)
            at += BLOCK_N
            same = tl.sum(ours.to(tl.int32), 0) == BLOCK_N
        if first & (tl.load(row_ptr + end, mask=end < N, other=-1) != row):
            tl.store(out_ptr + row * C + c, total.to(out_ptr.dtype.element_ty), mask=c < C)
        else:  # a segment has two parts: of the table row that it begins with, and of the one that goes on in the next
            part = 2 * (i // SEGMENT) + tl.where(i % SEGMENT == 0, 0, 1)
            tl.store(parts_ptr + part.to(tl.int64) * C + c, total, mask=c < C)


@triton.jit(do_not_specialize=["segments", "rows"])
def embedding_backward_join_kernel(
    row_ptr, parts_ptr, out_ptr, segments, rows, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, SEGMENT: tl.constexpr
):
    """Program (s, j): if a table row begins in segment s and goes on in the next segment, the program adds up the parts
    of that table row, for the j-th block of columns."""
    s = tl.program_id(0)
    begin = s * SEGMENT
    row = tl.load(row_ptr + begin + SEGMENT)
    goes_on = tl.load(row_ptr + begin + SEGMENT - 1) == row
    fills = tl.load(row_ptr + begin) == row
    begins = (s == 0) | (tl.load(row_ptr + begin - 1, mask=s > 0, other=-1) != row)
    if goes_on & (begins | (fills == 0)) & (row >= 0) & (row < rows):
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        part = 2 * s + tl.where(fills, 0, 1)
        total = tl.load(parts_ptr + part.to(tl.int64) * C + c, mask=c < C, other=0.0)
        at = s + 1
        same = True
        while same:
            n = at + tl.arange(0, BLOCK_N)
            ours = tl.load(row_ptr + n * SEGMENT, mask=n < segments, other=-1) == row
            parts = parts_ptr + (2 * n.to(tl.int64) * C)[:, None] + c[None, :]
            total += tl.sum(tl.load(parts, mask=ours[:, None] & (c < C)[None, :], other=0.0), 0)
            at += BLOCK_N
            same = tl.sum(ours.to(tl.int32), 0) == BLOCK_N
        tl.store(out_ptr + row * C + c, total.to(out_ptr.dtype.element_ty), mask=c < C)


def embedding(tokens, wte, wpe, positions=None, token_types=None, start=0):
    (B, T), C = tokens.shape, wte.shape[1]
    y = wte.new_empty((B, T, C))
    if not y.numel():
        return y
    (wte, stride_wte), (wpe, stride_wpe) = dense_rows(wte), dense_rows(wpe)
    tokens = tokens.contiguous()
    # The kernel does not read a tensor that is None, so ``tokens`` serves as a placeholder.
    types = tokens if token_types is None else token_types.contiguous()
    places = tokens if positions is None else positions.contiguous()
    stride_positions_b = 0 if positions is None or positions.shape[0] == 1 else T
    block_c = min(triton.next_power_of_2(C), WIDEST)
    block_r = TILE // block_c
    programs = -(-B * T // block_r) * -(-C // block_c)
    embedding_kernel[(programs,)](
        tokens, wte, wpe, places, types, y, stride_wte, stride_wpe, stride_positions_b, B * T, T, C, wte.shape[0],
        wpe.shape[0], start, positions is not None, token_types is not None, block_r, block_c, num_warps=WARPS,
        enable_fp_fusion=True,
    )  # fmt: skip
    return y


def _add_rows(row, source, dy, stride, out, parts):
    (count, C), N = out.shape, len(row)
    columns = min(triton.next_power_of_2(C), BACKWARD_COLUMNS)
    tile = dict(BLOCK_N=ROWS_AT_ONCE, BLOCK_C=columns, SEGMENT=SEGMENT, num_warps=WARPS, enable_fp_fusion=True)
    across, segments = -(-C // columns), -(-N // SEGMENT)
    parts = out if parts is None else parts  # without parts, a placeholder that the kernel does not touch
    embedding_backward_kernel[(N, across)](row, source, dy, out, parts, stride, N, dy.numel() // C, count, C, **tile)
    if segments > 1:
        embedding_backward_join_kernel[(segments - 1, across)](row, parts, out, segments, count, C, **tile)


def embedding_backward(dy, tokens, V, P, positions=None, token_types=None, start=0):
    return table_gradients(_add_rows, dy, tokens, V, P, positions, token_types, start)


def supports(tokens, wte, wpe, positions=None, token_types=None, start=0):
    return objection("embedding", wte)


def supports_backward(dy, tokens, V, P, positions=None, token_types=None, start=0):
    return objection("embedding", dy)


KERNELS = {"embedding": (embedding, supports), "embedding_backward": (embedding_backward, supports_backward)}
