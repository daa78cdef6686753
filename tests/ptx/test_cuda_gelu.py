"""GELU in CUDA C++: what it moves, and its registers. Results: test_gpu_gelu.py."""

import pytest
import torch

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.cuda import gelu as kernels
from gpt2fast.cuda import library
from gpt2fast.op import OPS
from gpt2fast.testing import ptx
from gpt2fast.testing.inputs import build

pytestmark = pytest.mark.skipif(library.machine_reason() is not None, reason=str(library.machine_reason()))
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
THREADS, ROWS = 128, 4  # threads of a block, and its rows


def run(name, args):
    with ptx.machine() as machine:
        kernels.KERNELS[name][0](**args)
    (launch,) = machine.launches
    return launch


@DTYPES
@pytest.mark.parametrize("name", kernels.KERNELS)
def test_bytes(name, dtype):
    """Every element is read once and written once, 128 bits at a time. A bias is read once for four rows."""
    R, C = 70, 3072
    launch = run(name, build(OPS[name], dict(B=1, T=R, C=C, approximate="tanh"), dtype))
    size = dtype.itemsize
    activations = (3 if name == "gelu_backward" else 2) * R * C * size
    bias = -(-R // ROWS) * C * size if name == "bias_gelu" else 0
    moved = launch.counters["global_load_bytes"] + launch.counters["global_store_bytes"]
    requests = launch.counters["global_load_requests"] + launch.counters["global_store_requests"]
    assert moved == activations + bias and moved == 512 * requests and not launch.inefficient()
    columns = THREADS * 16 // size
    flat = -(-(R * C // columns) // ROWS)
    assert launch.grid[0] == (flat if name != "bias_gelu" else -(-R // ROWS) * -(-C // columns))
    assert activations + C * size * bool(bias) <= moved
    assert name == "bias_gelu" or moved <= 1.05 * activations


@DTYPES
@pytest.mark.parametrize("form", ("tanh", "none"))
def test_nothing_spills(form, dtype):
    for name in kernels.KERNELS:
        launch = run(name, build(OPS[name], dict(B=1, T=3, C=64, approximate=form), dtype))
        for arch in ("sm_80", "sm_90", "sm_100"):
            found = launch.resources(arch)
            assert found.stack == found.spill_stores == 0, f"{launch.name} {arch}: {found}"


@DTYPES
def test_what_is_left_over_and_what_is_not_aligned(dtype):
    """Lengths around a block's columns, and an unaligned first element, with which elements are accessed one by one."""
    for n in (1, 7, 511, 512, 513, 1024, 1025, 4096, 4097):
        x = torch.randn(n + 1).to(dtype)
        for part in (x[:n], x[1:]):
            with ptx.machine() as machine:
                y = kernels.gelu(part)
            torch.testing.assert_close(y, torch.nn.functional.gelu(part.float(), approximate="tanh").to(dtype))
            wide = n % (16 // dtype.itemsize) == 0 and part.data_ptr() % 16 == 0
            words = (
                machine.launches[0].counters["global_load_bytes"] / machine.launches[0].counters["global_load_requests"]
            )
            assert wide == (words > 32 * dtype.itemsize)
