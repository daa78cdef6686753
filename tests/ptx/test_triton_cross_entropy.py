"""Cross entropy in Triton: what it moves. Results: test_gpu_cross_entropy.py."""

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.kernels import cross_entropy as kernels
from gpt2fast.testing import ptx


def test_rows_are_read_once_and_gradients_written_once():
    R, V = 3, 50257
    logits, targets = torch.randn(R, V).bfloat16(), torch.tensor([0, 5, V - 1])
    with ptx.machine() as machine:
        loss, lse = kernels.cross_entropy(logits, targets, reduction="none")
        kernels.cross_entropy_backward(torch.ones(R), logits, targets, lse, reduction="none")
    forward, backward = machine.launches
    assert R * V * 2 <= forward.per_buffer["logits_ptr"]["read_bytes"] <= 1.05 * R * V * 2
    moved = backward.per_buffer["logits_ptr"]["read_bytes"], backward.per_buffer["dlogits_ptr"]["written_bytes"]
    assert moved == (R * V * 2, R * V * 2)
