"""Layer norm in Triton on the PTX machine: exact bytes, compiled registers. Results: test_gpu_layer_norm.py.

The machine raises an error if a kernel breaks memcheck or racecheck, so that every launch here is a test of both.
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

from gpt2fast.dtypes import dtype_name
from gpt2fast.kernels import layer_norm as kernels
from gpt2fast.op import OPS
from gpt2fast.testing import ptx
from gpt2fast.testing.inputs import build

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def short(value):
    return dtype_name(value) if isinstance(value, torch.dtype) else None


def run(name, args):
    function, supports = kernels.KERNELS[name]
    assert supports(**args) is None
    with ptx.machine() as m:
        return function(**args), m.launches


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
    """Memory is read and written once. The device has two multiprocessors, so that few rows fill all its programs.

    least: every input once, every output once. Beyond that, each program reads the parameters once, and the backward
    pass writes and reads its strips, 8 P C bytes each way. Both are counted exactly here.
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
    # Every lane asks for its row's mean and rstd. The machine counts four bytes for each lane, but memory moves one
    # sector for each warp. Here they count once, and their sectors are counted separately.
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
    """What Triton compiles for a launch with aligned pointers and sizes that are multiples of 16."""
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
    """(compiled kernel, how many of its programs a multiprocessor should hold)"""
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
            # Registers are allocated in units of eight. Where eight programs should be resident, one may have to wait:
            # some compilers use 64 registers and others 72.
            resident = most - (most == 8)
            assert -(-registers // 8) * 8 * 32 * kernel.metadata.num_warps * resident <= 65536, what


def test_compiles_for_amd():
    for dtype in ("bf16", "fp32"):
        assert all("hsaco" in k.asm for k, _ in all_kernels(768, dtype, GPUTarget("hip", "gfx942", 64)))
