"""Layer norm in Triton on the PTX machine: parity by the project's rule, exact bytes, registers as really compiled.

The machine raises where a kernel breaks memcheck or racecheck, so that every launch here is a test of both.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from gpt2fast.kernels import layer_norm as kernels
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth, ptx
from gpt2fast.testing.inputs import build, reference, truth

NAMES = tuple(kernels.KERNELS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def short(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def run(name, args):
    function, supports = kernels.KERNELS[name]
    assert supports(**args) is None
    with ptx.machine() as m:
        return function(**args), m.launches


def check(name, case, dtype, layout="contiguous"):
    rows = case["B"] * case["T"]
    # Of fewer than 32 numbers plain PyTorch's own error is luck: several draws are pooled.
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
def test_columns(name, C):
    check(name, dict(B=1, T=5 if C > 4000 else 67, C=C), torch.float32 if C != 4096 else torch.bfloat16)


@pytest.mark.parametrize("name", NAMES[1:])
def test_longest_rows_in_sixteen_bits(name):
    check(name, dict(B=1, T=2, C=16383), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_large_means_keep_their_digits(dtype):
    args = build(OPS["layer_norm"], dict(B=3, T=7, C=768), dtype)
    args["x"] = (args["x"] + 100).to(dtype)
    found, plain, exact = run("layer_norm", args)[0], reference(OPS["layer_norm"], args), truth(OPS["layer_norm"], args)
    for triple in zip(found, plain, exact):
        assert_close_to_truth(*triple)


@pytest.mark.parametrize("shape", ((768,), (0, 768), (2, 0, 768)))
def test_one_dimension_and_no_rows(shape):
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


def test_layouts_in_place_and_copied():
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
        rows, stride = kernels.dense_rows(x)
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


def test_rows_2_to_the_31_apart(tmp_path):
    """Row offsets are made in 64 bits. The file has no blocks but the two rows'."""
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


def test_a_row_does_not_depend_on_its_batch():
    args = build(OPS["add_layer_norm"], dict(B=1, T=33, C=768), torch.bfloat16)
    whole, _ = run("add_layer_norm", args)
    for r in (0, 16, 32):
        one = args | dict(x=args["x"][:, r : r + 1], residual=args["residual"][:, r : r + 1])
        for alone, together in zip(run("add_layer_norm", one)[0], whole):
            assert torch.equal(alone, together[:, r : r + 1])


@pytest.mark.parametrize("C", (768, 16384))
def test_gradients_repeat_bit_for_bit(C):
    args = build(OPS["layer_norm_backward"], dict(B=1, T=77 if C == 768 else 19, C=C), torch.float32)
    first, launches = run("layer_norm_backward", args)
    assert launches[0].grid == ((10, 1, 1) if C == 768 else (3, 2, 1))
    for _ in range(3):
        assert all(map(torch.equal, first, run("layer_norm_backward", args)[0]))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=short)
@pytest.mark.parametrize("C, R", ((768, 1301), (1600, 602), (4096, 257)))
def test_bytes(C, R, dtype, monkeypatch):
    """Memory is read and written once. On a device of two multiprocessors few rows are as many programs' as ever.

    least: every input once, every output once. Beyond it the parameters are read once a program, and the backward
    pass writes and reads its strips, 8 P C bytes each way. Both are counted here, exactly.
    """
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 2)
    size, case = dtype.itemsize, dict(B=1, T=R, C=C)
    programs = 2 * kernels.forward_tile(C)[-1]
    for name, tensors in (("layer_norm", 2), ("add_layer_norm", 4)):
        _, (launch,) = run(name, build(OPS[name], case, dtype))
        assert launch.grid == (programs, 1, 1) and not launch.inefficient()
        moved = launch.counters["global_load_bytes"] + launch.counters["global_store_bytes"]
        activations = tensors * R * C * size + 2 * R * 4
        assert moved == activations + programs * 2 * C * size
        assert moved <= 1.05 * (activations + 2 * C * size)

    _, (walk, strips) = run("layer_norm_backward", build(OPS["layer_norm_backward"], case, dtype))
    P = walk.grid[0]
    assert P == 2 * kernels.backward_tile(C)[-1] and not walk.inefficient() and not strips.inefficient()
    assert strips.counters["global_load_bytes"] == 8 * P * C
    assert strips.counters["global_store_bytes"] == 2 * C * size
    # A row's mean and rstd are asked for by every lane: the machine counts each lane's four bytes, the memory one
    # sector a warp. They are counted once here, and their sectors apart.
    asked = sum(walk.per_buffer[what]["read_bytes"] for what in ("mean_ptr", "rstd_ptr"))
    sectors = sum(walk.per_buffer[what]["read_sectors"] for what in ("mean_ptr", "rstd_ptr"))
    assert sectors == 2 * R * kernels.backward_tile(C)[3]
    moved = walk.counters["global_load_bytes"] - asked + 2 * R * 4 + walk.counters["global_store_bytes"]
    assert moved == 3 * R * C * size + 2 * R * 4 + P * C * size + 8 * P * C
    least = 3 * R * C * size + 2 * R * 4 + 3 * C * size
    assert moved + strips.counters["global_load_bytes"] + strips.counters["global_store_bytes"] <= 1.05 * least


def test_few_rows_take_few_programs():
    assert kernels.backward_tile(768)[1:2] == (1,)
    with ptx.machine():
        assert [kernels.backward_programs(R, 1, 1, 8) for R in (1, 8, 9, 1024, 8192)] == [1, 1, 2, 128, 108 * 8]


def test_what_is_covered():
    weight = torch.empty(8, device="meta")
    for name, (_, supports) in kernels.KERNELS.items():
        args = [torch.empty(2, 8, device="meta")] * (1 if name == "layer_norm" else 2) + [weight, weight]
        args += [weight] if name == "layer_norm_backward" else []
        assert supports(*args) is None
        wide = [a.double() for a in args]
        assert supports(*wide) == "layer norm in Triton covers float32, bfloat16 and float16, got float64"
        long = [torch.empty(2, 20000, device="meta")] * 2 + args[2:]
        if name != "layer_norm":
            assert supports(*long) == "layer norm in Triton covers 1 to 16384 columns, got 20000"


def compiled(kernel, dtype, target, warps, **constants):
    """What Triton makes for a launch with aligned pointers and sizes that 16 divides."""
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in ("mean_ptr", "rstd_ptr", "strips_ptr") else f"*{dtype}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
            if name not in ("R", "P", "eps"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    return compile(source, target=target, options=dict(num_warps=warps, enable_fp_fusion=True))


def all_kernels(C, dtype, target):
    """(compiled kernel, programs that a multiprocessor shall hold of it)"""
    rows, block, warps, most = kernels.forward_tile(C)
    for residual in (False, True):
        constants = dict(HAS_RESIDUAL=residual, HOLD_PARAMETERS=kernels.hold_parameters(block))
        constants |= dict(BLOCK_R=rows, BLOCK_C=block)
        yield compiled(kernels.layer_norm_kernel, dtype, target, warps, **constants), most
    parts, rows, block, warps, most = kernels.backward_tile(C)
    constants = dict(PARTS=parts, BLOCK_R=rows, BLOCK_C=block)
    yield compiled(kernels.layer_norm_backward_kernel, dtype, target, warps, **constants), most
    if C == 768:
        yield compiled(kernels.layer_norm_strips_kernel, dtype, target, 8, BLOCK_P=256, BLOCK_C=16), 1


@pytest.mark.parametrize("arch", (pytest.param(80, marks=pytest.mark.slow), 90, 100))
@pytest.mark.parametrize("C", (768, 1600, 4096, 16384))
def test_nothing_spills_and_the_grid_is_resident(C, arch, tmp_path):
    tool, cubin = Path(nvidia.__file__).parent / "bin" / "cuobjdump", tmp_path / "kernel.cubin"
    for dtype in ("bf16", "fp32"):
        for kernel, most in all_kernels(C, dtype, GPUTarget("cuda", arch, 32)):
            cubin.write_bytes(kernel.asm["cubin"])
            text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
            registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
            what = f"{kernel.metadata.name} {dtype}: {registers} registers"
            assert stack == 0, f"{what}, {stack} bytes of spills a thread"
            # Registers are given out in eights. Where eight programs shall be resident, one may have to wait: compilers
            # differ by 64 or 72 registers.
            resident = most - (most == 8)
            assert -(-registers // 8) * 8 * 32 * kernel.metadata.num_warps * resident <= 65536, what


def test_compiles_for_amd():
    for dtype in ("bf16", "fp32"):
        assert all("hsaco" in k.asm for k, _ in all_kernels(768, dtype, GPUTarget("hip", "gfx942", 64)))
