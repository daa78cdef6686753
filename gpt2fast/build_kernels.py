"""Compiles the C++ kernels of other packages: one object for each header and instruction set, kept in a cache."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import __version__, disk_cache
from .build import include_path
from .build_library import compiler, compiler_version, shortened
from .compiler_flags import BINDING_STANDARD, FLAGS, KERNEL_STANDARD, isas

SOURCE = """#include "cpu/vec_{vec}.h"

#include "cpu/vec_math.h"
#include "{header}"
#include "cpu/isa.h"

GPT2FAST_EXPORT_KERNEL({name}, {isa})
"""


def existing(path: str | Path, argument: str) -> Path:
    """The absolute path of a file. Raises FileNotFoundError where there is no such file."""
    found = Path(path).resolve()
    if not found.is_file():
        raise FileNotFoundError(f"gpt2fast.build: {argument} must name files, got {str(path)!r}, which is none")
    return found


def binding_flags(cflags: Sequence[str] = ()) -> list[str]:
    """The compiler's options for sources that include torch/binding.h."""
    return [BINDING_STANDARD, *FLAGS, "-fopenmp", f"-DGPT2FAST_EXTENSION={__version__}", *cflags]


def compile_kernels(
    headers: Sequence[str | Path], include_dirs: Sequence[str | Path] = (), cflags: Sequence[str] = ()
) -> list[Path]:
    """Compiles all headers for all instruction sets of this machine, several at a time. Returns the object files.

    Raises FileNotFoundError for a header that is missing, ValueError for a header whose name is not an identifier, and
    RuntimeError with the compiler's message or for functions outside an anonymous namespace.
    """
    files = [existing(header, "kernels") for header in headers]
    if wrong := [file for file in files if not file.stem.isidentifier()]:
        raise ValueError(f"gpt2fast.build: kernels must be called NAME.h with NAME an identifier, got {wrong[0].name}")
    command = [
        *compiler(),
        KERNEL_STANDARD,
        *FLAGS,
        f"-I{include_path()}",
        *(f"-I{Path(path).resolve()}" for path in include_dirs),
    ]
    work = [(file, isa, [*command, *flags, *cflags]) for file in files for isa, flags in isas().items()]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda one: _object(*one), work))


def vec_of(isa: str) -> str:
    """The NAME in cpu/vec_NAME.h, the header with the Vec of an instruction set. avx512_bf16 uses that of avx512."""
    return isa.removesuffix("_bf16")


def _object(header: Path, isa: str, command: list[str]) -> Path:
    name = header.stem
    text = SOURCE.format(vec=vec_of(isa), header=header, name=name, isa=isa)

    def compile(folder: Path) -> tuple[Path, list[str]]:
        source, made, read = (folder / f"{name}_{isa}{end}" for end in (".cpp", ".o", ".d"))
        source.write_text(text)
        done = subprocess.run(
            [*command, "-MMD", "-MF", str(read), "-c", str(source), "-o", str(made)], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"gpt2fast.build: {header} does not compile for {isa}:\n{shortened(done.stderr)}")
        if shared := _shared_functions(made):
            raise RuntimeError(
                f"gpt2fast.build: {header} must define its functions in an anonymous namespace, or one of those "
                f"compiled for {', '.join(isas())} runs for all; got {shared[0]}"
            )
        return made, [path for path in _dependencies(read.read_text()) if Path(path) != source]

    return disk_cache.compiled("kernels", [text, *command, compiler_version()], f"{name}_{isa}.o", compile)


def _shared_functions(made: Path) -> list[str]:
    """The functions of an object that are visible to the linker. The list is empty where there is no nm.

    Of such functions in several objects, the linker keeps one, which may be compiled for the wrong instruction set.
    """
    if shutil.which("nm") is None:
        return []
    listed = subprocess.run(["nm", "-C", "--defined-only", str(made)], capture_output=True, text=True).stdout
    return re.findall(r"^\w+ [WT] (.+)$", listed, re.M)


def _dependencies(rule: str) -> list[str]:
    """The paths after the colon of a make rule. A space in a path is written with a backslash."""
    paths = re.findall(r"(?:\\ |\S)+", rule.replace("\\\n", " ").partition(":")[2])
    return [path.replace("\\ ", " ") for path in paths]
