"""Cross entropy in Triton: what it moves. And decode attention: a row alone. Results: test_gpu_cross_entropy.py."""

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.kernels import cross_entropy as kernels
from gpt2fast.kernels import decode_attention as decode
from gpt2fast.op import OPS
from gpt2fast.testing import ptx
from gpt2fast.testing.inputs import build


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


def test_a_decoded_row_does_not_depend_on_its_batch():
    case = dict(B=3, T=1, S=300, H=2, D=64, starts=True)
    args = build(OPS["decode_attention"], case, torch.bfloat16)
    with ptx.machine():
        together = decode.decode_attention(**args)
        for b in range(3):
            one = {n: v[b : b + 1] if isinstance(v, torch.Tensor) else v for n, v in args.items()}
            assert torch.equal(decode.decode_attention(**one), together[b : b + 1])
