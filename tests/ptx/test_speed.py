"""The PTX machine is fast enough for a test suite: 60 million thread instructions a second on one core."""

import time

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

import tutorials

from gpt2fast.testing import ptx


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_tensor_core_attention(dtype):
    """All checks are on. A processor of 2023 does about 500 million. The best of three runs counts."""
    q, k, v = (torch.randn(1, 2, 1024, 64).to(dtype) for _ in range(3))
    with ptx.machine() as m:
        rates = []
        for _ in range(4):  # the first one compiles
            start = time.process_time()
            tutorials.attention(q, k, v, causal=True)
            rates.append(m.launches[-1].counters["thread_instructions"] / (time.process_time() - start))
    assert m.launches[-1].counters["tensor_instructions"] > 0
    assert max(rates[1:]) > 60e6, f"{max(rates[1:]) / 1e6:.0f} million thread instructions a second"
