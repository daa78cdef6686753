"""gpt2fast.build: an op in another package, with a CPU kernel in C++ that is built on the fly or by a setup.py."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpt2fast
from gpt2fast import backends, build, build_kernels, build_library, compiler_flags, disk_cache, new_op
from gpt2fast.testing import PROMISES, check_op, checks_of, cpu_isa, runnable_isas

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tests" / "scale_package"
KERNEL = new_op.TEMPLATE / "scale_bias_add" / "csrc"  # its kernel's folder

pytestmark = pytest.mark.skipif(backends._C is None, reason="gpt2fast._C is not built")


def run(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, **options)


def arguments(dtype=torch.float32, C: int = 40) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 5, C), (C,), (C,), (3, 5, C))]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder into which pip installed the package. If several processes run tests, one of them calls pip."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "scale_package"
    folder.mkdir(exist_ok=True)
    with disk_cache.locked(folder):
        if not (folder / "site").is_dir():
            ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
            shutil.copytree(PACKAGE, folder / "sources", ignore=ignored, dirs_exist_ok=True)
            install = "-m pip --disable-pip-version-check install -q --no-build-isolation --no-deps --no-index --target"
            cache = os.environ | {"GPT2FAST_CACHE": str(folder / "cache")}
            done = run(*install.split(), str(folder / "unfinished"), str(folder / "sources"), env=cache)
            assert done.returncode == 0, done.stdout + done.stderr
            (folder / "unfinished").rename(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def library() -> Path:
    return build.load(
        "scale_package_C",
        [PACKAGE / "csrc" / "others.cpp", KERNEL / "binding.cpp"],
        kernels=[KERNEL / "scale_bias_add.h"],
        include_dirs=[KERNEL],
    )


@pytest.fixture(scope="module")
def package(library):
    """The module of the package's ops."""
    before = set(gpt2fast.OPS)
    spec = importlib.util.spec_from_file_location("scale_package_ops", PACKAGE / "scale_package" / "ops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in set(gpt2fast.OPS) - before:
        del gpt2fast.OPS[name]


@pytest.fixture(scope="module")
def scale_bias_add(package):
    return package.scale_bias_add


def test_parity(scale_bias_add):
    rows = check_op(scale_bias_add)
    assert {row["target"] for row in rows} == {f"cpu:{isa}" for isa in runnable_isas()}
    assert not [row for row in rows if row["error"]]


@pytest.mark.parametrize("name", ["scale_bias_add", "scale_", "next_two"])
def test_every_promise_of_an_op(package, name):
    for check in checks_of(getattr(package, name), *(promise for promise in PROMISES if promise != "parity")):
        check()


def test_the_kernel_of_the_instruction_set_runs(scale_bias_add):
    """A product and a sum are rounded once where there is a fused multiply-add, and twice in scalar code."""
    x, scale = torch.tensor([[1 + 2**-12]]), torch.tensor([1 + 2**-12])
    bias, residual = torch.tensor([-1.0 - 2**-11]), torch.zeros(1, 1)
    found = {}
    for isa in runnable_isas():
        with cpu_isa(isa):
            found[isa] = scale_bias_add(x, scale, bias, residual).item()
            choice = backends.choose(scale_bias_add, x, scale, bias, residual)
            assert backends.describe(choice) == f"cpu, {isa}"
    assert found == {isa: 0.0 if isa == "scalar" else 2**-24 for isa in runnable_isas()}


def test_the_declaration_is_obeyed(scale_bias_add):
    x, scale, bias, residual = arguments()
    with pytest.raises(ValueError, match=r"scale_bias_add::scale_bias_add: bias .*40.*39"):
        scale_bias_add(x, scale, bias[:39], residual)
    with pytest.raises(TypeError, match="scale_bias_add::scale_bias_add: scale"):
        scale_bias_add(x, scale.long(), bias, residual)
    with pytest.raises(ValueError, match="scale_bias_add::scale_bias_add: residual"):
        scale_bias_add(x, scale, bias, residual[:2])


def test_what_it_does_not_cover(scale_bias_add):
    args = arguments(torch.float64)
    choice = backends.choose(scale_bias_add, *args)
    assert choice.backend == "reference"
    assert choice.why == "the kernels cover float32, bfloat16 and float16 only"
    torch.testing.assert_close(scale_bias_add(*args), scale_bias_add.reference(*args))
    with gpt2fast.use_backend("cpu"):
        scale_bias_add(*arguments())
        with pytest.raises(RuntimeError, match="backend 'cpu' does not cover this call: the kernels cover float32"):
            scale_bias_add(*args)


def test_an_op_in_place_and_one_of_integers(package):
    for dtype in (torch.float32, torch.float64):  # the binding covers the first and not the second
        x = torch.ones(2, 3, dtype=dtype)
        package.scale_(x, 3.0, 2), package.scale_(x, 0.5)
        assert x.unique().tolist() == [3.0]
    with pytest.raises(ValueError, match="scale_package::scale_: factor must be at least 0, got -1"):
        package.scale_(x.float(), -1.0)
    tokens = torch.arange(6).reshape(2, 3)
    assert backends.choose(package.next_two, tokens).backend == "cpu"
    assert [t.sum().item() for t in package.next_two(tokens)] == [21, 27]
    with pytest.raises(TypeError, match="scale_package::next_two: tokens must have dtype int64, got float32"):
        package.next_two(tokens.float())


def test_a_library_loaded_under_another_backend_stays_hidden(scale_bias_add, library, monkeypatch):
    calls = []
    of_the_dispatcher = torch.ops.scale_bias_add.scale_bias_add  # the op itself may take the path of direct.py
    with gpt2fast.use_backend("reference"):
        build.load_extension(library)
        monkeypatch.setattr(backends, "run", lambda declared, *rest: calls.append(declared) or rest[0][0])
        of_the_dispatcher(*arguments())
    assert calls == [scale_bias_add]
    of_the_dispatcher(*arguments())
    assert calls == [scale_bias_add]


def test_large_outputs_come_from_our_memory(scale_bias_add, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # torch fills its own memory
    backends._C.release_memory()
    x, scale, bias, residual = (t.contiguous() for t in arguments(C=1 << 17))
    y = scale_bias_add(x, scale, bias, residual)
    assert y.nbytes > 4 << 20
    del y
    assert backends._C.release_memory() >= x.nbytes


USE = """if True:
    import torch
    import scale_package
    from gpt2fast import backends
    args = [torch.ones(2, 3), torch.ones(3), torch.ones(3), torch.ones(2, 3)]
    op = scale_package.scale_bias_add
    print(backends.choose(op, *args).backend, op(*args).sum().item())
"""


def use(folder: Path, code: str = USE) -> subprocess.CompletedProcess:
    return run("-c", code, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)})


def test_installed_by_pip(site):
    done = use(site)
    assert done.stdout.split() == ["cpu", "18.0"], done.stderr


def test_another_torch(site, tmp_path):
    """The loader's error for a library that needs a symbol which this torch lacks, and what built the library."""
    shutil.copytree(site, tmp_path, dirs_exist_ok=True)
    package = tmp_path / "scale_package"
    (library,) = package.glob("_C.*.so")
    data = library.read_bytes()
    symbol = b"_ZNK5torch7Library8_resolveEPKc"
    assert symbol in data
    library.write_bytes(data.replace(symbol, symbol.replace(b"_resolve", b"_resalve")))
    (package / "_C.built_with").write_text("2.11.0")
    error = use(tmp_path).stderr
    words = error.strip().split("\n")[-1]
    assert words.startswith("ImportError: scale_package._C does not load: ") and "undefined symbol" in words
    assert f"It was built with torch 2.11.0, this is torch {torch.__version__}: build it again" in words
    library.unlink()
    assert "ImportError: scale_package._C is not built: in the sources of scale_package, pip" in use(tmp_path).stderr


def test_not_connected(site):
    code = """if True:
        import torch
        from gpt2fast import build
        build.connect = lambda library: None
        import scale_package
        scale_package.scale_bias_add(torch.ones(2, 3), torch.ones(3), torch.ones(3), torch.ones(2, 3))
    """
    error = use(site, code).stderr
    assert "scale_bias_add::scale_bias_add: the library of its kernel is not connected to gpt2fast" in error
    assert "gpt2fast.build.load_extension(" in error


def test_another_gpt2fast(library, monkeypatch):
    lent = (ctypes.c_int32 * 32).from_address(backends._C.joint())
    other = (ctypes.c_int32 * 32)(*lent)
    other[0] += 1

    class Other:
        joint = staticmethod(lambda: ctypes.addressof(other))

    monkeypatch.setattr(build, "_C", Other)
    monkeypatch.setattr(build, "__version__", "7.0")
    here = f"joint {lent[0]} of {lent[1]} bytes"
    with pytest.raises(RuntimeError) as found:
        build.connect(library)
    assert f"built against gpt2fast {gpt2fast.__version__} ({here}); there is joint {other[0]} of" in str(found.value)
    assert "in this gpt2fast, 7.0: build it again" in str(found.value)
    other[:2] = [lent[0], lent[1] + 8]
    with pytest.raises(RuntimeError, match=f"there is joint {lent[0]} of {lent[1] + 8} bytes"):
        build.connect(library)


def test_a_library_without_bindings():
    with pytest.raises(ValueError, match="has no gpt2fast_connect: a source of it must include torch/binding.h"):
        build.connect(backends._C)


def test_what_was_not_linked(monkeypatch, tmp_path):
    monkeypatch.setenv("GPT2FAST_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "unlinked.cpp"
    source.write_text("namespace gpt2fast::cpu { extern int scale_avx2; } int* use = &gpt2fast::cpu::scale_avx2;")
    with pytest.raises(ImportError, match="unlinked does not load: .*undefined symbol.*name its header in kernels="):
        build.load("unlinked", [source])
    source.write_text("extern int something; int* use = &something;")
    with pytest.raises(ImportError, match="undefined symbol: something. A source of it was not compiled"):
        build.load("unlinked", [source])


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(FileNotFoundError, match="needs a C.. compiler, and there is no 'no-such-compiler' on PATH"):
        build.load("none", [PACKAGE / "csrc" / "others.cpp"])


def test_the_ninja_of_an_environment_that_is_not_activated(monkeypatch, tmp_path):
    for name, folder in (("c++", "bin"), ("ninja", "scripts")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("#!/bin/sh\necho 1.13\n")
        (tmp_path / folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build_library.sysconfig, "get_path", lambda name: str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="me needs ninja, which is not on PATH: pip install ninja .or do"):
        build_library.need_tools("me", "or do")
    monkeypatch.setattr(build_library.sysconfig, "get_path", lambda name: str(tmp_path / name))
    build_library.need_tools("me", "or do")
    assert os.environ["PATH"].split(os.pathsep) == [str(tmp_path / "bin"), str(tmp_path / "scripts")]


def test_no_ninja(monkeypatch):
    monkeypatch.setenv("PATH", os.environ["PATH"])  # put back at the end
    monkeypatch.setattr("torch.utils.cpp_extension.is_ninja_available", lambda: False)
    with pytest.raises(FileNotFoundError, match="pip install ninja"):
        build.load("none", [PACKAGE / "csrc" / "others.cpp"])


def test_no_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_PACKAGE", tmp_path / "gpt2fast")
    where = f"gpt2fast {gpt2fast.__version__} in {tmp_path}"
    with pytest.raises(FileNotFoundError) as found:
        build.include_path()
    assert str(found.value).startswith(where) and "Install gpt2fast again" in str(found.value)
    for folder in (tmp_path / "csrc", tmp_path / "gpt2fast" / "csrc"):  # a checkout; then a wheel, which wins
        (folder / "torch").mkdir(parents=True)
        (folder / "torch" / "binding.h").touch()
        assert build.include_path() == folder


def test_a_gpt2fast_without_kernels(monkeypatch):
    monkeypatch.setattr(build, "_C", None)
    monkeypatch.setattr(build, "_extension_error", "it is not built")
    for call in (lambda: build.connect("library.so"), lambda: build.load("none", [])):
        with pytest.raises(RuntimeError, match="gpt2fast's own kernels in C.*are not there: it is not built"):
            call()


def test_files_and_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="sources must name files, got 'none.cpp'"):
        build.load("none", ["none.cpp"])
    with pytest.raises(FileNotFoundError, match="kernels must name files, got 'none.h'"):
        build.load("none", [PACKAGE / "csrc" / "others.cpp"], kernels=["none.h"])
    (tmp_path / "more").mkdir()
    twins = [tmp_path / "same.cpp", tmp_path / "more" / "same.cpp"]
    for twin in twins:
        twin.write_text("")
    with pytest.raises(ValueError, match="sources must have different names, got .*same.cpp, .*same.cpp"):
        build.load("none", twins)
    with pytest.raises(ValueError, match="name must be an identifier, got 'my-op'"):
        build.load("my-op", [])
    (tmp_path / "my-op.h").write_text("")
    with pytest.raises(ValueError, match="kernels must be called NAME.h with NAME an identifier, got my-op.h"):
        build_kernels.compile_kernels([tmp_path / "my-op.h"])


def test_what_does_not_compile(monkeypatch, tmp_path):
    monkeypatch.setenv("GPT2FAST_CACHE", str(tmp_path / "cache"))
    header = tmp_path / "wrong.h"
    header.write_text("int wrong_tasks(int x) { return y; }\n")
    with pytest.raises(RuntimeError) as found:
        build_kernels.compile_kernels([header])
    words = str(found.value)
    assert words.startswith(f"gpt2fast.build: {header} does not compile for ")
    assert "error: " in words and "return y;" in words and words.count("\n") <= 16
    source = tmp_path / "wrong.cpp"
    source.write_text('#include "no_such_header.h"\n')
    for _ in range(2):  # the second time, torch alone would take it as built
        with pytest.raises(RuntimeError, match="gpt2fast.build.load: wrong does not compile:(?s:.*)no_such_header.h"):
            build.load("wrong", [source])


def test_a_function_that_instruction_sets_would_share(monkeypatch, tmp_path):
    monkeypatch.setenv("GPT2FAST_CACHE", str(tmp_path / "cache"))
    header = tmp_path / "shared.h"
    header.write_text("""
        struct Args { float x; };
        __attribute__((noinline)) inline float twice(float x) { return x + x; }
        static int64_t shared_tasks(const Args& args) { return int64_t(twice(args.x)); }
        static void shared_run(const Args&, int64_t, int64_t) {}
    """)
    with pytest.raises(RuntimeError, match=r"must define its functions in an anonymous namespace.*got twice\(float\)"):
        build_kernels.compile_kernels([header])
    header.write_text(header.read_text().replace("inline float", "static float"))
    assert len(build_kernels.compile_kernels([header])) == len(compiler_flags.isas())


def test_objects_are_kept_by_content(monkeypatch, tmp_path):
    monkeypatch.setenv("GPT2FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build_kernels, "isas", lambda: {"scalar": []})
    folder = tmp_path / "with space"
    folder.mkdir()
    for name in ("args.h", "scale_bias_add.h"):
        shutil.copy(KERNEL / name, folder / name)
    [first] = build_kernels.compile_kernels([folder / "scale_bias_add.h"])
    made = first.stat().st_mtime_ns
    [again] = build_kernels.compile_kernels([folder / "scale_bias_add.h"])
    assert again == first and again.stat().st_mtime_ns == made
    (folder / "args.h").write_text((folder / "args.h").read_text() + "// changed\n")
    [changed] = build_kernels.compile_kernels([folder / "scale_bias_add.h"])
    assert changed != first


def test_flags_and_tables_name_the_same_instruction_sets():
    assert set(compiler_flags.isas()) == set(backends._C.compiled_isas())
    assert list(compiler_flags.isas("riscv64")) == ["scalar"]
    for machine, sets in compiler_flags.ISA_FLAGS.items():
        for isa in sets:
            included = (ROOT / "csrc" / "cpu" / f"isa_{isa}.cpp").read_text().split("\n")[0]
            assert f'"cpu/{included.split(chr(34))[1]}"' in build_kernels.SOURCE.format(
                vec=build_kernels.vec_of(isa), header="", name="", isa=isa
            ), machine


def test_a_wheel_has_the_headers_and_the_sources_of_the_machine(tmp_path):
    done = run("setup.py", "-q", "build_py", "--build-lib", str(tmp_path), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = {str(path.relative_to(tmp_path / "gpt2fast" / "csrc")) for path in tmp_path.glob("gpt2fast/csrc/**/*.*")}
    wanted = {str(p.relative_to(ROOT / "csrc")) for e in ("h", "cuh", "cu") for p in (ROOT / "csrc").rglob(f"*.{e}")}
    machine = {f"ptx/{path.name}" for path in (ROOT / "csrc" / "ptx").glob("*.cpp")}  # compiled at its first use
    assert found == wanted | machine | {"cuda/build.py"} and machine
