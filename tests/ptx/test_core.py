"""How the core of the machine is found or compiled. A module of a few lines stands for it, but in one slow test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt2fast import build, build_library
from gpt2fast.testing import ptx, run_check, targets
from gpt2fast.testing.ptx import __main__ as command
from gpt2fast.testing.ptx import core

ROOT = Path(__file__).parent.parent.parent
HEADER = "constexpr int kAnswer = 42;\n"
SOURCE = """#include "answer.h"

#include <pybind11/pybind11.h>

PYBIND11_MODULE(_ptx, m) { m.attr("answer") = kAnswer; }
"""


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """The folder of sources of a gpt2fast that was built without the machine. Its cache is empty."""
    folder = tmp_path / "csrc" / "ptx"
    folder.mkdir(parents=True)
    (folder / "answer.h").write_text(HEADER)
    (folder / "bind.cpp").write_text(SOURCE)
    monkeypatch.setenv("GPT2FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "sources", lambda: tmp_path / "csrc")
    monkeypatch.setattr(core, "_built", lambda: None)
    before = sys.modules.pop(core.NAME, None)
    yield folder
    sys.modules.pop(core.NAME, None)
    if before is not None:
        sys.modules[core.NAME] = before


def refuse(*args, **options):
    raise AssertionError("the core is compiled")


# A process of its own, because Python does not load a second extension of one name beside the first.
USE = """if True:
    import sys
    from pathlib import Path

    from gpt2fast import build
    from gpt2fast.testing import ptx
    from gpt2fast.testing.ptx import core

    build.sources, core._built = lambda: Path(sys.argv[1]), lambda: None
    before = core.ready()
    with ptx.machine():
        print(before, core.load().answer, core.ready(), core.file())
"""


def test_it_is_compiled_once(sources, tmp_path):
    runs = [
        subprocess.run([sys.executable, "-c", USE, str(sources.parent)], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    cache = tmp_path / "cache" / "ptx_machine"
    first, second = (run.stdout.split() for run in runs)
    assert first[:3] == ["False", "42", "True"] and Path(first[3]).is_relative_to(cache)
    assert second == ["True", *first[1:]]
    words = runs[0].stderr
    assert words.count("compiling the PTX machine, 1 files of C++. This happens once") == 1
    assert f"It is kept in {cache}." in words and "compiling" not in runs[1].stderr


def other_header(sources, monkeypatch):
    (sources / "answer.h").write_text(HEADER.replace("42", "43"))


CHANGES = dict(
    header=other_header,
    source=lambda sources, monkeypatch: (sources / "more.cpp").write_text("int more;"),
    torch=lambda sources, monkeypatch: monkeypatch.setattr(torch, "__version__", "7.0"),
    python=lambda sources, monkeypatch: monkeypatch.setattr(core.sysconfig, "get_config_var", lambda name: "another"),
    compiler=lambda sources, monkeypatch: monkeypatch.setattr(build_library, "compiler_version", lambda what: "other"),
    flags=lambda sources, monkeypatch: monkeypatch.setattr(core, "PTX_FLAGS", ["-O1"]),
)


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_compiled_again_where_something_has_changed(sources, monkeypatch, change):
    def stand_in(what, name, files, folder, flags):
        (folder / "made").touch()
        return folder / "made"

    monkeypatch.setattr(build_library, "compile_library", stand_in)
    first = core.file()
    assert core.ready() and core.file() == first
    CHANGES[change](sources, monkeypatch)
    assert not core.ready() and core.file() != first


def test_what_does_not_compile_is_not_kept(sources, tmp_path):
    (sources / "bind.cpp").write_text("int answer() { return kNoSuchName; }\n")
    with pytest.raises(RuntimeError, match="gpt2fast.testing.ptx: _ptx does not compile:\n(?s:.*)kNoSuchName"):
        with ptx.machine():
            pass
    assert ptx.active() is None and not core.ready()
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_what_does_not_load_is_named(sources, monkeypatch, tmp_path):
    (tmp_path / "_ptx.so").write_bytes(b"built for another machine")
    monkeypatch.setattr(core, "_built", lambda: tmp_path / "_ptx.so")
    with pytest.raises(RuntimeError) as found:
        core.load()
    assert str(found.value).startswith(f"gpt2fast.testing.ptx: {tmp_path / '_ptx.so'} does not load (")
    assert "remove it, and python -m gpt2fast.testing.ptx compiles it again" in str(found.value)
    assert core.NAME not in sys.modules


@pytest.mark.parametrize("missing, words", [
    ("compiler", "needs a C++ compiler, and there is no 'no-such-compiler' on PATH: install one (sudo apt-get install"),
    ("ninja", "needs ninja, which is not on PATH: pip install ninja (it comes with gpt2fast[ptx])"),
    ("setuptools", "needs setuptools (import of setuptools halted; None in sys.modules): pip install setuptools"),
    ("sources", "the sources of the PTX machine are missing: there are none in "),
])  # fmt: skip
def test_what_is_missing_is_named(sources, monkeypatch, capfd, missing, words):
    if missing == "compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif missing == "ninja":
        monkeypatch.setenv("PATH", os.environ["PATH"])  # put back at the end
        monkeypatch.setattr("torch.utils.cpp_extension.is_ninja_available", lambda: False)
    elif missing == "setuptools":
        import torch.utils

        monkeypatch.delattr(torch.utils, "cpp_extension", raising=False)
        monkeypatch.delitem(sys.modules, "torch.utils.cpp_extension", raising=False)
        for name in [name for name in sys.modules if name.partition(".")[0] == "setuptools"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "setuptools", None)
    else:
        for file in sources.iterdir():
            file.unlink()
    assert not core.ready()
    with pytest.raises(FileNotFoundError) as found:
        with ptx.machine():
            pass
    assert words in str(found.value) and str(found.value).startswith("gpt2fast.testing.ptx")
    assert command.main([]) == 1
    assert capfd.readouterr().err == f"{found.value}\n"  # and not that it compiles


def test_targets_and_check_compile_nothing(sources, monkeypatch, half, capsys):
    monkeypatch.setattr(build_library, "compile_library", refuse)
    assert not [target for target in targets() if target.endswith(":ptx")]
    assert run_check(["gpt2fast_test::half"]) == 0
    found = capsys.readouterr()
    assert found.err == (
        "gpt2fast check: no GPU kernel ran on the PTX machine, which is not compiled: "
        "pip install 'gpt2fast[ptx]', then python -m gpt2fast.testing.ptx\n"
    )
    assert ":ptx" not in found.out
    monkeypatch.setattr(core, "_built", lambda: sources / "bind.cpp")  # ready
    assert run_check(["gpt2fast_test::half"]) == 0 and capsys.readouterr().err == ""


def test_the_command(sources, monkeypatch, capfd):
    assert command.main(["--check"]) == 1
    found = capfd.readouterr()
    assert found.out == "" and "is not compiled: pip install 'gpt2fast[ptx]', then python -m gpt2fast" in found.err
    assert command.main([]) == 0
    path = capfd.readouterr().out.strip()
    assert Path(path).is_file() and path == str(core.find())
    monkeypatch.setattr(build_library, "compile_library", refuse)
    for arguments in ([], ["--check"]):
        assert command.main(arguments) == 0 and capfd.readouterr().out == f"{path}\n"


STORE = """
import torch
from gpt2fast.testing import ptx

TEXT = '''
.version 8.0
.target sm_80
.address_size 64
.visible .entry store(.param .u64 store_param_0) {
  .reg .b64 %rd<2>;
  .reg .b32 %r<2>;
  ld.param.u64 %rd1, [store_param_0];
  mov.u32 %r1, 7;
  st.global.u32 [%rd1], %r1;
  ret;
}
'''
y = torch.zeros(1, dtype=torch.int32)
with ptx.machine() as m:
    m.launch(TEXT, "store", (1,), (1,), y)
print(y.item())
"""


@pytest.mark.slow  # it compiles the machine, more than a minute on one core
def test_the_machine_of_a_wheel(tmp_path):
    """The files of a wheel that was made without GPT2FAST_PTX: its machine compiles, is kept, and runs a kernel."""
    build_py = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "site")]
    subprocess.run(build_py, cwd=ROOT, check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "GPT2FAST_CACHE": str(tmp_path / "cache")}

    def python(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    check = ("-m", "gpt2fast.testing.ptx", "--check")
    assert python(*check).returncode == 1
    first, second = python("-c", STORE), python("-c", STORE)
    assert first.stdout == "7\n" and "compiling the PTX machine, " in first.stderr, first.stderr
    assert second.stdout == "7\n" and second.stderr == ""
    assert Path(python(*check).stdout.strip()).is_relative_to(tmp_path / "cache")
