"""Cross entropy in CUDA C++: what it moves, its registers, and what it refuses. Results: test_gpu_cross_entropy.py."""

import pytest
import torch

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast import backends, ops
from gpt2fast.cuda import cross_entropy as kernels
from gpt2fast.cuda import library
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth, ptx
from gpt2fast.testing.inputs import build

pytestmark = pytest.mark.skipif(library.machine_reason() is not None, reason=str(library.machine_reason()))
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
V = 50257
THREADS, SECTOR = 256, 32


def run(name, args):
    with ptx.machine() as machine:
        kernels.KERNELS[name][0](**args)
    return machine.launches


def moved(launch, unit="bytes"):
    return sum(launch.counters[f"global_{kind}_{unit}"] for kind in ("load", "store"))


@DTYPES
@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_bytes_of_losses(dtype, smoothing):
    """A row is read once, and the logit at its target once more. Reads have 128 bits, except at the ends of a row."""
    R, size = 17, dtype.itemsize
    case = dict(R=R, V=V, reduction="mean", label_smoothing=smoothing)
    rows, mean = run("cross_entropy", build(OPS["cross_entropy"], case, dtype))
    counted = R - R // 3  # every third row is ignored
    assert rows.per_buffer["logits"]["read_bytes"] == R * V * size + counted * size
    assert rows.counters["global_load_bytes"] == R * V * size + counted * size + R * 8
    assert rows.counters["global_store_bytes"] == R * 8  # loss and lse
    least = R * V * size + R * 16
    assert moved(rows) <= 1.05 * least and SECTOR * moved(rows, "sectors") <= 1.05 * least
    assert not rows.inefficient() and least >= 0.95 * 512 * rows.counters["global_load_requests"]
    assert mean.grid == (1, 1, 1) and moved(mean) == R * 12 + 4 and not mean.inefficient()
    (alone,) = run("cross_entropy", build(OPS["cross_entropy"], case | dict(reduction="none"), dtype))
    assert alone.counters == rows.counters


@DTYPES
def test_bytes_of_gradients(dtype):
    """A row is read once and written once; an ignored row is only written. A cache holds what all threads ask for."""
    R, size = 17, dtype.itemsize
    args = build(OPS["cross_entropy_backward"], dict(R=R, V=V, reduction="mean", label_smoothing=0.1), dtype)
    scale, rows = run("cross_entropy_backward", args)
    assert scale.grid == (1, 1, 1) and moved(scale) == R * 8 + 4 + 4 and not scale.inefficient()
    counted = R - R // 3
    assert rows.per_buffer["logits"]["read_bytes"] == counted * V * size
    assert rows.per_buffer["dlogits"]["written_bytes"] == rows.counters["global_store_bytes"] == R * V * size
    least = (R + counted) * V * size + R * 12 + counted * 4
    assert moved(rows) <= 1.05 * least and SECTOR * moved(rows, "sectors") <= 1.05 * least
    requests = moved(rows, "requests") - THREADS // 32 * (R + 2 * counted)  # without a warp's for target, lse and scale
    assert not rows.inefficient() and least >= 0.95 * 512 * requests
    (alone,) = run("cross_entropy_backward", args | dict(reduction="sum"))
    assert alone.counters == rows.counters


@DTYPES
def test_rows_with_gaps_and_large_logits(dtype):
    """If logits and gradients are not aligned alike, numbers go one by one, but still only once. If lse is large, a row
    is read twice."""
    R, size = 5, dtype.itemsize
    case = dict(R=R, V=V, reduction="sum")
    args = build(OPS["cross_entropy_backward"], case, dtype) | dict(targets=torch.arange(R))
    wide = torch.randn(R, V + 47).to(dtype)[:, :V]
    (apart,) = run("cross_entropy_backward", args | dict(logits=wide))
    assert apart.per_buffer["logits"]["read_bytes"] == apart.per_buffer["dlogits"]["written_bytes"] == R * V * size
    far = args["logits"] + 1000
    (twice,) = run("cross_entropy_backward", args | dict(logits=far, lse=torch.logsumexp(far.float(), 1)))
    assert twice.per_buffer["logits"]["read_bytes"] == 2 * R * V * size and not twice.inefficient()
    assert twice.per_buffer["dlogits"]["written_bytes"] == R * V * size


@DTYPES
@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_nothing_spills(dtype, smoothing):
    for name in kernels.KERNELS:
        for launch in run(name, build(OPS[name], dict(R=3, V=300, label_smoothing=smoothing), dtype)):
            for arch in ("sm_80", "sm_90", "sm_100"):
                found = launch.resources(arch)
                assert found.stack == found.spill_stores == 0, f"{launch.name} {arch}: {found}"
                assert launch.block[0] != THREADS or launch.occupancy(arch) >= 5 * THREADS / 2048


def test_smoothing_keeps_the_digits_of_differences():
    """The mean logit is computed from differences from the greatest, too."""
    small = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)).round()
    targets = torch.arange(40)
    with ptx.machine():
        far, near = (
            kernels.cross_entropy(logits, targets, label_smoothing=0.3, reduction="none")[0]
            for logits in (small + 2.0**22, small)
        )
    assert torch.equal(far, near)


def test_an_ignored_row_of_no_numbers():
    logits = torch.randn(2, 100)
    logits[1] = torch.nan
    targets = torch.tensor([3, -100])
    with ptx.machine():
        loss, lse = kernels.cross_entropy(logits, targets)
        dlogits = kernels.cross_entropy_backward(torch.ones(()), logits, targets, lse)
    assert loss.isfinite() and dlogits.isfinite().all() and not dlogits[1].any()


def test_many_rows_reduce_in_a_fixed_order():
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(-1, 3, (5000,), generator=g)
    loss = torch.rand(5000, generator=g).where(targets >= 0, 0.0)
    found = loss.new_empty(8)
    with ptx.machine():
        for out in found:
            library.call(kernels.SOURCE, "gpt2fast_cross_entropy_reduce", loss, targets, out, 5000, -1, 1)
    assert len(found.unique()) == 1
    count = (targets >= 0).sum()
    assert_close_to_truth(found[:1], (loss.sum() / count)[None], (loss.double().sum() / count)[None])


def test_refused():
    x, targets = torch.randn(2, 20), torch.tensor([0, 1])
    with ptx.machine(), backends.use_backend("cuda"):
        with pytest.raises(RuntimeError, match="cross entropy in CUDA covers .*, got float64"):
            ops.cross_entropy(x.double(), targets)
        columns = kernels.MOST_COLUMNS + 1
        with pytest.raises(RuntimeError, match=f"cross entropy in CUDA covers up to {columns - 1} columns"):
            ops.cross_entropy(torch.empty(1, 1).expand(1, columns), targets[:1])
        arguments = x, targets, x[0], x[0], 2, columns, 20, -100, 0.0, 0  # called past Python's checks
        with pytest.raises(RuntimeError, match="gpt2fast_cross_entropy: CUDA error 1$"):
            library.call(kernels.SOURCE, "gpt2fast_cross_entropy", *arguments)
