"""``gpt2fast new-op``: its package installs unchanged, keeps every promise, and has what was asked for."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest

from gpt2fast import cli, new_op
from gpt2fast.testing.targets import targets

TARGETS = [target for target in targets() if target.startswith(("cpu:", "triton:ptx", "cuda:ptx"))]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The package my_scale with all kernels, installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("new_op")
    assert cli.main(["new-op", "my_scale", "--out", str(folder)]) == 0
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps"]
    done = subprocess.run([*command, "--target", "site", "./my_scale"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def run(folder, *command):
    environment = os.environ | {"PYTHONPATH": str(folder / "site")}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


def test_it_keeps_every_promise(package):
    pytest_of_it = ("-c", "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))", "-v", "-p", "no:cacheprovider")
    done = run(package, *pytest_of_it, "my_scale/tests")
    assert done.returncode == 0, done.stdout[-4000:]
    names = re.findall(r"::test_op\[my_scale-(\S+)\] PASSED", done.stdout)
    for promise in ("opcheck", "compile", "autocast", "gradients"):
        assert any(promise in name for name in names), promise
    for target in TARGETS:
        assert any(name.startswith("parity") and f"-{target}-" in name for name in names), target
    assert "skipped" not in done.stdout and "failed" not in done.stdout


def test_the_command_line_finds_it_by_itself_and_calls_of_it_run_on_its_kernel(package):
    done = run(package, "-m", "gpt2fast", "info", "--json")
    assert json.loads(done.stdout)["ops"]["cpu"]["my_scale::my_scale"].startswith("cpu, "), done.stderr
    code = """if True:
        import torch, my_scale
        x, scale = torch.arange(6.0).view(2, 3), torch.tensor([1.0, 2.0, 3.0])
        print(my_scale.my_scale(x, scale, scale, x).tolist())
        my_scale.my_scale(x, scale[:2], scale, x)"""
    done = run(package, "-c", code)
    assert done.stdout == f"{[[1.0, 5.0, 11.0], [7.0, 14.0, 23.0]]}\n"
    assert "my_scale::my_scale: scale must have shape (C,) = (3,), got (2,)" in done.stderr


@pytest.mark.parametrize("backends", (["triton"], ["cuda"], ["cpu"], ["cpu", "cuda"], []), ids=",".join)
def test_only_what_was_asked_for(tmp_path, backends, capsys):
    assert cli.main(["new-op", "fused_scale", "--backends", ",".join(backends), "--out", str(tmp_path)]) == 0
    files = {str(p.relative_to(tmp_path / "fused_scale")) for p in (tmp_path / "fused_scale").rglob("*") if p.is_file()}
    wanted = {"README.md", "pyproject.toml", "fused_scale/__init__.py", "tests/test_fused_scale.py"}
    kernels = dict(
        cpu={"setup.py", *(f"fused_scale/csrc/{name}" for name in ("args.h", "binding.cpp", "fused_scale.h"))},
        triton={"fused_scale/triton_kernels.py"},
        cuda={"fused_scale/cuda_kernels.py", "fused_scale/fused_scale.cu"},
    )
    assert files == wanted.union(*(kernels[backend] for backend in backends))
    listed = capsys.readouterr().out
    for file in files:
        text = (tmp_path / "fused_scale" / file).read_text()
        assert file in listed and not re.search(r"scale_bias_add|ScaleBiasAdd|\[(cpu|gpu|triton|cuda)\]", text), file
        if file.endswith(".py"):
            ast.parse(text)
    code = (tmp_path / "fused_scale/fused_scale/__init__.py").read_text()
    readme = (tmp_path / "fused_scale/README.md").read_text()
    for backend, named in (("cpu", "csrc"), ("triton", "triton_kernels"), ("cuda", "cuda_kernels")):
        assert (named in readme) == (backend in backends)
        assert ((named if backend != "cpu" else "load_extension") in code) == (backend in backends)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["My-Op"], "NAME must be small letters, digits and _, a letter first, and no word of Python's, got 'My-Op'"),
        (["lambda"], "NAME must be small letters, digits and _, a letter first, and no word of Python's, got 'lambda'"),
        (["json"], "NAME must not be that of a module that is installed, got 'json'"),
        (["mine", "--backends", "cpu,rocm"], "backends must be of cpu, triton, cuda, got 'rocm'"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(tmp_path, capsys, arguments, said):
    assert cli.main(["new-op", *arguments, "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"gpt2fast new-op: {said}\n" and not list(tmp_path.iterdir())


def test_a_folder_that_is_there_stays_as_it_is(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="mine is there already; take another name, or --out FOLDER"):
        new_op.write("mine", ("cpu",), tmp_path)
    assert [p.name for p in tmp_path.rglob("*")] == ["mine"]
