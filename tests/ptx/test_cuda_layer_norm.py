"""Layer norm in CUDA C++: what it moves, its registers, and what it refuses. Results: test_gpu_layer_norm.py."""

import pytest
import torch

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast import backends, ops
from gpt2fast.cuda import layer_norm as kernels
from gpt2fast.cuda import library
from gpt2fast.op import OPS
from gpt2fast.testing import ptx
from gpt2fast.testing.inputs import build

pytestmark = pytest.mark.skipif(library.machine_reason() is not None, reason=str(library.machine_reason()))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


def run(name, args):
    with ptx.machine() as machine:
        kernels.KERNELS[name][0](**args)
    return machine.launches


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("C, R", ((768, 65), (1600, 33), (8192, 9), (16384, 3)))
def test_bytes(C, R, dtype):
    """Activations are read and written once, 128 bits at a time. Every row asks for the parameters, which a cache
    holds. The shares of dweight and dbias are written once and read once. A lane's eight 16-bit columns are 32 bytes of
    a share, which it writes in two halves."""
    size = dtype.itemsize
    for name, read, written in (("layer_norm", 1, 1), ("add_layer_norm", 2, 2)):
        (launch,) = run(name, build(OPS[name], dict(B=1, T=R, C=C), dtype))
        assert not launch.inefficient()
        assert launch.counters["global_load_bytes"] == (read + 2) * R * C * size
        assert launch.counters["global_store_bytes"] == written * R * C * size + 2 * R * 4
        assert launch.counters["global_load_bytes"] >= 0.85 * 512 * launch.counters["global_load_requests"]
        requests = launch.counters["global_store_requests"] - 2 * R  # a row's mean and rstd
        assert written * R * C * size >= 0.85 * 512 * requests

    rows, partial = run("layer_norm_backward", build(OPS["layer_norm_backward"], dict(B=1, T=R, C=C), dtype))
    P = rows.grid[0]
    assert P == -(-R // kernels.LEAST_ROWS) and not partial.inefficient()
    assert len(rows.inefficient()) == (dtype == torch.bfloat16)
    assert all(what.startswith("global store") for what in rows.inefficient().values())
    assert rows.counters["global_store_bytes"] == R * C * size + 8 * P * C
    statistics = sum(rows.per_buffer[name]["read_bytes"] for name in ("mean", "rstd"))  # every lane asks for these
    assert rows.counters["global_load_bytes"] - statistics == (3 if C <= 8192 else 6) * R * C * size
    assert partial.counters["global_load_bytes"] == 8 * P * C and partial.counters["global_store_bytes"] == 2 * C * size


@pytest.mark.parametrize("C", (768, 1600, 16384))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_nothing_spills(C, dtype):
    for name in kernels.KERNELS:
        for launch in run(name, build(OPS[name], dict(B=1, T=3, C=C), dtype)):
            for arch in ARCHITECTURES:
                found = launch.resources(arch)
                assert found.stack == found.spill_stores == 0, f"{launch.name} {arch}: {found}"


def test_what_cannot_be_read_128_bits_at_a_time_is_read_one_by_one():
    """Rows, parameters or columns that are not aligned give the same numbers, with more requests."""
    x, weight, bias = torch.randn(5, 769), torch.randn(769), torch.randn(769)
    aligned = dict(x=torch.randn(5, 768), weight=weight[:768], bias=bias[:768])
    for args in (
        dict(x=x[:, :767], weight=weight[:767], bias=bias[:767]),
        aligned | dict(x=x[:, 1:]),
        aligned | dict(x=x[:, :768]),
        aligned | dict(weight=weight[1:]),
    ):
        (launch,) = run("layer_norm", args)
        assert launch.counters["global_load_requests"] >= launch.counters["global_load_bytes"] // 128


def test_parts_are_those_of_the_device():
    weight = torch.randn(8)
    args = dict(dy=torch.randn(4000, 8), x=torch.randn(4000, 8), weight=weight, mean=torch.zeros(4000))
    rows, _ = run("layer_norm_backward", args | dict(rstd=torch.ones(4000)))
    assert rows.grid[0] == 108 * kernels.BLOCKS


def test_refused(monkeypatch):
    monkeypatch.delitem(backends.BACKENDS["cuda"].kernels.modules, "sample")  # an op without a kernel in CUDA C++
    x, weight = torch.randn(2, 20000), torch.randn(20000)
    with ptx.machine(), backends.use_backend("cuda"):
        with pytest.raises(RuntimeError, match="layer norm in CUDA covers 1 to 16384 columns, got 20000"):
            ops.layer_norm(x, weight, weight)
        with pytest.raises(RuntimeError, match="layer norm in CUDA covers float32, bfloat16 and float16, got float64"):
            ops.layer_norm(x.double(), weight.double(), weight.double())
        with pytest.raises(RuntimeError, match="gpt2fast::sample: backend 'cuda' does not cover this call"):
            ops.sample(x, torch.tensor([5]), torch.arange(2))
        with pytest.raises(RuntimeError, match="gpt2fast_layer_norm: CUDA error 1$"):  # asked below Python's checks
            kernels.layer_norm(x, weight, weight)


def test_unasked_triton_s_kernel_is_the_choice():
    pytest.importorskip("triton")
    x, weight = torch.randn(2, 8), torch.randn(8)
    with ptx.machine():
        assert backends.choose(OPS["layer_norm"], x, weight, weight).backend == "triton"
        with backends.use_backend("cuda"):
            assert backends.choose(OPS["layer_norm"], x, weight, weight).backend == "cuda"
