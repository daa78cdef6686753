"""Attention in CUDA C++: what it moves and multiplies and the registers it needs, by head size. Results:
test_gpu_attention.py."""

import re

import pytest
import torch

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.cuda import attention as kernels
from gpt2fast.cuda import attention_backward as gradients
from gpt2fast.cuda import library
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth, ptx
from gpt2fast.testing.inputs import build, reference, truth

pytestmark = pytest.mark.skipif(library.machine_reason() is not None, reason=str(library.machine_reason()))
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
HEAD_SIZES = (32, 64, 80, 96, 128, 256)
PRODUCTS = {torch.float32: 6, torch.bfloat16: 1}  # 16-bit products for one product of the dtype


def c_attn(T, H, D, dtype):
    """q, k and v as views of one tensor, as GPT-2 has them."""
    qkv = torch.randn(1, T, 3 * H * D, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [x.view(1, T, H, D) for x in qkv.split(H * D, -1)]


def run(*args, **options):
    with ptx.machine() as machine:
        found = kernels.attention(*args, **options)
    (launch,) = machine.launches
    return found, launch


@DTYPES
@pytest.mark.parametrize("D", HEAD_SIZES)
def test_what_it_moves_and_multiplies(D, dtype):
    """Views of one tensor are read where they lie, in whole sectors, and no access has a bank conflict."""
    T = 128
    q, k, v = c_attn(T, 2, D, dtype)
    (out, lse), launch = run(q, k, v)
    args = dict(q=q, k=k, v=v)
    for three in zip((out, lse), reference(OPS["attention"], args), truth(OPS["attention"], args)):
        assert_close_to_truth(*three)
    assert not any(value for name, value in launch.counters.items() if "conflicts" in name)
    slow = launch.inefficient()
    if dtype == torch.float32 and D == 256:  # one of the two blocks of the same queries writes lse
        assert all("global store: 8.00 sectors a request, ideal 7.5" in what for what in slow.values()), slow
    else:
        assert not slow
    # A tile of queries reads the keys up to its last. Two blocks share the columns of wide heads in float32.
    parts, queries = (2, 32) if dtype == torch.float32 and D > 128 else (1, 64)
    keys = 2 * sum(range(queries, T + 1, queries)) * D * dtype.itemsize
    (read,) = (buffer["read_bytes"] for name, buffer in launch.per_buffer.items() if name.startswith("q"))
    assert read == parts * (2 * T * D * dtype.itemsize + keys) + keys
    assert launch.counters["global_store_bytes"] == 2 * T * (D * dtype.itemsize + 4)


@DTYPES
@pytest.mark.parametrize("D", HEAD_SIZES)
@pytest.mark.parametrize("extras", (False, True), ids=("plain", "dropout"))
def test_nothing_spills(D, extras, dtype):
    q, k, v = c_attn(3, 1, D, dtype)
    _, launch = run(q, k, v, seed=torch.tensor([3]), dropout_p=0.1 * extras)
    for arch in ("sm_80", "sm_90"):
        found = launch.resources(arch)
        assert found.stack == found.spill_stores == 0, f"{launch.name} {arch}: {found}"


@DTYPES
def test_a_query_multiplies_no_key_of_a_tile_that_it_does_not_see(dtype):
    """Causal: a tile of 64 queries is multiplied with the keys up to its last query, in both products. With a window of
    64, it is multiplied with at most two tiles of 64 keys."""
    q, k, v = c_attn(256, 1, 64, dtype)
    product = 2 * 2 * 64 * 64 * 64 * PRODUCTS[dtype]  # both products of 64 queries and 64 keys
    assert run(q, k, v)[1].counters["tensor_flops"] == (1 + 2 + 3 + 4) * product
    assert run(q, k, v, causal=False)[1].counters["tensor_flops"] == 16 * product
    assert run(q, k, v, window=64)[1].counters["tensor_flops"] == (1 + 2 + 2 + 2) * product
    assert run(q[:, :64], k, v)[1].counters["tensor_flops"] == 4 * product


@DTYPES
@pytest.mark.parametrize("D", (8, 40, 72, 104, 136, 248, 250))
def test_head_sizes_between_those_of_kernels(D, dtype):
    """Attention with a mask, a window or a bias, odd lengths, and 250 columns, whose rows are not aligned."""
    for case in (dict(mask=True), dict(window=33, causal=False), dict(bias=True, dropout_p=0.3, seed=True)):
        args = build(OPS["attention"], dict(B=2, T=37, S=70, H=2, D=D, **case), dtype)
        with ptx.machine():
            found = kernels.attention(**args)
        for three in zip(found, reference(OPS["attention"], args), truth(OPS["attention"], args)):
            assert_close_to_truth(*three)


def backward(args):
    op, rest = OPS["attention_backward"], dict(mask=None, bias=None, seed=None, causal=True, window=0)
    args = rest | dict(scale=None, dropout_p=0.0) | args
    with ptx.machine() as machine:
        out, lse = kernels.attention(**args)
        given = dict(dout=torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype), **args)
        given |= dict(out=out, lse=lse)
        found = gradients.attention_backward(**given)
    for three in zip(found, reference(op, given), truth(op, given)):
        assert_close_to_truth(*three)
    return machine.launches[1:]


@DTYPES
@pytest.mark.parametrize("D", (64, 96, 128, 256))
def test_what_gradients_multiply_and_take(D, dtype):
    """Causal: pairs of tiles in which no query sees a key are skipped. No bank conflicts, and nothing spills."""
    T = 128
    q, k, v = c_attn(T, 1, D, dtype)
    launches = backward(dict(q=q, k=k, v=v))
    assert [re.search(r"(\w+_kernel)<", launch.name)[1] for launch in launches] == [
        "attention_delta_kernel", "attention_backward_kernel", "attention_backward_kernel",
    ]  # fmt: skip
    wide = dtype == torch.float32
    rows = (16 if D > 128 else 32 if D > 64 else 64) if wide else 64
    columns = 16 if wide else {64: 64, 96: 32, 128: 32, 256: 16}[D]
    pairs = sum(min(T, row + rows) // columns for row in range(0, T, rows))  # a tile of queries with one of keys
    parts = [-(-D // 128), -(-D // (64 if D != 96 else 48)) if wide and D > 64 else -(-D // 128)]
    for launch, part, own in zip(launches[1:], parts, (1, 2)):  # dq: one product of its own; dk and dv: two
        product = 2 * pairs * rows * columns * D * PRODUCTS[dtype]
        assert launch.counters["tensor_flops"] == (2 * part + own) * product
        assert not any(value for name, value in launch.counters.items() if "conflicts" in name)
        assert not launch.counters["global_atomic_requests"]
    for launch in launches:
        for arch in ("sm_80", "sm_90"):
            found = launch.resources(arch)
            assert found.stack == found.spill_stores == 0, f"{launch.name} {arch}: {found}"


@DTYPES
@pytest.mark.parametrize("D", (40, 72, 250))
def test_gradients_of_head_sizes_between_those_of_kernels(D, dtype):
    for case in (dict(mask=True), dict(window=33, causal=False), dict(bias=True, dropout_p=0.3, seed=True)):
        backward(build(OPS["attention"], dict(B=2, T=37, S=70, H=2, D=D, **case), dtype))


def test_a_bias_that_is_expanded_has_a_gradient_of_its_own_size():
    args = build(OPS["attention"], dict(B=2, T=20, S=37, H=2, D=16))
    backward(args | dict(bias=torch.randn(1, 2, 1, 37).expand(2, 2, 20, 37)))


def test_no_key_at_all():
    q, k, v = c_attn(3, 2, 64, torch.bfloat16)
    (out, lse), _ = run(q, k[:, :0], v[:, :0])
    assert not out.any() and (lse == torch.finfo(torch.float32).min).all()
    for found in gradients.attention_backward(out, q, k[:, :0], v[:, :0], out, lse)[:3]:
        assert not found.any()


def test_what_is_covered():
    q = torch.empty(1, 3, 2, 257, device="meta")
    assert kernels.supports(q, q, q) == "attention in CUDA covers head sizes of 1 to 256, got 257"
    q = torch.empty(1, 3, 2, 64, device="meta", dtype=torch.float64)
    assert kernels.supports(q, q, q) == "attention in CUDA covers float32, bfloat16 and float16, got float64"
