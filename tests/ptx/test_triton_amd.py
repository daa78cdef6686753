"""Every Triton kernel, as the wrappers launch it, compiles for AMD's GPUs of both kinds. None was run on one."""

import importlib

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from gpt2fast.kernels import MODULES
from gpt2fast.op import OPS
from gpt2fast.testing import call, on, work
from gpt2fast.testing.inputs import build, cut

GPUS = (GPUTarget("hip", "gfx942", 64), GPUTarget("hip", "gfx1100", 32))


def launched(module):
    """(kernel, compiled variant) of all that was launched from a module so far."""
    for function in vars(module).values():
        if isinstance(function, triton.JITFunction) and function.fn.__module__ == module.__name__:
            for kernels, *_ in function.device_caches.values():
                for compiled in kernels.values():
                    yield function, compiled


@pytest.mark.parametrize("name", MODULES)
def test_compiles(name):
    op = OPS[name]
    cases = [case for case in op.cases if work(op, case)]
    module = importlib.import_module(f"gpt2fast.kernels.{MODULES[name]}")
    for function in vars(module).values():
        if isinstance(function, triton.JITFunction):
            function.device_caches.clear()
    with on("triton:ptx"):
        for case in (min(cases, key=len), max(cases, key=len)):  # the fewest and the most that an op is asked for
            call(op, build(op, cut(op, case, 100_000), torch.bfloat16))
    variants = list(launched(module))
    assert variants
    for function, compiled in variants:
        known, options = compiled.src, compiled.metadata
        words = dict(known.constants)
        if "PRECISION" in function.arg_names:  # as is said there where a GPU is AMD's
            words[(function.arg_names.index("PRECISION"),)] = "ieee"
        source = ASTSource(function, known.signature, words, known.attrs)
        for gpu in GPUS:
            chosen = dict(num_warps=options.num_warps, num_stages=options.num_stages, enable_fp_fusion=True)
            assert "hsaco" in compile(source, target=gpu, options=chosen).asm, (function.__name__, gpu)
