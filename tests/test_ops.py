"""Every op, case, dtype, instruction set and layout against float64, outputs guarded and filled with NaN."""

import ctypes
import gc

import pytest
import torch
from conftest import ISAS, op_cases, op_runs

from gpt2fast import backends
from gpt2fast.op import OPS
from gpt2fast.testing import assert_parity, build, call, cpu_isa, has_kernel


@pytest.mark.parametrize("op, case, dtype, isa, layout", op_runs())
def test_parity(op, case, dtype, isa, layout):
    with cpu_isa(isa):
        assert_parity(op, case, dtype, layout, f"{dtype} {isa} {layout}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", [op for op in OPS.values() if has_kernel(op)], ids=lambda op: op.name)
def test_kernels_stay_inside_their_buffers(op, isa):
    before = backends._C.guard_memory(True)
    try:
        with cpu_isa(isa):
            for case in op.cases:
                if op.flops(case) < 5_000_000:
                    for dtype in op.dtypes:
                        call(op, build(op, case, dtype))
        gc.collect()
    finally:
        after = backends._C.guard_memory(False)
    assert after == before


def test_the_guard_finds_a_write_past_the_end():
    before = backends._C.guard_memory(True)
    tensor = torch.zeros(5)
    after = backends._C.guard_memory(False)
    assert after == before
    ctypes.memset(tensor.data_ptr() + tensor.nbytes, 0, 1)
    del tensor
    assert backends._C.guard_memory(False) == before + 1


@pytest.mark.parametrize("op, case", op_cases(5_000_000))
def test_repeats_bit_for_bit(op, case):
    args = build(op, case)
    for first, second in zip(call(op, args), call(op, args)):
        assert torch.equal(first, second)


@pytest.mark.parametrize("op", [op for op in OPS.values() if has_kernel(op)], ids=lambda op: op.name)
def test_thread_count_changes_no_bit(op, two_threads):
    case = max((c for c in op.cases if op.flops(c) < 3e9), key=op.flops)
    for dtype in op.dtypes:
        args = build(op, case, dtype)
        torch.set_num_threads(2)
        two = call(op, args)
        torch.set_num_threads(1)
        for a, b in zip(call(op, args), two):
            assert torch.equal(a, b), dtype
