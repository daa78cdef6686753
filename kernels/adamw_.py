"""AdamW on many tensors in one launch. For each number w of the weights, with its gradient g:

    m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
    w = w (1 - lr weight_decay) - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)

A program has one block of BLOCK numbers of one tensor. It reads from tables on the device which tensor and which block
that is (gpt2fast/tensor_lists.py). The floor is memory traffic: w, m and v are read and written once, and g is read
once. docs/kernels.md counts 1.02 times that.
"""

import math

import torch
import triton
import triton.language as tl

from gpt2fast import tensor_lists
from gpt2fast.tensor_lists import objection_to_lists, tables

from .common import objection, philox

BLOCK, WARPS = 2048, 4  # numbers of a program; warps
COLUMNS = tl.constexpr(tensor_lists.COLUMNS)


@triton.jit
def address(table_ptr, tensor, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of a tensor's first number, from the table.

    ALIGNED: the compiler may rely on an alignment of four numbers. It then reads four numbers at a time of every dtype,
    so that w, g, m and v of one number are in the same lane.
    """
    ptr = tl.load(table_ptr + tensor * COLUMNS + column).to(tl.pointer_type(dtype))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, dtype.primitive_bitwidth // 2)
    return ptr


@triton.jit
def load_block(ptr, at, whole, size):
    if whole:
        x = tl.load(ptr + at)
    else:
        x = tl.load(ptr + at, mask=at < size, other=0.0)
    return x.to(tl.float32)


@triton.jit
def store_block(ptr, at, x, whole, size):
    if whole:
        tl.store(ptr + at, x)
    else:
        tl.store(ptr + at, x, mask=at < size)


@triton.jit
def _one_minus_power(log_beta, step):
    """1 - beta^step. It keeps its digits where it is near 0, by a series for e^x - 1 with x = step log(beta)."""
    x = log_beta * step
    series = 1.0
    for k in tl.static_range(9, 1, -1):
        series = 1 + x * series / k
    return tl.where(x > -0.5, -x * series, 1 - tl.exp(x))


@triton.jit
def _noise(seed_ptr, first, tensor, step, BLOCK_E: tl.constexpr):
    """16 random bits for each of the BLOCK_E numbers from ``first`` on, as ``_rounded`` in gpt2fast/ops/adamw_.py."""
    block = first // 4 + tl.arange(0, BLOCK_E // 4)
    zero = tl.zeros([BLOCK_E // 4], tl.uint32)
    c2, c3 = zero + tensor.to(tl.uint32), zero + step.to(tl.uint32)
    c0, c1, c2, c3 = philox(tl.load(seed_ptr), block.to(tl.uint32), (block >> 32).to(tl.uint32), c2, c3)
    words = tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), [BLOCK_E])
    return words >> 16


@triton.jit
def adamw_kernel(
    table_ptr, programs_ptr, weight_ptr, step_ptr, scale_ptr, seed_ptr, lr, beta2, rest1, rest2, log_beta1, log_beta2,
    eps, decay, HAS_SCALE: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """``weight_ptr``: any of the weights; only its dtype is used. ``rest1``, ``rest2``: 1 - beta1 and 1 - beta2.

    ``decay``: 1 - lr weight_decay. ``scale_ptr``: a factor for all gradients. STOCHASTIC: bfloat16 weights are rounded
    up or down at random, so that the expected value is the float32 result.
    """
    program = tl.program_id(0)
    tensor = tl.load(programs_ptr + 2 * program)
    first = tl.load(programs_ptr + 2 * program + 1).to(tl.int64) * BLOCK_E
    size = tl.load(table_ptr + tensor * COLUMNS + 4)
    kind: tl.constexpr = weight_ptr.dtype.element_ty
    w_ptr = address(table_ptr, tensor, 0, kind, ALIGNED)
    g_ptr = address(table_ptr, tensor, 1, kind, ALIGNED)
    m_ptr = address(table_ptr, tensor, 2, tl.float32, ALIGNED)
    v_ptr = address(table_ptr, tensor, 3, tl.float32, ALIGNED)
    at = first + tl.arange(0, BLOCK_E)
    whole = first + BLOCK_E <= size
    step = tl.load(step_ptr)
    g = load_block(g_ptr, at, whole, size)
    if HAS_SCALE:
        g *= tl.load(scale_ptr)
    m = load_block(m_ptr, at, whole, size)
    m += rest1 * (g - m)
    store_block(m_ptr, at, m, whole, size)
    v = load_block(v_ptr, at, whole, size)
    v = beta2 * v + rest2 * g * g
    store_block(v_ptr, at, v, whole, size)
    root = tl.sqrt_rn(_one_minus_power(log_beta2, step))
    denominator = (tl.sqrt_rn(v) / root + eps) * _one_minus_power(log_beta1, step)
    w = load_block(w_ptr, at, whole, size) * decay - lr * m / denominator
    if STOCHASTIC:
        bits = w.to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        up = (bits + _noise(seed_ptr, first, tensor, step, BLOCK_E)) & 0xFFFF0000
        w = tl.where(finite, up, bits).to(tl.float32, bitcast=True)
    store_block(w_ptr, at, w.to(kind), whole, size)


def adamw_(
    weights, gradients, exp_avgs, exp_avg_sqs, step, scale=None, seed=None, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8,
    weight_decay=0.01,
):  # fmt: skip
    found = tables(BLOCK, weights, gradients, exp_avgs, exp_avg_sqs)
    if found is None:
        gradients = [g.contiguous() for g in gradients]
        found = tables(BLOCK, weights, gradients, exp_avgs, exp_avg_sqs)
    if found.count:
        logs = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
        stochastic = seed is not None and weights[0].dtype == torch.bfloat16
        adamw_kernel[(found.count,)](
            found.tensors, found.programs, weights[0], step, step if scale is None else scale,
            found.tensors if seed is None else seed, lr, beta2, 1 - beta1, 1 - beta2, *logs, eps,
            1 - lr * weight_decay, scale is not None, stochastic, found.aligned, BLOCK,
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip


def supports(
    weights, gradients, exp_avgs, exp_avg_sqs, step, scale=None, seed=None, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8,
    weight_decay=0.01,
):  # fmt: skip
    return objection_to_lists("Triton", objection, "AdamW", gradients, weights, exp_avgs, exp_avg_sqs)


KERNELS = {"adamw_": (adamw_, supports)}
