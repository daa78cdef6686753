"""The Makefile's switches, with fakes for pip and the environment's Python, so that nothing is fetched or compiled."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TORCH = re.search(r"^torch==[^ ;\n]+", (ROOT / "constraints.txt").read_text(), re.M)[0]


@pytest.fixture
def make(tmp_path):
    """make(target, ...) runs in the repository, with an environment of its own, and returns the finished process."""

    def run(*args: str, **environment: str) -> subprocess.CompletedProcess:
        mine = "MAKEFLAGS MFLAGS MAKELEVEL MAKEOVERRIDES PYTHON PROMPT MODEL N CUDA TESTS JOBS CPU_INDEX".split()
        clean = {k: v for k, v in os.environ.items() if k not in mine}  # a `make test` that runs this may have set some
        command = ["make", "--no-print-directory", f"VENV={tmp_path / 'venv'}", *args]
        return subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True)

    return run


def script(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("given, expected", [
    ([], ["def main(", "-n", "200", "--repetition-penalty", "1.1"]),
    (["PROMPT=a \"b\" 'c' $$x", "MODEL=some/model", "N=7"],
     ["a \"b\" 'c' $x", "--model", "some/model", "-n", "7", "--repetition-penalty", "1.1"]),
])  # fmt: skip
def test_demo_hands_its_variables_on(make, tmp_path, given, expected):
    venv = tmp_path / "venv"
    script(venv / "bin/python", 'printf "%s\\n" "$@"')
    done = make("demo", *given, "-o", str(venv / ".built"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["-m", "gpt2fast", "generate", *expected]


@pytest.mark.parametrize("target, runs", [
    ("test", "-m pytest -n 3 --dist worksteal tests"), ("bench", "-m benchmarks"),
    ("test-all", '-m pytest -n 3 --dist worksteal tests -m ""'),
])  # fmt: skip
def test_targets_run_in_the_environment(make, tmp_path, target, runs):
    done = make("-n", target, "JOBS=3")
    assert done.stdout.splitlines()[-1] == f"{tmp_path}/venv/bin/python {runs}", done.stderr


@pytest.mark.parametrize("target, builds", [("demo", False), ("wheel", False), ("test", True), ("bench", True)])
def test_the_ptx_machine_is_built_where_it_is_needed(make, target, builds):
    done = make("-n", target)
    assert done.returncode == 0 and "pip" in done.stdout, done.stderr
    with_machine = [line for line in done.stdout.splitlines() if "GPT2FAST_PTX" in line]
    assert len(with_machine) == builds
    assert all(re.fullmatch(r"GPT2FAST_PTX=1 \S+ setup.py .*build_ext --inplace", line) for line in with_machine)


@pytest.mark.parametrize("cuda, answers, expected", [
    ("", True, rf"install --no-deps --force-reinstall --retries 1 --index-url https://.*/whl/cpu {TORCH}"),
    ("", False, rf"install {TORCH}"),
    ("1", True, rf"install {TORCH}"),
])  # fmt: skip
@pytest.mark.skipif(sys.platform != "linux", reason="PyPI's torch is a CPU build elsewhere")
def test_which_torch_is_installed(make, tmp_path, cuda, answers, expected):
    """torch comes from the CPU index if it answers, else from pip's usual places. With CUDA=1 it comes from those."""
    venv = tmp_path / "venv"
    venv.mkdir()
    pip = script(tmp_path / "pip", f'case "$*" in *--dry-run*) exit {int(not answers)};; esac; echo pip "$@"')
    stamp = venv / (".torch-cuda" if cuda else ".torch-cpu")
    (venv / ".torch-cpu").touch() if cuda else (venv / ".torch-cuda").touch()
    done = make(str(stamp), f"CUDA={cuda}", f"PIP={pip}", "-o", str(venv / ".made"))
    installs = [line for line in done.stdout.splitlines() if line.startswith("pip install")]
    assert len(installs) == 2 and re.fullmatch(f"pip {expected}", installs[0]), done.stdout + done.stderr
    assert installs[1].startswith(f"pip install -c {venv}/constraints.txt torch ")
    assert ("does not answer" in done.stdout) == (not answers)
    assert [path.name for path in venv.glob(".torch-*")] == [stamp.name]


def test_a_python_that_has_torch_lends_it_and_another_is_refused(make, tmp_path):
    venv, other = tmp_path / "venv", tmp_path / "other"
    made = str(venv / ".made")
    done = make(made, f"PYTHON={sys.executable}")
    assert done.returncode == 0 and f"Using the torch of {sys.executable}" in done.stdout, done.stderr
    code = "import torch, sys; print(torch.__file__, sys.prefix)"
    found = subprocess.run([venv / "bin/python", "-c", code], capture_output=True, text=True, check=True).stdout.split()
    import torch

    assert found == [torch.__file__, str(venv)]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", other], check=True)
    for same in ([], [f"PYTHON={sys.executable}"], [f"PYTHON={venv / 'bin/python'}"]):
        assert make(made, *same).returncode == 0
    for done in (make(made, f"PYTHON={other / 'bin/python'}"), make(made, PYTHON=f"{other / 'bin/python'}")):
        assert done.returncode == 2
        assert f"{venv} was made with the Python of {sys.prefix} " in done.stderr
        assert f"that of {other} " in done.stderr and "run make clean first" in done.stderr
    pip = script(tmp_path / "pip", 'echo pip "$@"')
    done = make(str(venv / ".torch-cuda"), "CUDA=1", f"PIP={pip}")
    assert "CUDA=1 changes nothing: torch is that of PYTHON" in done.stdout and TORCH not in done.stdout


@pytest.mark.parametrize("given, missing", [
    ("PYTHON=no-such-python", "missing: no-such-python."),
    ("CXX=no-such-compiler", r"missing: a C\+\+20 compiler \(no-such-compiler\)."),
])  # fmt: skip
def test_what_is_missing_is_named_before_anything_is_made(make, tmp_path, given, missing):
    done = make(str(tmp_path / "venv/.made"), given)
    assert done.returncode == 2 and re.search(f"make: {missing} Install it with: .+", done.stderr)
    assert not (tmp_path / "venv").exists()
