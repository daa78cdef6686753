"""Finds and runs nvcc, ptxas and cuobjdump, and compiles CUDA C++ to PTX. Results are cached on disk by content."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ... import disk_cache

WHAT = "gpt2fast.testing.ptx"  # every error message begins with it


@functools.cache
def tool(name: str) -> str:
    """The path of ``nvcc``, ``ptxas`` or ``cuobjdump``.

    It is looked for in ``CUDA_HOME``, PATH, the triton package and /usr/local/cuda, in this order.
    """
    folders = [Path(os.environ[v]) / "bin" for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    found = next((str(folder / name) for folder in folders if (folder / name).is_file()), None) or shutil.which(name)
    if found:
        return found
    spec = importlib.util.find_spec("triton")
    places = [Path(p) / "backends/nvidia/bin" for p in (spec.submodule_search_locations or [])] if spec else []
    for folder in [*places, Path("/usr/local/cuda/bin")]:
        if (folder / name).is_file():
            return str(folder / name)
    fix = "install NVIDIA's CUDA toolkit" + ("" if name == "nvcc" else " or `pip install triton`")
    raise FileNotFoundError(f"{WHAT}: {name} is not on PATH nor in CUDA_HOME; {fix}")


@functools.cache
def version(name: str) -> str:
    return subprocess.run([tool(name), "--version"], capture_output=True, text=True, check=True).stdout


def run(command: Sequence[str], what: str) -> str:
    """The output of a tool. Raises RuntimeError with its message where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{WHAT}: {what} failed:\n{(done.stderr or done.stdout).strip()}")
    return done.stdout + done.stderr


def nvcc(source: str | os.PathLike, name: str, arguments: Sequence[str]) -> Path:
    """The file that nvcc makes from ``source``, which is a path or the text itself (anything with a line break)."""
    is_text = isinstance(source, str) and "\n" in source
    if not is_text and not Path(source).is_file():
        raise FileNotFoundError(f"{WHAT}: there is no file {os.fspath(source)}")
    text = source if is_text else Path(source).read_text(encoding="utf-8")
    where = "" if is_text else str(Path(source).resolve())
    suffix = ".cu" if is_text else Path(source).suffix

    def compile(folder: Path) -> tuple[Path, list[str]]:
        file = folder / f"source{suffix}" if is_text else Path(where)
        if is_text:
            file.write_text(text)
        made, read = folder / name, folder / "read.d"
        command = [tool("nvcc"), *arguments, "-MMD", "-MF", str(read), "-o", str(made), str(file)]
        run(command, f"nvcc {'on the given source' if is_text else where}")
        depends = read.read_text().split(":", 1)[1] if read.is_file() else ""
        paths = [p.replace("\\ ", " ") for p in re.findall(r"(?:\\ |[^\s\\])+", depends)]
        return made, [p for p in paths if Path(p).resolve() != file.resolve()]

    return disk_cache.compiled("ptx", [text, where, *arguments, version("nvcc")], name, compile)


def link(objects: Sequence[Path], name: str, arguments: Sequence[str]) -> Path:
    """The shared library that nvcc links from ``objects``."""

    def compile(folder: Path) -> tuple[Path, list[str]]:
        made = folder / name
        run([tool("nvcc"), "-shared", *arguments, "-o", str(made), *map(str, objects)], "linking")
        return made, []

    contents = [path.read_bytes() for path in objects]
    return disk_cache.compiled("ptx", [*contents, *arguments, version("nvcc")], name, compile)


def check_arch(arch: str) -> str:
    if not re.fullmatch(r"sm_\d+[af]?", arch):
        raise ValueError(f"{WHAT}: arch must be like 'sm_80', got {arch!r}")
    return arch.removeprefix("sm_")


def compile_cuda(source: str | os.PathLike, arch: str = "sm_80", flags: Sequence[str] = ()) -> str:
    """The PTX of a CUDA C++ file, or of its text, with line information. It is cached on disk.

    ``flags`` are options of nvcc, such as ``("-I", folder)`` or ``("-use_fast_math",)``. Raises FileNotFoundError
    without nvcc, and RuntimeError with its messages where the source does not compile.
    """
    arguments = ["-ptx", f"-arch=compute_{check_arch(arch)}", "-lineinfo", "-std=c++17", *flags]
    return nvcc(source, "kernel.ptx", arguments).read_text()
