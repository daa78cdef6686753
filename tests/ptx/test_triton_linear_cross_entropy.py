"""The fused head and loss in Triton on the PTX machine: its bytes. Results: test_gpu_linear_cross_entropy.py."""

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast import backends
from gpt2fast.kernels import linear_cross_entropy as kernels
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth, ptx
from gpt2fast.testing.inputs import build, reference, truth

NAME = "linear_cross_entropy"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_bytes(dtype):
    """The logits are read for the loss. For gradients they are read once more and written. All else is negligible."""
    R, K, V = 12, 16, 4096
    args = build(OPS[NAME], dict(R=R, K=K, V=V), dtype)
    size = R * V * dtype.itemsize
    for keep, reads, writes in (("none", 1, 0), ("both", 2, 1)):
        given = args | dict(keep=keep)
        with ptx.machine() as machine, backends.use_backend("triton"):
            found = kernels.linear_cross_entropy(**given)
        for three in zip(found, reference(OPS[NAME], given), truth(OPS[NAME], given)):
            assert_close_to_truth(*three)
        (launch,) = (launch for launch in machine.launches if launch.kernel == "loss_and_gradient_kernel")
        moved = launch.per_buffer["logits_ptr"]
        assert moved["read_bytes"] + moved.get("written_bytes", 0) <= 1.05 * size * (reads + writes)
        assert not launch.inefficient()
