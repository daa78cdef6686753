"""Memory that kernels ask for themselves, beside their outputs."""

import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited and read in the Linux way")
def test_a_kernel_that_gets_no_memory_of_its_own_raises_and_the_next_call_runs():
    """sample keeps 16 bytes a candidate: with less address space than that left, the call fails, not the process."""
    code = """
import resource, torch, gpt2fast.ops as ops
V = 1 << 24
logits, args = torch.zeros(1, V), (torch.tensor([7]), torch.tensor([1]))
ops.sample(logits[:, :9], *args)
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + V, resource.RLIM_INFINITY))
try:
    ops.sample(logits, *args)
except RuntimeError as error:
    print("raised", "can't allocate memory" in str(error))
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(0 <= ops.sample(logits, *args).item() < V)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["raised", "True", "True"], done
