"""Decode attention on the PTX machine, in Triton and in CUDA C++: caches of any length and layout, padding, windows.

The machine raises an error if a kernel breaks memcheck or racecheck, so that every launch here is a test of both.
"""

import pytest
import torch
from both import kernels_of

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.dtypes import dtype_name
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth
from gpt2fast.testing.inputs import build, reference, truth

OP = OPS["decode_attention"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
run = kernels_of("decode_attention")


def check(run, args):
    out, _ = run(OP.name, args)
    plain, exact = reference(OP, args)[0], truth(OP, args)[0]
    assert out.dtype == plain.dtype and out.shape == plain.shape and out.is_contiguous()
    assert_close_to_truth(out, plain, exact)
    return out


def inputs(T=2, S=150, H=3, D=64, lengths=(150, 70), dtype=torch.bfloat16, **others):
    g = torch.Generator().manual_seed(S + D)
    q, k, v = (torch.randn(len(lengths), n, H, D, generator=g).to(dtype) for n in (T, S, S))
    return dict(q=q, k=k, v=v, lengths=torch.tensor(lengths, dtype=torch.int64)) | others


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("D", (1, 40, 64, 80, 128, 130, 250, 256))
def test_head_sizes(run, D, dtype):
    """Some head sizes are not multiples of 16 bytes, or not powers of two."""
    check(run, inputs(D=D, dtype=dtype, starts=torch.tensor([3, 66])))


@pytest.mark.parametrize("T", (1, 3, 8))
@pytest.mark.parametrize("S", (1, 63, 64, 65, 129, 300))
def test_lengths(run, S, T):
    """Full rows, rows that end at or near the end of a block's keys, rows shorter than the queries, and empty rows."""
    check(run, inputs(T=T, S=S, lengths=[min(n, S) for n in (S, 0, 1, T, 63, 64, 65, 128, 200)]))


@pytest.mark.parametrize("window", (1, 5, 64, 2**40))
@pytest.mark.parametrize("padded", (False, True))
def test_windows(run, padded, window):
    starts = torch.tensor([0, 69, 70, 149]) if padded else None
    check(run, inputs(T=4, lengths=(150, 70, 70, 149), window=window, starts=starts))


def test_a_query_that_sees_nothing_gives_zeros(run):
    """The query's row is empty, is all padding, or begins after the query."""
    args = inputs(T=3, S=200, lengths=(0, 150, 2, 150), starts=torch.tensor([0, 150, 0, 148]))
    out = check(run, args)
    assert not out[:2].any() and not out[2, 0].any() and out[2, 1:].any() and not out[3, 0].any()


def test_a_cache_without_columns(run):
    args = inputs(S=0, lengths=(0, 0))
    assert not run(OP.name, args)[0].any()


@pytest.mark.parametrize("window", (0, 9))
@pytest.mark.parametrize("poison", (torch.nan, torch.inf))
def test_what_lies_in_keys_that_nobody_sees(run, poison, window):
    args = inputs(S=200, lengths=(150, 70), starts=torch.tensor([7, 65]), window=window)
    clean = check(run, args)
    for b, (start, end) in enumerate(((7, 150), (65, 70))):
        for tensor in (args["k"][b], args["v"][b]):
            tensor[: max(start, end - 2 - window + 1 if window else 0)] = poison
            tensor[end:] = poison
    assert torch.equal(run(OP.name, args)[0], clean)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_layouts(run, dtype):
    """Caches by position and by head, k and v in one tensor, parts of larger tensors, addresses of any alignment."""
    H, D, S = 3, 64, 150
    wide = torch.randn(2, 3, S, H, D + 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    flat = wide.reshape(-1)
    args = inputs(dtype=dtype)
    for k, v in (
        (wide[:, 0, ..., :D], wide[:, 1, ..., :D]),
        (wide[:, 0, ..., 1 : D + 1], wide[:, 1, ..., :D]),
        (wide[:, 1, :, :, :D], wide[:, 1, :, :, 8:]),
        [x.contiguous().transpose(1, 2) for x in wide[..., :D].transpose(2, 3).unbind(1)[:2]],
        [x[1:].as_strided((2, S, H, D), (S * H * D, H * D, D, 1)) for x in (flat, flat[5:])],
        [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in wide[..., :D].unbind(1)[:2]],
        (wide[:1, 0, ..., :D].expand(2, S, H, D), wide[:, 0, :, :1, :D].expand(2, S, H, D)),
    ):
        check(run, args | dict(k=k, v=v))
    q = torch.randn(2, 2, 3, H, 2 * D).to(dtype)
    for given in (
        q[:, :, 1, :, :D],
        q[:, :, 1, :, 1 : D + 1],
        q[..., :D].transpose(1, 2)[:, 0],
        q[..., :D][:, 0].mT.mT[:, :2],
    ):
        check(run, args | dict(q=given))


def test_large_scores_keep_the_digits_of_their_differences(run):
    """The same differences of scores give the same bits, in every block of keys and across blocks."""
    args = inputs(T=1, S=150, D=32, dtype=torch.float32, lengths=(150, 131), scale=1.0)
    for name in "qk":
        args[name] = args[name].round()
    args["q"][..., 0], args["k"][..., 0] = 2.0**11, 0
    near, _ = run(OP.name, args)
    args["k"][..., 0] = 2.0**10
    assert torch.equal(run(OP.name, args)[0], near)


def test_bits_repeat(run):
    args = inputs(T=3, S=700, lengths=(700, 690, 3))
    first, _ = run(OP.name, args)
    for _ in range(2):
        assert torch.equal(run(OP.name, args)[0], first)


def test_a_decoded_row_does_not_depend_on_its_batch(run):
    args = build(OP, dict(B=3, T=1, S=300, H=2, D=64, starts=True), torch.bfloat16)
    together, _ = run(OP.name, args)
    for b in range(3):
        one = {n: v[b : b + 1] if isinstance(v, torch.Tensor) else v for n, v in args.items()}
        assert torch.equal(run(OP.name, one)[0], together[b : b + 1])


def test_a_row_does_not_depend_on_the_capacity(run):
    """The bits also do not depend on whether a row has the keys of one block in a cache of many blocks."""
    args = inputs(S=400, lengths=(60, 33))
    wide, _ = run(OP.name, args)
    for S in (60, 64, 150):
        assert torch.equal(run(OP.name, args | dict(k=args["k"][:, :S], v=args["v"][:, :S]))[0], wide)


def test_rows_2_to_the_31_apart(run, tmp_path):
    """Offsets of rows and of positions are computed in 64 bits. The file has only the blocks that are touched."""
    file, far = tmp_path / "far", 2**31 + 64
    with file.open("wb") as f:
        f.truncate(2 * (far + 5 * 128))
    memory = torch.from_file(str(file), shared=True, size=far + 5 * 128, dtype=torch.bfloat16)
    for shape, strides in (((2, 5, 2, 64), (far, 128, 64, 1)), ((1, 2, 2, 64), (0, far, 64, 1))):
        cache = memory.as_strided(shape, strides)
        cache.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
        args = inputs(T=1, S=shape[1], H=2, lengths=shape[:1] * shape[0])
        near, _ = run(OP.name, args | dict(k=cache.contiguous()))
        assert torch.equal(run(OP.name, args | dict(k=cache))[0], near)
        near, _ = run(OP.name, args | dict(v=cache.contiguous()))
        assert torch.equal(run(OP.name, args | dict(v=cache))[0], near)
    file.unlink()


@pytest.mark.parametrize("B, T, H", ((0, 1, 2), (2, 0, 2), (2, 1, 0)))
def test_nothing(run, B, T, H):
    args = inputs(T=T, H=H, lengths=[5] * B)
    assert run(OP.name, args)[0].shape == (B, T, H, 64)
