"""Attention in Triton on the PTX machine: its launches, products and cases. Results: test_gpu_attention.py."""

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.kernels import attention as forward
from gpt2fast.kernels import attention_backward as backward
from gpt2fast.kernels import common
from gpt2fast.op import OPS
from gpt2fast.testing import ptx
from gpt2fast.testing.inputs import build


def test_what_is_covered():
    q = torch.empty(1, 3, 2, 257, device="meta")
    assert forward.supports(q, q, q) == "attention in Triton covers head sizes of 1 to 256, got 257"
    q = torch.empty(1, 3, 2, 64, device="meta", dtype=torch.float64)
    assert forward.supports(q, q, q) == "attention in Triton covers float32, bfloat16 and float16, got float64"


def test_an_old_triton_leaves_float32_to_others(monkeypatch):
    """Triton 3.5 multiplies float32 by at most three products of TF32. Their error breaks the parity rule."""
    monkeypatch.setattr(common, "HAS_BF16X6", False)
    q = torch.empty(1, 3, 2, 64, device="meta")
    assert forward.supports(q, q, q).startswith("attention of float32 in Triton needs Triton 3.6, got 3.")
    assert forward.supports(*[q.bfloat16()] * 3) is None


def test_float32_takes_six_products_of_bfloat16():
    """At GPT-2's head size nothing is multiplied twice: 2, 3 and 4 products of 128 x 128 x 64, each six times."""
    args = build(OPS["attention"], dict(B=1, T=128, S=128, H=1, D=64, causal=False))
    with ptx.machine() as machine:
        out, lse = forward.attention(**args)
        backward.attention_backward(dout=torch.randn(out.shape), out=out, lse=lse, **args)
    launches = machine.launches
    assert [launch.kernel for launch in launches] == [
        "attention_kernel", "attention_backward_q_kernel", "attention_backward_kv_kernel",
    ]  # fmt: skip
    flops = [launch.counters["tensor_flops"] for launch in launches]
    assert flops == [6 * products * 2 * 128 * 128 * 64 for products in (2, 3, 4)]
