"""What an incomplete installation says: without torch at build time, without kernels that load, without a build."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from gpt2fast import extension

ROOT = Path(__file__).parent.parent
CODE = "import torch, gpt2fast.ops as ops; print(ops.gelu(torch.zeros(1)).item()); import gpt2fast.backends"


def run(folder: Path, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd or folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture
def without_extension(tmp_path) -> Path:
    """A folder with the package as in a source tree that was not built."""
    ignored = shutil.ignore_patterns("*.so", "*.built_with", "__pycache__", "kernels", "benchmarks")
    shutil.copytree(ROOT / "gpt2fast", tmp_path / "gpt2fast", ignore=ignored)
    return tmp_path


def test_building_without_torch_ends_in_a_sentence(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    done = run(tmp_path, "setup.py", "--version", cwd=ROOT)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "gpt2fast is built against the torch that it will run with: "
        "install torch first, then: pip install --no-build-isolation .\n"
    )


def test_a_source_tree_that_was_not_built_works_and_is_silent(without_extension):
    done = run(without_extension, "-W", "error", "-c", CODE)
    assert (done.stdout, done.stderr) == ("0.0\n", "")


def test_kernels_that_do_not_load_are_said_once_with_the_fix(without_extension):
    package = without_extension / "gpt2fast"
    (package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"built for another machine")
    (package / "_C.built_with").write_text("2.12.0")
    done = run(without_extension, "-c", CODE)
    assert done.stdout == "0.0\n"
    assert done.stderr.count("RuntimeWarning: gpt2fast: the C++ kernels do not load") == 1
    assert f"built with torch 2.12.0, this is torch {torch.__version__} on Python" in done.stderr
    assert "pip install --no-build-isolation ." in done.stderr


@pytest.mark.skipif(extension._C is None, reason="gpt2fast._C is not built")
def test_a_build_says_which_torch_it_was_made_with():
    assert extension.built_with() == torch.__version__
