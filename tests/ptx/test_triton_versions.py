"""The machine with each Triton that pyproject.toml promises, with one that does not fit, and what Triton asks it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt2fast.testing import ptx

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")
pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]
OLDEST = re.search(r"triton>=([\d.]+)", (ROOT / "pyproject.toml").read_text())[1]
NEWEST = re.search(r"^triton==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)[1]
# Tests of what Triton 3.2 itself cannot compile: tl.gather, dots of float64 and of float32 by six products, atomics of
# bfloat16, and casts that abort it.
TOO_NEW = "not gather and not test_cast and not (test_dot and (dtype6 or bf16x6)) and not (test_atomics and dtype5)"


@pytest.mark.slow
@pytest.mark.parametrize("version", (OLDEST, "3.6.0", NEWEST))
def test_versions(tmp_path, version):
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "triton")]
    done = subprocess.run([*pip, f"triton=={version}"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"triton {version} could not be installed: {done.stderr.strip().splitlines()[-1]}")
    parts = ["language", "tutorials"]
    if version != OLDEST:  # before 3.6, PyTorch computes products of float32
        parts += ["whole_model", "linear_cross_entropy", "mlp", "sample", "adamw"]
    files = [f"tests/ptx/test_{kind}_{part}.py" for part in parts for kind in ("triton", "gpu")]
    files = [file for file in files if (ROOT / file).is_file()]
    # Registers differ between versions: 3.6 spills 8 bytes in a kernel in which the newest version spills none.
    left_out = ["-k", TOO_NEW if version == OLDEST else "not test_bytes and not cuda"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "triton"), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *left_out]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-4000:]


def run_with(code: str, tmp_path: Path, **files: str) -> str:
    """What Python code prints if it finds a package ``triton`` with these files before the installed one."""
    for name, text in {"__init__": "", **files}.items():
        path = tmp_path / "triton" / f"{name.replace('__in__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_machine_with_a_broken_triton(tmp_path):
    code = "from gpt2fast.testing import ptx\nwith ptx.machine() as m: print(m.launches)"
    broken = "raise ImportError('libtriton.so is of another Python')"
    assert run_with(code, tmp_path, __init__=broken) == "[]\n"


def test_a_machine_with_a_triton_that_does_not_fit(tmp_path):
    holder = "class driver:\n    active = None\n    set_active = classmethod(lambda c, d: setattr(c, 'active', d))\n"
    code = (
        "from gpt2fast.testing import ptx\nfrom triton.runtime import driver\n"
        "with ptx.machine():\n"
        "    try: driver.active.get_current_device()\n"
        "    except RuntimeError as error: print(error)\n"
        "print(driver.active)"
    )
    printed = run_with(code, tmp_path, __init__="__version__ = '2.0.0'", runtime__in____init__=holder)
    assert re.search(r"the installed Triton \(2.0.0\) does not fit the machine, .* 3.2 on: ModuleNotFound", printed)
    assert printed.endswith("None\n")


def test_registers_and_spills_of_a_compiled_kernel():
    import tutorials

    x = torch.randn(300)
    with ptx.machine() as m:
        kernel = tutorials.add_kernel[(3,)](x, x, torch.empty(300), 300, BLOCK=128)
    assert kernel.n_spills == 0 and kernel.n_regs == m.launches[0].resources().registers > 0
