"""The backward pass of the MLP on the PTX machine, in Triton and in CUDA C++: what is launched and moved."""

import pytest
import torch
from both import kernels_of

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast import products
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth
from gpt2fast.testing.inputs import build, reference, truth

DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
BIASES = dict(bias_in=True, bias_out=True, keep=True)
run = kernels_of("mlp")


def check(found, args, wanted):
    op = OPS["mlp_backward"]
    for name, ours, plain, exact in zip(op.outputs, found, reference(op, args), truth(op, args)):
        if name in wanted:
            assert_close_to_truth(ours, plain, exact, name)
        else:
            assert not ours.numel()


@DTYPES
def test_launches_and_bytes(run, dtype):
    """There are four products. The first reads the preactivation once and writes its gradient once."""
    M = 128
    args = build(OPS["mlp_backward"], dict(B=1, T=64, K=32, M=M, N=64, **BIASES), dtype)
    found, launches = run("mlp_backward", args)
    check(found, args, OPS["mlp_backward"].outputs)
    kernel = "linear_kernel" if run.backend == "triton" else "product_kernel"
    assert [kernel in launch.kernel for launch in launches] == 4 * [True]
    _, first, _, _ = launches
    moved = {name.removesuffix("_ptr"): buffer for name, buffer in first.per_buffer.items()}
    assert moved["preactivation"]["read_bytes"] == 64 * M * dtype.itemsize
    assert first.counters["global_store_bytes"] == 64 * M * dtype.itemsize
    for arch in ("sm_80", "sm_90", "sm_100"):
        assert first.resources(arch).spill_stores == 0


@DTYPES
@pytest.mark.parametrize("activation", ("gelu_tanh", "gelu_erf"))
def test_sizes_that_no_tile_divides(run, activation, dtype):
    case = dict(B=2, T=19, K=21, M=75, N=33, activation=activation, **BIASES)
    args = build(OPS["mlp_backward"], case, dtype)
    found, _ = run("mlp_backward", args)
    check(found, args, OPS["mlp_backward"].outputs)


@pytest.mark.parametrize(
    "want, count",
    (("dx", 2), ("dweight_out", 1), ("dweight_in", 2), ("dbias_in", 1), ("dbias_out", 0), ("dx dbias_out", 2), ("", 0)),
)
def test_only_what_is_wanted_is_computed(run, want, count):
    args = build(OPS["mlp_backward"], dict(B=2, T=5, K=24, M=40, N=33, **BIASES)) | dict(want=want)
    found, launches = run("mlp_backward", args)
    assert len(launches) == count
    check(found, args, want.split())


@DTYPES
def test_calls_of_the_same_shapes_share_a_plan(run, dtype):
    """The plan holds no tensor, so that the second call's results are its own. Other strides have another plan. Some
    tensors with gaps between rows or columns are copied."""
    case = dict(B=2, T=9, K=24, M=40, N=33, **BIASES)
    first, second = (build(OPS["mlp_backward"], case, dtype, seed=seed) for seed in (0, 1))
    made = products._mlp_backward_plan.cache_info
    run("mlp_backward", first)
    before = made()
    found, _ = run("mlp_backward", second)
    assert made().hits == before.hits + 1 and made().misses == before.misses
    check(found, second, OPS["mlp_backward"].outputs)
    for name in ("dy", "x", "preactivation", "hidden"):
        for step in (1, 2):
            wide = second[name].new_zeros(*second[name].shape[:-1], 96)
            view = wide[..., : step * second[name].shape[-1] : step].copy_(second[name])
            found, launches = run("mlp_backward", second | {name: view})
            assert len(launches) == 4
            check(found, second, OPS["mlp_backward"].outputs)
