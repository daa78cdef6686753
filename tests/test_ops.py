"""Every op, case, dtype, instruction set and layout against float64, outputs guarded and filled with NaN."""

import ctypes
import json
import subprocess
import sys

import pytest
import torch
from conftest import checks

from gpt2fast import backends
from gpt2fast.op import OPS
from gpt2fast.testing.check import runs
from gpt2fast.testing.contract import keeps_the_parity_rule


@pytest.mark.parametrize("check", checks("parity"), ids=str)
def test_parity(check):
    check()


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in OPS.values() if op.namespace == "gpt2fast"], ids=lambda op: op.name)
def test_parity_as_ptx_in_every_pair_of_dtype_and_layout(op):
    """The ordinary run takes a third of these pairs for each case, others for the next case."""
    for run in runs(op, every_pair=True):
        if run["target"].endswith(":ptx"):
            keeps_the_parity_rule(op, **run)


def test_the_guard_finds_a_write_past_the_end():
    before = backends._C.guard_memory(True)
    tensor = torch.zeros(5)
    after = backends._C.guard_memory(False)
    assert after == before
    ctypes.memset(tensor.data_ptr() + tensor.nbytes, 0, 1)
    del tensor
    assert backends._C.guard_memory(False) == before + 1


PEAKS = """if True:
    import json, pathlib, re, resource, sys
    import torch
    from gpt2fast import ops, use_backend

    def peak():  # of this program alone, where the system says so: getrusage's begins with the parent's
        status = pathlib.Path("/proc/self/status")
        if status.exists():
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def grown(T, dtype, **options):
        q, k, v = torch.randn(3, 1, T, 1, 8).to(dtype)
        before = peak()
        ops.attention(q, k, v, **options)
        return peak() - before

    def masks(T):
        return dict(mask=torch.ones(1, T, dtype=torch.bool), bias=torch.zeros(1, 1, 1, T))

    use_backend("cpu")
    grown(64, torch.float32), grown(64, torch.bfloat16)
    T, seed = 16384, torch.tensor([1])
    found = [
        grown(T, torch.float32),
        grown(T, torch.bfloat16),
        grown(T, torch.float32, causal=False, **masks(T)),
        grown(T, torch.float32, dropout_p=0.1, seed=seed),
    ]
    use_backend("reference")
    print(json.dumps([found, grown(4096, torch.float32)]))
"""
HEAD = (
    PEAKS.split("def grown")[0]
    + """
    x, weight, targets = torch.randn(8192, 8), torch.randn(50257, 8), torch.zeros(8192, dtype=torch.int64)

    def grown(function, *args, **options):
        before = peak()
        function(*args, **options)
        return peak() - before

    ops.linear_cross_entropy(x[:9], weight, targets[:9])
    chunks = grown(ops.linear_cross_entropy, x, weight, targets)
    print(json.dumps([chunks, grown(ops.linear, x, weight, transposed=True)]))
"""
)


def test_attention_never_materialises_t_by_s():
    """With T = S = 16384 the scores would take a GiB. Plain PyTorch does hold them, at a quarter of that length."""
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    kernels, plain = json.loads(done.stdout)
    assert max(kernels) < 16384 * 16384 * 4 / 64, kernels
    assert plain >= 4096 * 4096 * 4


def test_head_and_loss_never_hold_all_logits():
    """8192 tokens: the logits would take 1.6 GB."""
    done = subprocess.run([sys.executable, "-c", HEAD], capture_output=True, text=True, check=True)
    chunks, whole = json.loads(done.stdout)
    assert whole >= 8192 * 50257 * 4
    assert chunks < whole / 6
