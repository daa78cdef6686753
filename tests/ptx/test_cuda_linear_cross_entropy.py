"""Head and loss in CUDA C++: what a row of logits moves, the registers, and what is refused. Results:
test_gpu_linear_cross_entropy.py."""

import pytest
import torch

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast import backends, ops
from gpt2fast.cuda import library
from gpt2fast.cuda import linear_cross_entropy as kernels
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth, ptx
from gpt2fast.testing.inputs import build, reference, truth

pytestmark = pytest.mark.skipif(library.machine_reason() is not None, reason=str(library.machine_reason()))
ALL = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = pytest.mark.parametrize("dtype", ALL, ids=("float32", "bfloat16", "float16"))
SMOOTHING = pytest.mark.parametrize("smoothing", (0.0, 0.1))
NAME = "linear_cross_entropy"
THREADS, SECTOR, PACK = 256, 32, 16


def run(dtype, backend="auto", **case):
    args = build(OPS[NAME], case, dtype)
    with ptx.machine() as machine, backends.use_backend(backend):
        found = kernels.KERNELS[NAME][0](**args)
    for three in zip(found, reference(OPS[NAME], args), truth(OPS[NAME], args)):
        assert_close_to_truth(*three)
    return machine.launches


def moved(launch, unit="bytes"):
    return sum(launch.counters[f"global_{kind}_{unit}"] for kind in ("load", "store"))


@DTYPES
@SMOOTHING
@pytest.mark.parametrize("V", (4096, 5003, 50257))
def test_bytes(V, smoothing, dtype):
    """Logits are read for the loss. For gradients they are read once more and written, all by 128 bits at a time. Rows
    that do not count are read once. Columns of padding are read only in a pack that has logits, and are written."""
    R, size = 12, dtype.itemsize
    read, padded = -(-V * size // PACK) * PACK, -(-V // 16) * 16 * size
    for keep in ("none", "dx"):
        (launch,) = (one for one in run(dtype, R=R, K=16, V=V, keep=keep, label_smoothing=smoothing) if "loss_and" in
                     one.name)  # fmt: skip
        counted = R - R // 3  # every third row is ignored
        again = counted if keep == "dx" else 0
        logits = launch.per_buffer["logits"]
        assert logits["read_bytes"] == (R + again) * read + counted * size  # the logit at the target
        assert logits["written_bytes"] == (R * padded if again else 0)
        assert logits["read_sectors"] == (R + again) * -(-read // SECTOR) + counted
        assert logits["written_sectors"] * SECTOR == logits["written_bytes"]
        least = (R + again) * read + logits["written_bytes"]
        assert moved(launch) <= least + counted * size + R * (8 * (THREADS + 2) + 8) + again * 4 * THREADS
        assert launch.counters["global_store_bytes"] == logits["written_bytes"] + R * 8  # and loss and lse
        assert not launch.inefficient()
        warps = THREADS // 32
        singly = R * (warps + 2) + counted * 2 + again * warps + R * 2  # target, its logit, dloss, loss and lse
        of_row = -(-(V * size // PACK) // 32) + 1  # a warp's packs, and those at the row's end
        assert moved(launch, "requests") <= singly + (R + again + (R if again else 0)) * of_row


@DTYPES
@SMOOTHING
def test_nothing_spills(smoothing, dtype):
    (launch,) = (one for one in run(dtype, R=3, K=16, V=300, keep="both", label_smoothing=smoothing) if "loss_and" in
                 one.name)  # fmt: skip
    for arch in ("sm_80", "sm_90", "sm_100"):
        found = launch.resources(arch)
        assert found.stack == found.spill_stores == 0, f"{launch.name} {arch}: {found}"
        assert launch.occupancy(arch) >= 4 * THREADS / 2048


@pytest.mark.parametrize("dtype", ALL[1:], ids=("bfloat16", "float16"))
def test_products_that_leave_float32(dtype):
    """Gradients of 16-bit logits are float32 products of 16-bit factors, 128 bits at a time, and nothing spills."""
    launches = [one for one in run(dtype, "cuda", R=40, K=64, V=500, keep="both") if "product_kernel" in one.name]
    logits, dx, dweight = launches
    assert logits.counters["global_store_bytes"] == 40 * 512 * 2
    assert dx.counters["global_store_bytes"] == 40 * 64 * 4
    assert dweight.counters["global_store_bytes"] == 512 * 64 * 4
    for launch in launches:
        assert not launch.inefficient()
        assert launch.counters["global_store_requests"] * 512 == launch.counters["global_store_bytes"]
        for arch in ("sm_80", "sm_90", "sm_100"):
            assert launch.resources(arch).stack == 0


def test_an_ignored_row_of_no_numbers():
    x, weight = torch.randn(2, 16), torch.randn(50, 16)
    x[1] = torch.nan
    with ptx.machine():
        loss, _, dx, _ = kernels.linear_cross_entropy(x, weight, torch.tensor([3, -100]), keep="dx")
    assert loss.isfinite() and dx[0].isfinite().all() and not dx[1].any()


@pytest.mark.parametrize("name", kernels.KERNELS)
def test_bits_repeat(name):
    args = build(OPS[name], dict(R=67, K=40, V=503, label_smoothing=0.1), torch.bfloat16)
    with ptx.machine(), backends.use_backend("cuda"):
        first, *others = (kernels.KERNELS[name][0](**args) for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


def test_refused():
    x, weight, targets = torch.randn(2, 8), torch.randn(20, 8), torch.tensor([0, 1])
    columns = kernels.MOST_COLUMNS
    with ptx.machine(), backends.use_backend("cuda"):
        with pytest.raises(RuntimeError, match="linear cross entropy in CUDA covers .*, got float64"):
            ops.linear_cross_entropy(x.double(), weight.double(), targets)
        with pytest.raises(RuntimeError, match=f"linear cross entropy in CUDA covers up to {columns} columns"):
            ops.linear_cross_entropy(x, weight[:1].expand(columns + 1, 8), targets)
        # Called past Python's checks: rows that are too long, not of whole packs, or padded by too much.
        for V, stride in ((2**31, 2**31), (20, 21), (20, 20 + 32 * 4), (24, 20)):
            arguments = x, targets, x[0], x[0], None, 2, V, stride, 0, -100, 0.0, 1, 0
            with pytest.raises(RuntimeError, match="gpt2fast_linear_cross_entropy: CUDA error 1$"):
                library.call(kernels.SOURCE, "gpt2fast_linear_cross_entropy", *arguments)
