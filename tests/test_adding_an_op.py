"""Follows docs/writing_an_op.md word for word, in a copy of the sources."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2fast.testing.targets import targets

ROOT = Path(__file__).parent.parent
COPIED = (
    "gpt2fast",
    "kernels",
    "benchmarks",
    "tests",
    "csrc",
    "README.md",
    "docs",
    "pyproject.toml",
    "setup.py",
    "constraints.txt",
)


def listing(name: str) -> str:
    """The listing of this file in the page."""
    page = (ROOT / "docs/writing_an_op.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"```python file={re.escape(name)}\n(.*?)```", page, re.S)
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    for part in ("kernels", "benchmarks"):  # where the installed package has them
        (folder / "gpt2fast" / part).symlink_to(folder / part)
    for name in ("gpt2fast/ops/silu.py", "kernels/silu.py"):
        (folder / name).write_text(listing(name))
    lines = folder / "kernels/__init__.py"
    lines.write_text(lines.read_text().replace("MODULES = dict(", 'MODULES = dict(\n    silu="silu",'))
    return folder


def run(copy: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run([sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_it_works_at_once(copy):
    code = "import torch, gpt2fast; x = torch.ones(3); print(gpt2fast.__file__, gpt2fast.ops.silu(x).tolist()[0])"
    where, value = run(copy, "-c", code).split()
    assert Path(where).is_relative_to(copy) and abs(float(value) - 0.7310586) < 1e-6


def test_the_suite_tests_it(copy):
    """No test was written for the new op, yet these run: parity by dtype, layout and target, gradients, opcheck,
    compile, wrong inputs."""
    printed = run(copy, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests", "-k", "silu")
    passed = int(re.search(r"(\d+) passed", printed)[1])
    assert passed > 40 and "failed" not in printed, printed
    names = run(copy, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests", "-k", "silu")
    assert "-fused-" in names
    assert ("triton:ptx" in names) == ("triton:ptx" in targets())


def test_the_command_line_checks_it(copy):
    found = json.loads(run(copy, "-m", "gpt2fast", "check", "silu", "--json"))
    runs = found["silu"]
    assert {run["dtype"] for run in runs if "dtype" in run} == {"float32", "bfloat16", "float16"} and len(runs) > 12
    assert not any(run["error"] for run in runs)


def test_the_table_of_ops_says_its_fix(copy):
    test = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_layout.py", "-k", "test_readme_op_table")
    done = subprocess.run([sys.executable, *test], cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)},
                          capture_output=True, text=True)  # fmt: skip
    fix = "python -m gpt2fast.testing.readme README.md"
    assert done.returncode == 1 and f"the table of ops is stale: {fix}" in done.stdout
    run(copy, *fix.split()[1:])
    run(copy, *test)
    assert "| `silu` | y = x sigmoid(x) | fused |" in (copy / "README.md").read_text(encoding="utf-8")
