"""AdamW and the norm of gradients in Triton on the PTX machine: launches, bytes, spills. Results: test_gpu_adamw.py."""

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.kernels import adamw_ as kernels
from gpt2fast.kernels import gradient_norm as norms
from gpt2fast.op import OPS
from gpt2fast.testing import ptx
from gpt2fast.testing.inputs import build

DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
ADAMW, NORM = OPS["adamw_"], OPS["gradient_norm"]


@DTYPES
@pytest.mark.parametrize("seed", (False, True))
def test_bytes(dtype, seed):
    """There is one launch for all tensors. Weights and moments are read and written once, gradients are read once."""
    block = kernels.BLOCK
    case = dict(each=[(2 * block,), (block,), (3, block)], step=3, seed=seed, scale=True)
    with ptx.machine() as machine:
        kernels.adamw_(**build(ADAMW, case, dtype))
    (launch,) = machine.launches
    count, size = 6 * block, dtype.itemsize
    assert launch.grid == (6, 1, 1)
    least = count * (3 * size + 4 * 4)
    moved = 32 * (launch.counters["global_load_sectors"] + launch.counters["global_store_sectors"])
    assert least <= moved <= 1.05 * least  # with the tables, which every warp of a program reads
    assert launch.counters["global_store_bytes"] == count * (size + 2 * 4)
    assert not launch.inefficient()
    for target in ("sm_80", "sm_90", "sm_100"):
        assert launch.resources(target).spill_stores == 0


@DTYPES
def test_bytes_of_a_norm(dtype):
    args = build(NORM, dict(each=[(8 * norms.BLOCK,), (7,), (norms.BLOCK + 1,)], max_norm=2.0), dtype)
    with ptx.machine() as machine:
        norms.gradient_norm(**args)
    assert [launch.kernel for launch in machine.launches] == ["gradient_squares_kernel", "gradient_norm_kernel"]
    least, launch = (9 * norms.BLOCK + 8) * dtype.itemsize, machine.launches[0]
    assert least <= 32 * launch.counters["global_load_sectors"] <= 1.05 * least
    for target in ("sm_80", "sm_90", "sm_100"):
        assert launch.resources(target).spill_stores == 0
