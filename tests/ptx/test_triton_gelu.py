"""GELU in Triton on the PTX machine: exact bytes, and registers of the compiled code. Results: test_gpu_gelu.py."""

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

from gpt2fast.kernels import gelu as kernels
from gpt2fast.op import OPS
from gpt2fast.testing import ptx
from gpt2fast.testing.inputs import build

FORMS = ("tanh", "none")


def run(name, args):
    function, supports = kernels.KERNELS[name]
    assert supports(**args) is None
    with ptx.machine() as m:
        return function(**args), m.launches


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("name", kernels.KERNELS)
def test_bytes(name, dtype):
    """Every element is read once and written once, 16 bytes per lane. A bias is read once for each tile."""
    R, C = 70, 3072
    _, (launch,) = run(name, build(OPS[name], dict(B=1, T=R, C=C, approximate="tanh"), dtype))
    assert not launch.inefficient()
    size = dtype.itemsize
    activations = (3 if name == "gelu_backward" else 2) * R * C * size
    flat = name != "bias_gelu"
    rows, columns = kernels.tile(flat, C)
    programs = -(-R * C // columns) if flat else -(-R // rows) * -(-C // columns)
    bias = programs * columns * size if name == "bias_gelu" else 0
    moved = launch.counters["global_load_bytes"] + launch.counters["global_store_bytes"]
    assert launch.grid[0] == programs and moved == activations + bias
    assert moved <= 1.05 * (activations + (C * size if name == "bias_gelu" else 0))


def compiled(function, form, target):
    """What Triton compiles for one long row, with aligned pointers and a length that is a multiple of 16."""
    constants = dict(HAS_BIAS=False, TANH=form == "tanh", BLOCK_R=1, BLOCK_C=kernels.TILE)
    signature, attributes, places = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        signature[name] = "*bf16" if name.endswith("_ptr") else "constexpr" if name in constants else "i32"
        if name in constants:
            places[(i,)] = constants[name]
        elif name != "R":
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=places, attrs=attributes)
    return compile(source, target=target, options=dict(num_warps=kernels.WARPS, enable_fp_fusion=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch", (80, 90, 100))
def test_nothing_spills(arch, form, tmp_path):
    tool, cubin = Path(nvidia.__file__).parent / "bin" / "cuobjdump", tmp_path / "kernel.cubin"
    for function in (kernels.gelu_kernel, kernels.gelu_backward_kernel):
        cubin.write_bytes(compiled(function, form, GPUTarget("cuda", arch, 32)).asm["cubin"])
        text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
        assert stack == 0 and registers <= 128, f"{function.__name__}: {registers} registers, {stack} bytes of spills"


@pytest.mark.parametrize("form", FORMS)
def test_compiles_for_amd(form):
    for function in (kernels.gelu_kernel, kernels.gelu_backward_kernel):
        assert "hsaco" in compiled(function, form, GPUTarget("hip", "gfx942", 64)).asm
