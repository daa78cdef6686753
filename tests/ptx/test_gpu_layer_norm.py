"""Layer norm on the PTX machine, in Triton and in CUDA C++: parity by the project's rule, layouts, far rows.

The machine raises an error if a kernel breaks memcheck or racecheck, so that every launch here is a test of both.
"""

import pytest
import torch
from both import kernels_of

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.dtypes import dtype_name
from gpt2fast.op import OPS
from gpt2fast.tensors import dense_rows
from gpt2fast.testing import assert_close_to_truth
from gpt2fast.testing.inputs import build, reference, truth

NAMES = ("layer_norm", "add_layer_norm", "layer_norm_backward")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


run = kernels_of("layer_norm")


def short(value):
    return dtype_name(value) if isinstance(value, torch.dtype) else None


def check(run, name, case, dtype, layout="contiguous"):
    rows = case["B"] * case["T"]
    # With fewer than 32 numbers, plain PyTorch's own error is chance. So several draws are pooled.
    seeds = range(16 if 0 < min(rows, case["C"]) < 32 and rows * case["C"] < 4096 else 1)
    draws = [build(OPS[name], case, dtype, layout, seed) for seed in seeds]
    found = [run(name, args)[0] for args in draws]
    plain = [reference(OPS[name], args) for args in draws]
    exact = [truth(OPS[name], args) for args in draws]
    for i, what in enumerate(OPS[name].outputs):
        assert all(f[i].dtype == p[i].dtype and f[i].is_contiguous() for f, p in zip(found, plain))
        pooled = [torch.stack([draw[i] for draw in draws]) for draws in (found, plain, exact)]
        assert_close_to_truth(*pooled, f"{name} {what}")


@pytest.mark.parametrize("C", (1, 2, 33, 4096, 16384))
@pytest.mark.parametrize("name", NAMES)
def test_columns(run, name, C):
    check(run, name, dict(B=1, T=5 if C > 4000 else 67, C=C), torch.float32 if C != 4096 else torch.bfloat16)


@pytest.mark.parametrize("name", NAMES[1:])
def test_longest_rows_in_sixteen_bits(run, name):
    check(run, name, dict(B=1, T=2, C=16383), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_large_means_keep_their_digits(run, dtype):
    args = build(OPS["layer_norm"], dict(B=3, T=7, C=768), dtype)
    args["x"] = (args["x"] + 100).to(dtype)
    found, plain, exact = run("layer_norm", args)[0], reference(OPS["layer_norm"], args), truth(OPS["layer_norm"], args)
    for triple in zip(found, plain, exact):
        assert_close_to_truth(*triple)


@pytest.mark.parametrize("shape", ((768,), (0, 768), (2, 0, 768)))
def test_one_dimension_and_no_rows(run, shape):
    x, weight, bias = torch.randn(shape), torch.randn(768), torch.randn(768)
    y, mean, rstd = run("layer_norm", dict(x=x, weight=weight, bias=bias))[0]
    assert y.shape == shape and mean.shape == rstd.shape == shape[:-1] and mean.dtype == torch.float32
    torch.testing.assert_close(y, OPS["layer_norm"].reference(x, weight, bias)[0])
    total = run("add_layer_norm", dict(x=x, residual=x, weight=weight, bias=bias))[0][1]
    assert torch.equal(total, x + x)
    args = dict(dy=x, x=x, weight=weight, mean=mean, rstd=rstd)
    found, _ = run("layer_norm_backward", args)
    for actual, expected in zip(found, OPS["layer_norm_backward"].reference(**args)):
        torch.testing.assert_close(actual, expected)


def test_layouts_in_place_and_copied(run):
    wide = torch.randn(6, 4, 2, 40)
    in_place = {
        "a row of a longer one": wide[..., :33],
        "every second row": wide[:, :, 0],
        "one row for all": wide[0, 0, 0].expand(3, 5, 40),
        "a leading dimension of one": wide[:, :1, 0].transpose(0, 1),
    }
    copied = {
        "leading dimensions that do not collapse": wide.transpose(0, 1),
        "columns apart": wide[..., ::2],
        "transposed": wide[:, 0, 0].t(),
    }
    for what, x in (in_place | copied).items():
        rows, stride = dense_rows(x)
        assert (rows is x) == (what in in_place), what
        C = x.shape[-1]
        args = dict(x=x, weight=torch.randn(2 * C)[::2], bias=torch.randn(2 * C)[::2])
        (y, mean, rstd), _ = run("layer_norm", args)
        torch.testing.assert_close(y, OPS["layer_norm"].reference(**args)[0], msg=what)
        apart = torch.stack((mean, rstd), -1)
        args = dict(dy=x, x=x, weight=args["weight"], mean=apart[..., 0], rstd=apart[..., 1])
        found, _ = run("layer_norm_backward", args)
        for actual, expected in zip((y, *found), (y, *OPS["layer_norm_backward"].reference(**args))):
            assert actual.is_contiguous(), what
            torch.testing.assert_close(actual, expected, msg=what)


def test_rows_2_to_the_31_apart(run, tmp_path):
    """Row offsets are computed in 64 bits. The sparse file has blocks only for the two rows."""
    file, far = tmp_path / "far", 2**31
    with file.open("wb") as f:
        f.truncate(2 * (far + 64))
    x = torch.from_file(str(file), shared=True, size=far + 64, dtype=torch.float16).as_strided((2, 64), (far, 1))
    x.copy_(torch.randn(2, 64))
    args = dict(x=x, weight=torch.randn(64).half(), bias=torch.randn(64).half())
    (y, mean, rstd), _ = run("layer_norm", args)
    torch.testing.assert_close(y, OPS["layer_norm"].reference(**args)[0])
    args = dict(dy=x, x=x, weight=args["weight"], mean=mean, rstd=rstd)
    torch.testing.assert_close(run("layer_norm_backward", args)[0][0], OPS["layer_norm_backward"].reference(**args)[0])
    file.unlink()


def test_a_row_does_not_depend_on_its_batch(run):
    args = build(OPS["add_layer_norm"], dict(B=1, T=33, C=768), torch.bfloat16)
    whole, _ = run("add_layer_norm", args)
    for r in (0, 16, 32):
        one = args | dict(x=args["x"][:, r : r + 1], residual=args["residual"][:, r : r + 1])
        for alone, together in zip(run("add_layer_norm", one)[0], whole):
            assert torch.equal(alone, together[:, r : r + 1])


@pytest.mark.parametrize("C", (768, 9000))
def test_gradients_repeat_bit_for_bit(run, C):
    args = build(OPS["layer_norm_backward"], dict(B=1, T=77 if C == 768 else 19, C=C), torch.float32)
    first, _ = run("layer_norm_backward", args)
    for _ in range(3):
        assert all(map(torch.equal, first, run("layer_norm_backward", args)[0]))
