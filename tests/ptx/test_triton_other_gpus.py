"""Compiles every Triton kernel, as the wrappers launch it, for AMD's GPUs and NVIDIA's newer ones. None runs there."""

import importlib

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from gpt2fast.kernels import MODULES, tiles
from gpt2fast.op import OPS
from gpt2fast.testing import call, on, work
from gpt2fast.testing.inputs import build, cut

AMD = (GPUTarget("hip", "gfx942", 64), GPUTarget("hip", "gfx1100", 32))
UNITS = {90: "wgmma.mma_async", 100: "tcgen05.mma"}  # the newest matrix instructions, by compute capability


def launched(name, cases, dtype=torch.bfloat16):
    """(kernel, its compiled form) for all kernels that the cases of an op launch."""
    op, modules = OPS[name], [importlib.import_module(f"gpt2fast.kernels.{m}") for m in set(MODULES.values())]
    kernels = {v for module in modules for v in vars(module).values() if isinstance(v, triton.JITFunction)}
    for kernel in kernels:
        kernel.device_caches.clear()
    with on("triton:ptx"):
        for case in cases:
            call(op, build(op, case, dtype))
    found = [(k, made) for k in kernels for cache, *_ in k.device_caches.values() for made in cache.values()]
    assert found
    return found


def compiled(kernel, made, gpu):
    words = dict(made.src.constants)
    if gpu.backend == "hip" and "PRECISION" in kernel.arg_names:  # what the wrapper chooses on an AMD GPU
        words[(kernel.arg_names.index("PRECISION"),)] = "ieee"
    source = ASTSource(kernel, made.src.signature, words, made.src.attrs)
    chosen = made.metadata
    options = dict(num_warps=chosen.num_warps, num_stages=chosen.num_stages, enable_fp_fusion=True)
    return compile(source, target=gpu, options=options)


@pytest.mark.parametrize("name", MODULES)
def test_compiles_for_amd(name):
    """The case with the most words, and with the fewest. The words of a case are what the op is asked for.

    The second case is compiled for one of the GPUs only, except for kernels that the first case does not launch.
    """
    op = OPS[name]
    cases = [case for case in op.cases if work(op, case)]
    most, fewest = (launched(name, [cut(op, pick(cases, key=len), 100_000)]) for pick in (max, min))
    known = {kernel for kernel, _ in most}
    for kernel, made in [*most, *fewest]:
        for gpu in AMD[:1] if kernel in known and (kernel, made) not in most else AMD:
            assert "hsaco" in compiled(kernel, made, gpu).asm, (kernel, gpu)


@pytest.mark.parametrize("capability", UNITS)
@pytest.mark.parametrize("name", ("linear", "linear_backward", "attention", "attention_backward"))
def test_the_newest_matrix_instructions(name, capability):
    """Large products of 16-bit numbers use the newest matrix instructions, and none of the older ones."""
    sizes = dict(T=600, K=128, N=256) if "linear" in name else dict(T=256, S=256, H=1, D=64)
    multiplying = [(k, made) for k, made in launched(name, [dict(B=1, **sizes)]) if "mma.sync" in made.asm["ptx"]]
    assert multiplying
    for kernel, made in multiplying:
        text = compiled(kernel, made, GPUTarget("cuda", capability, 32)).asm["ptx"]
        assert UNITS[capability] in text and "mma.sync" not in text, kernel


@pytest.mark.parametrize(
    "name, case, dtype",
    (
        ("linear", dict(B=1, T=600, K=64, N=128), torch.bfloat16),
        ("attention", dict(B=1, T=20, S=20, H=1, D=64), torch.bfloat16),
        ("decode_attention", dict(B=1, T=1, S=20, H=1, D=256), torch.float32),
    ),
)
def test_the_largest_tiles_fit_in_the_shared_memory_of_amd(name, case, dtype, monkeypatch):
    """64 KiB a block. The rule's tile of decode_attention for float32 heads of 256 does not: the table has another."""
    for gpu in AMD:
        monkeypatch.setattr(tiles, "architecture", lambda gpu=gpu: gpu.arch)
        for known in tiles.KNOWN.values():
            monkeypatch.setattr(known, "_found", {})
        for kernel, made in launched(name, [case], dtype):
            assert compiled(kernel, made, gpu).metadata.shared <= 64 << 10, (kernel, gpu)
