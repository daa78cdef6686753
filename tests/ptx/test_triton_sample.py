"""Sampling in Triton: what a row reads. Results: test_gpu_sample.py."""

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.kernels import sample as kernels
from gpt2fast.testing import ptx


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_bytes(dtype):
    """One pass finds the greatest. The draw takes two, or the list of those that may survive takes one. Finding the cut
    takes none."""
    V = 12 * kernels.BLOCK  # whole tiles
    logits = (4 * torch.randn(6, V, generator=torch.Generator().manual_seed(0))).to(dtype)[:2].contiguous()
    size = 2 * V * dtype.itemsize
    for options, passes in ((dict(temperature=0.0), 1), (dict(), 3), (dict(top_k=50), 2), (dict(top_p=0.9), 2)):
        with ptx.machine() as machine:
            kernels.sample(logits, torch.tensor([-77]), torch.tensor([3, 4]), **options)
        (launch,) = machine.launches
        read = launch.per_buffer["logits_ptr"]
        assert read["read_bytes"] == passes * size and read["read_sectors"] * 32 == passes * size, options
        if not ("top_k" in options or "top_p" in options):  # the last tile of a list is read number by number
            assert not {place: why for place, why in launch.inefficient().items() if "global load" in why}
        if "top_k" in options:
            assert launch.per_buffer["ids_ptr"]["written_bytes"] < 2 * 4 * 200  # few more than 50 are listed
        for target in ("sm_80", "sm_90", "sm_100"):
            assert launch.resources(target).spill_stores == 0
