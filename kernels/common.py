"""What the Triton kernels of several ops share: their dtypes, random numbers, and how tl.dot multiplies float32."""

import functools

import torch
import triton
import triton.language as tl
from triton.runtime import driver


@triton.jit
def _philox_round(c0, c1, c2, c3, k0, k1):
    # One 32 x 32 -> 64 bit product gives both halves; two 32-bit products would cost twice as much.
    p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
    return (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32), (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)


@triton.jit
def philox(key, c0, c1, c2, c3):
    """The four 32-bit words of a Philox 4x32-10 block (Salmon et al., SC11), as in csrc/math.h.

    ``key`` has 64 bits; the counters c0 to c3 have 32 bits each. All may be tensors.
    """
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0, k1)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# On tensor cores a float32 number is split into three bfloat16 numbers, whose 24 bits are all the bits of its
# significand. Six products of these parts keep the accuracy of float32; three products of TF32 do not. Triton offers
# this ("bf16x6") since version 3.6.
HAS_BF16X6 = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)


def objection(what, x, has_products=False):
    """The reason why kernels named ``what`` do not cover x's dtype, or None if they do.

    ``has_products``: the kernels multiply matrices.
    """
    if x.dtype not in DTYPES:
        return f"{what} in Triton covers float32, bfloat16 and float16, got {str(x.dtype).removeprefix('torch.')}"
    if has_products and x.dtype == torch.float32 and not HAS_BF16X6:
        return f"{what} of float32 in Triton needs Triton 3.6, got {triton.__version__}"
    return None


@functools.cache
def is_nvidia():
    return driver.active.get_current_target().backend == "cuda"


def precision(x):
    """The input_precision of tl.dot, which matters for float32 only. AMD's matrix units multiply float32 directly."""
    return "bf16x6" if x.dtype == torch.float32 and is_nvidia() else "ieee"
