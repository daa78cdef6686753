"""The embedding in Triton: exact bytes and no spills. Results: test_gpu_embedding.py."""

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

from gpt2fast.kernels import embedding as kernels
from gpt2fast.op import OPS
from gpt2fast.testing import ptx
from gpt2fast.testing.inputs import build

FUNCTIONS = (kernels.embedding_kernel, kernels.embedding_backward_kernel, kernels.embedding_backward_join_kernel)


def run(name, args):
    function, supports = kernels.KERNELS[name]
    assert supports(**args) is None
    with ptx.machine() as m:
        return function(**args), m.launches


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_bytes(dtype):
    """Two rows of the tables are read and one row is written, 16 bytes per lane. Each tile of columns reads the indices
    once."""
    B, T, C = 2, 33, 768
    args = build(OPS["embedding"], dict(B=B, T=T, C=C, V=100, P=64, start=5), dtype)
    _, (launch,) = run("embedding", args)
    assert not launch.inefficient()
    size = dtype.itemsize
    assert launch.per_buffer["wte_ptr"]["read_bytes"] == launch.per_buffer["wpe_ptr"]["read_bytes"] == B * T * C * size
    assert launch.counters["global_store_bytes"] == B * T * C * size


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_bytes_backward(dtype):
    """Rows of dy are read once for each table, and rows of gradients are written once. Only hot tokens have parts."""
    B, T, C, hot = 4, 300, 256, 700
    tokens = torch.arange(B * T)
    tokens[:hot] = 3
    args = dict(dy=torch.randn(B, T, C).to(dtype), tokens=tokens.view(B, T), V=1500, P=T)
    _, launches = run("embedding_backward", args)
    source = Path(kernels.__file__).read_text().splitlines()
    for launch in launches:  # only the indices of rows are read from anywhere on
        slow = [source[int(place.split(":")[1]) - 1] for place in launch.inefficient()]
        assert all("tl.load(row_ptr + n" in line or "tl.load(source_ptr + n" in line for line in slow), slow
    size = dtype.itemsize
    of_tokens, joined, of_positions, _ = (launch.per_buffer for launch in launches)
    assert of_tokens["dy_ptr"]["read_bytes"] == of_positions["dy_ptr"]["read_bytes"] == B * T * C * size
    # The hot token's sorted rows are the first 700, in segments of 256: three parts. It and the rest are written once.
    assert of_tokens["parts_ptr"]["written_bytes"] == joined["parts_ptr"]["read_bytes"] == 3 * C * 4
    assert of_tokens["out_ptr"]["written_bytes"] == (B * T - hot) * C * size
    assert joined["out_ptr"]["written_bytes"] == C * size


@pytest.mark.parametrize("arch", (80, 90, 100))
def test_nothing_spills(arch, tmp_path):
    tool, cubin = Path(nvidia.__file__).parent / "bin" / "cuobjdump", tmp_path / "kernel.cubin"
    constants = dict(
        HAS_POSITIONS=True, HAS_TYPES=True, BLOCK_R=4, BLOCK_C=1024, BLOCK_N=kernels.ROWS_AT_ONCE, SEGMENT=256
    )
    for function in FUNCTIONS:
        own = constants | (dict(BLOCK_C=256) if function is not kernels.embedding_kernel else {})
        integers = ("tokens_ptr", "positions_ptr", "types_ptr", "row_ptr", "source_ptr")
        signature, places = {}, {}
        for i, name in enumerate(function.arg_names):
            pointer = "*i64" if name in integers else "*fp32" if name == "parts_ptr" else "*bf16"
            kind = pointer if name.endswith("_ptr") else "i32"
            signature[name] = "constexpr" if name in own else kind
            if name in own:
                places[(i,)] = own[name]
        source = ASTSource(fn=function, signature=signature, constexprs=places)
        options = dict(num_warps=kernels.WARPS, enable_fp_fusion=True)
        cubin.write_bytes(compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["cubin"])
        text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
        assert stack == 0, f"{function.__name__}: {registers} registers, {stack} bytes of spills a thread"
        if arch == 80:
            assert "hsaco" in compile(source, target=GPUTarget("hip", "gfx942", 64), options=options).asm
