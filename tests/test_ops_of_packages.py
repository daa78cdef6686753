"""``gpt2fast check`` and ``bench`` for ops in users' packages, named by ``--import`` or found by entry point."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2fast.testing import check, run_check

ROOT = Path(__file__).parent.parent
OPS_OF_A_PACKAGE = '''
from torch import Tensor
from gpt2fast import op

@op(shapes=dict(x="... C"), cases=[dict(B=2, T=3, C=5)], namespace="NAME")
def triple(x: Tensor) -> Tensor:
    """y = 3 x."""
    return x * 3

@triple.backward()
def _(saved, grad):
    return dict(x=grad.y * 3)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three modules with ops. Two are in installed packages with an entry point; one of the two cannot be imported."""
    folder = tmp_path_factory.mktemp("packages")
    for name in ("found_ops", "named_ops"):
        (folder / f"{name}.py").write_text(OPS_OF_A_PACKAGE.replace("NAME", name))
    (folder / "broken_ops.py").write_text("import no_such_module_of_anybody\n")
    for name in ("found_ops", "broken_ops"):
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[gpt2fast.ops]\nall = {name}\n")
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, "-m", "gpt2fast", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_check_finds_entry_points_and_modules_named(folder):
    done = run(folder, "check", "found_ops::triple", "named_ops::triple", "--import", "named_ops", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert list(found) == ["found_ops::triple", "named_ops::triple"]
    for rows in found.values():
        assert {"opcheck", "gradients", "bad_input"} <= {row["promise"] for row in rows if "check" in row}
        assert not any(row["error"] for row in rows) and any(row.get("target") == "reference" for row in rows)
    said = "the ops of broken-ops: gpt2fast.ops all = broken_ops are left out: ModuleNotFoundError: No module named"
    assert said in done.stderr


def test_names_that_nobody_declares(folder):
    done = run(folder, "check", "named_ops::triple")
    assert done.returncode == 1
    assert re.search(r"must be one of adamw_, .*found_ops::triple, got 'named_ops::triple'", done.stderr)
    assert "broken-ops: gpt2fast.ops all = broken_ops did not import" in done.stderr
    done = run(folder, "bench", "named_ops::triple", "--import", "nobodys_ops")
    assert done.returncode == 1
    said = "gpt2fast: --import nobodys_ops: ModuleNotFoundError: No module named 'nobodys_ops'"
    assert done.stderr.strip().endswith(said)


@pytest.mark.parametrize("arguments", (("found_ops::triple",), ("named_ops::triple", "--import", "named_ops")))
def test_bench_knows_ops_of_packages(folder, arguments):
    done = run(folder, "bench", *arguments)
    assert done.returncode == 1 and "op must be one of" not in done.stderr
    assert "triple" in done.stderr + done.stdout, done.stderr


def test_a_package_that_does_not_import_fails_the_check_of_all_ops(half, monkeypatch, capsys):
    monkeypatch.setattr(check, "find_ops", lambda names: [half])
    assert run_check([], as_json=True) == 0
    capsys.readouterr()
    label = "broken-ops: gpt2fast.ops all = broken_ops"
    monkeypatch.setattr(check, "import_entry_points", lambda: {label: "ModuleNotFoundError: x"})
    assert run_check(["gpt2fast_test::half"]) == 0
    assert run_check([], as_json=True) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found[label] == [dict(error="ModuleNotFoundError: x")] and "gpt2fast_test::half" in found
