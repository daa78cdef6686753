"""The norm of many gradients, as if they were one vector, and the factor that clips it to max_norm.

    norm = sqrt(sum of g^2)        factor = min(max_norm / (norm + EPS), 1)

The first kernel has one program for each block of BLOCK numbers of a tensor, which adds up their squares. Tables on the
device say which numbers these are, as in ``adamw_``. The second kernel is one program, which adds up the blocks. The
host never waits for the device. The floor is one read of the gradients; docs/kernels.md counts 1.02 to 1.04 times that.
"""

import torch
import triton
import triton.language as tl

from gpt2fast.ops.gradient_norm import EPS
from gpt2fast.tensor_lists import objection_to_lists, tables

from .adamw_ import COLUMNS, address, load_block
from .common import objection

BLOCK, WARPS = 8192, 4  # numbers of a program; warps
EPSILON = tl.constexpr(EPS)


@triton.jit
def gradient_squares_kernel(table_ptr, programs_ptr, gradient_ptr, out_ptr, ALIGNED: tl.constexpr,
                            BLOCK_E: tl.constexpr):  # fmt: skip
    """Stores the sum of the squares of each program's block of numbers, in float32."""
    program = tl.program_id(0)
    tensor = tl.load(programs_ptr + 2 * program)
    first = tl.load(programs_ptr + 2 * program + 1).to(tl.int64) * BLOCK_E
    size = tl.load(table_ptr + tensor * COLUMNS + 4)
    g_ptr = address(table_ptr, tensor, 0, gradient_ptr.dtype.element_ty, ALIGNED)
    g = load_block(g_ptr, first + tl.arange(0, BLOCK_E), first + BLOCK_E <= size, size)
    tl.store(out_ptr + program, tl.sum(g * g, 0))


@triton.jit(do_not_specialize=["count"])
def gradient_norm_kernel(squares_ptr, norm_ptr, factor_ptr, count, max_norm, BLOCK_P: tl.constexpr):
    """One program adds up the sums of the blocks in a fixed order and writes norm and factor."""
    lane = tl.arange(0, BLOCK_P)
    total = tl.zeros([BLOCK_P], tl.float32)
    for first in tl.range(0, count, BLOCK_P):
        total += tl.load(squares_ptr + first + lane, mask=first + lane < count, other=0.0)
    norm = tl.sqrt_rn(tl.sum(total, 0))
    tl.store(norm_ptr, norm)
    tl.store(factor_ptr, tl.minimum(max_norm / (norm + EPSILON), 1.0))


def gradient_norm(gradients, max_norm=1.0):
    found = tables(BLOCK, gradients)
    if found is None:
        gradients = [g.contiguous() for g in gradients]
        found = tables(BLOCK, gradients)
    norm, factor = (torch.empty((), dtype=torch.float32, device=gradients[0].device) for _ in range(2))
    squares = norm.new_empty(found.count)
    if found.count:
        gradient_squares_kernel[(found.count,)](
            found.tensors, found.programs, gradients[0], squares, found.aligned, BLOCK,
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    gradient_norm_kernel[(1,)](
        squares, norm, factor, found.count, max_norm, 1024, num_warps=WARPS, enable_fp_fusion=True
    )
    return norm, factor


def supports(gradients, max_norm=1.0):
    return objection_to_lists("Triton", objection, "a norm", gradients)


KERNELS = {"gradient_norm": (gradient_norm, supports)}
