"""Triton kernels whose programs share global memory. They are correct, or have a race if BUG is set."""

import triton
import triton.language as tl


@triton.jit
def accumulate(x_ptr, o_ptr, BUG: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + at)
    if BUG:
        before = tl.load(o_ptr + at)  # bug: accumulate
        tl.store(o_ptr + at, before + x)  # other: accumulate
    else:
        tl.atomic_add(o_ptr + at, x)


@triton.jit
def under_a_lock(x_ptr, lock_ptr, o_ptr, BUG: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + at)
    if not BUG:
        while tl.atomic_cas(lock_ptr, 0, 1) == 1:
            pass
    before = tl.load(o_ptr + at)  # bug: under_a_lock
    tl.store(o_ptr + at, before + x)  # other: under_a_lock
    if not BUG:
        tl.debug_barrier()
        tl.atomic_xchg(lock_ptr, 0)
