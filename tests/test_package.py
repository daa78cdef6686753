"""What ``import gpt2fast`` offers: names that load on demand, and the same names for type checkers."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import gpt2fast
from gpt2fast import compiler_flags

ROOT = Path(__file__).parent.parent


def declared() -> dict[str, str | None]:
    """The imports under TYPE_CHECKING, from name to module (None if the name is a module)."""
    tree = ast.parse(Path(gpt2fast.__file__).read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    return {alias.asname or alias.name: node.module for node in block.body for alias in node.names}


def test_type_checkers_see_every_name_that_loads_on_demand():
    assert set(declared()) == set(gpt2fast.__all__) - {"__version__"} == set(dir(gpt2fast)) - {"__version__"}


@pytest.mark.parametrize("name, module", declared().items())
def test_a_name_is_what_type_checkers_were_told(name, module):
    found = getattr(gpt2fast, name)
    if module is None:
        assert isinstance(found, ModuleType) and found is importlib.import_module(f"gpt2fast.{name}")
    else:
        assert found is getattr(importlib.import_module(f"gpt2fast.{module}"), name)


@pytest.mark.parametrize("first", ("gpt2fast.ops", "gpt2fast.model", "gpt2fast.op", "gpt2fast.generate"))
def test_a_function_is_not_hidden_by_the_module_of_its_name(first):
    code = f"import {first}; from gpt2fast import generate, op; print(type(generate), type(op))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.split("\n")[0] == f"{FunctionType} {FunctionType}"


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'gpt2fast' has no attribute 'gpt3'"):
        gpt2fast.gpt3  # noqa: B018


EXTENSIONS = """if True:
    import json
    from setuptools import distutils
    made = distutils.core.run_setup("setup.py", stop_after="init").ext_modules
    print(json.dumps({one.name: one.extra_compile_args for one in made}))
"""


BUILD = """if True:
    import sys
    import torch.utils.cpp_extension
    from setuptools import distutils
    torch.utils.cpp_extension.BuildExtension.run = lambda self: None  # compiles nothing
    command = distutils.core.run_setup("setup.py", stop_after="init").get_command_obj("build_ext")
    command.build_lib, command.inplace = sys.argv[1], False
    command.ensure_finalized()
    command.run()
"""


@pytest.mark.parametrize("wanted", ("0", "1"))
def test_the_ptx_machine_of_an_earlier_build_is_not_installed(tmp_path, wanted):
    folder = tmp_path / "gpt2fast"
    folder.mkdir()
    (folder / "_ptx.cpython-311.so").touch()
    environment = os.environ | {"GPT2FAST_PTX": wanted, "GPT2FAST_CPU": "1", "GPT2FAST_CUDA": "0"}
    subprocess.run([sys.executable, "-c", BUILD, tmp_path], cwd=ROOT, env=environment, check=True)
    assert [path.name for path in folder.glob("_ptx*")] == ["_ptx.cpython-311.so"] * (wanted == "1")


@pytest.mark.parametrize("wanted", (None, "0", "", "1"))
def test_the_ptx_machine_is_built_on_request_only(wanted):
    """It is compiled with the same flags where it is built and where it is compiled at its first use."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GPT2FAST_")}
    environment |= {} if wanted is None else {"GPT2FAST_PTX": wanted}
    command = [sys.executable, "-c", EXTENSIONS]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    flags = json.loads(done.stdout.splitlines()[-1])
    assert set(flags) == {"gpt2fast._C"} | ({"gpt2fast._ptx"} if wanted == "1" else set())
    assert wanted != "1" or flags["gpt2fast._ptx"] == compiler_flags.PTX_FLAGS
