"""A program that uses the kernels in CUDA C++ without torch and Python links, and runs on the PTX machine."""

import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.cuda import library
from gpt2fast.testing import ptx
from gpt2fast.testing.ptx.toolchain import tool

pytestmark = pytest.mark.skipif(library.machine_reason() is not None, reason=str(library.machine_reason()))
SOURCES = [
    Path(__file__).with_name("standalone.cu"),
    library.SOURCES / "layer_norm.cu",
    library.SOURCES / "attention.cu",
]


def test_it_runs(capfd):
    program = ptx.load_cuda(*SOURCES, flags=library.FLAGS)
    with ptx.machine() as machine:
        assert program.gpt2fast_standalone(32 * torch.finfo(torch.float32).eps) == 0  # the numbers are at most 3
        assert program.gpt2fast_standalone(0.0) == -1
    assert len(machine.launches) == 4
    assert "layer norm and attention of 40 tokens, head size 32: off by" in capfd.readouterr().out


def test_it_links_and_says_what_is_missing(tmp_path):
    """It is built as its first lines say, for no particular architecture. Without a driver it returns CUDA's error."""
    out = tmp_path / "standalone"
    flags = ["-std=c++20", "-gencode=arch=compute_80,code=compute_80"]
    subprocess.run([tool("nvcc"), *flags, "-o", out, *SOURCES], check=True)
    done = subprocess.run([out], capture_output=True, text=True)
    if torch.cuda.is_available():
        assert done.returncode == 0 and "off by" in done.stdout
    else:
        assert done.returncode == 2 and not done.stdout  # cudaErrorMemoryAllocation: no device, no memory
