"""AdamW on many tensors in one launch.

A launch has a program for each block of numbers of each tensor. Which numbers those are it reads from two tables on the
device: of every tensor its addresses and size, and of every program its tensor and the number of its block in that. The
tables are kept for as long as the addresses are the same, which they are from step to step.
"""

import array
import functools
import math

import numpy as np
import torch
import triton
import triton.language as tl

from gpt2fast import backends, extension

from .common import objection, philox

BLOCK, WARPS = 2048, 4  # numbers a program
COLUMNS = tl.constexpr(5)  # of the table of tensors: weight, gradient, both moments, size; unused ones are 0
KEPT = 16  # tables


@triton.jit
def address(table_ptr, tensor, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Of a tensor's first number. Four numbers are read at a time, of any type, so that all lie in the same lanes."""
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
    """1 - beta^step, which keeps its digits where it is near 0."""
    x = log_beta * step
    series = 1.0
    for k in tl.static_range(9, 1, -1):
        series = 1 + x * series / k
    return tl.where(x > -0.5, -x * series, 1 - tl.exp(x))


@triton.jit
def _noise(seed_ptr, first, tensor, step, BLOCK_E: tl.constexpr):
    """16 random bits for each of BLOCK_E numbers from ``first`` on, as ``_rounded`` of gpt2fast/ops/adamw_.py draws."""
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
    """``weight_ptr``: any of the weights, for its type; rest: 1 - beta; ``decay``: what a weight is multiplied with."""
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


class _Tables:
    """The tables of a launch: of its tensors (n, COLUMNS) and of its programs (p, 2), on the device."""

    def __init__(self, block, found, lists, device):
        *addresses, sizes = np.frombuffer(found, np.int64).reshape(lists + 1, -1)
        rows = np.zeros((len(sizes), COLUMNS.value), np.int64)
        rows[:, :lists], rows[:, -1] = np.stack(addresses, 1), sizes
        programs = [(i, part) for i, size in enumerate(sizes) for part in range(-(-size // block))]
        self.tensors = torch.from_numpy(rows).to(device)
        self.programs = torch.tensor(programs, dtype=torch.int32).to(device)
        self.count = len(programs)
        self.aligned = not (rows[:, :lists] % 16).any()


_tables_of = functools.lru_cache(KEPT)(_Tables)


def _addresses(*lists):
    """What ``addresses`` of the C++ extension finds, without it."""
    if not all(t.is_contiguous() for tensors in lists for t in tensors):
        return None
    found = [t.data_ptr() for tensors in lists for t in tensors]
    return array.array("q", found + [t.numel() for t in lists[0]]).tobytes()


def tables(block, *lists):
    """Of lists of dense tensors, of which one member each belongs together; ``block``: numbers a program. None where
    one of them is not dense."""
    if extension._C is None or backends.cpu_counts_as_cuda():  # the PTX machine watches who asks for an address
        found = _addresses(*lists)
    else:
        found = extension._C.addresses(lists)
    return None if found is None else _tables_of(block, found, len(lists), lists[0][0].device)


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


def objection_to_lists(what, tensors, *changed):
    if not tensors:
        return f"{what} in Triton takes at least one tensor"
    if found := objection(what, tensors[0]):
        return found
    if not all(t.is_contiguous() for tensors in changed for t in tensors):
        return f"{what} in Triton changes dense tensors only"
    return None


def supports(
    weights, gradients, exp_avgs, exp_avg_sqs, step, scale=None, seed=None, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8,
    weight_decay=0.01,
):  # fmt: skip
    return objection_to_lists("AdamW", gradients, weights, exp_avgs, exp_avg_sqs)


KERNELS = {"adamw_": (adamw_, supports)}
