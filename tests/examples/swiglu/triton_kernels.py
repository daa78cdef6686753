"""SwiGLU in Triton: a program has BLOCK elements, whatever row they are in."""

import torch
import triton
import triton.language as tl

from gpt2fast.kernels.common import objection

BLOCK = 1024


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    y = gate / (1 + tl.exp(-gate)) * up
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < n)


def swiglu(gate, up):
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    if n := gate.numel():
        swiglu_kernel[(triton.cdiv(n, BLOCK),)](gate, up, y, n, BLOCK=BLOCK, enable_fp_fusion=True)
    return y


def supports(gate, up):
    return objection("SwiGLU", gate)


KERNELS = {"examples::swiglu": (swiglu, supports)}
