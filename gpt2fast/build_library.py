"""Compiles C++ sources to a shared library, by the loader of torch.utils.cpp_extension and ninja, in parallel."""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

MOST_ERRORS, LINES_OF_ERROR = 5, 3


def compiler(what: str = "gpt2fast.build") -> list[str]:
    """The command of the C++ compiler: ``CXX``, or c++.

    Raises FileNotFoundError where it is missing. ``what`` is the caller that the message names.
    """
    command = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(
            f"{what} needs a C++ compiler, and there is no {command[0]!r} on PATH: install one (sudo apt-get "
            "install g++, sudo dnf install gcc-c++, xcode-select --install), or name it in CXX"
        )
    return command


def compiler_version(what: str = "gpt2fast.build") -> str:
    return _version(tuple(compiler(what)), os.environ.get("PATH", ""))


@functools.cache
def _version(command: tuple[str, ...], path: str) -> str:
    return subprocess.run([*command, "--version"], capture_output=True, text=True).stdout


def need_tools(what: str, otherwise: str) -> None:
    """Raises FileNotFoundError where compiler, setuptools or ninja are missing.

    ``otherwise`` is what the message for ninja says besides how to install it.
    """
    compiler(what)
    try:
        from torch.utils import cpp_extension
    except ImportError as error:  # it imports setuptools, which torch does not bring for every Python
        raise FileNotFoundError(f"{what} needs setuptools ({error}): pip install setuptools") from error
    if not _has_ninja(cpp_extension.is_ninja_available):
        raise FileNotFoundError(f"{what} needs ninja, which is not on PATH: pip install ninja ({otherwise})")


def _has_ninja(available: Callable[[], bool]) -> bool:
    """Whether torch finds ninja. One beside this Python, in an environment that is not activated, is put on PATH."""
    scripts = sysconfig.get_path("scripts")
    if not available() and shutil.which("ninja", path=scripts):
        os.environ["PATH"] = os.pathsep.join(filter(None, (os.environ.get("PATH"), scripts)))
    return available()


def compile_library(
    what: str,
    name: str,
    sources: Sequence[Path],
    folder: Path,
    cflags: Sequence[str],
    ldflags: Sequence[str] = (),
    include_dirs: Sequence[str | Path] = (),
    verbose: bool = False,
) -> Path:
    """Compiles ``sources`` in ``folder``, loads the library that is made of them, and returns its path.

    Only what has changed since the last time in this folder is compiled. One process at a time may use the folder.

    Args:
        what: the caller that messages name.
        name: the name of the library, an identifier.
        cflags, ldflags: options of the compiler and of the linker.
        include_dirs: folders of headers, besides those of torch, pybind11 and Python.
        verbose: prints the commands.

    Raises RuntimeError with the compiler's message where something does not compile, and OSError where the library does
    not load. ``need_tools`` must be called before.
    """
    from torch.utils import cpp_extension

    (folder / "lock").unlink(missing_ok=True)  # a killed process leaves this lock of torch behind
    try:
        library = cpp_extension.load(
            name,
            [str(source) for source in sources],
            extra_cflags=list(cflags),
            extra_ldflags=list(ldflags),
            extra_include_paths=[str(path) for path in include_dirs],
            build_directory=str(folder),
            is_python_module=False,
            verbose=verbose,
        )
    except RuntimeError as error:
        cpp_extension.JIT_EXTENSION_VERSIONER.entries.pop(name, None)  # else torch takes it for built next time
        raise RuntimeError(f"{what}: {name} does not compile:\n{shortened(str(error))}") from None
    return Path(library)


def shortened(text: str) -> str:
    """The first errors in a compiler's output, each with the code that it points at; without errors, the last lines."""
    lines = text.strip().split("\n")
    places = [i for i, line in enumerate(lines) if re.search(r"\b(error|undefined reference)\b", line)]
    places = [i for i in places if not lines[i].startswith("Error building extension")]
    if not places:
        return "\n".join(lines[-10:])
    shown = [line for i in places[:MOST_ERRORS] for line in lines[i : i + LINES_OF_ERROR]]
    rest = len(places) - MOST_ERRORS
    return "\n".join([*shown, f"... and {rest} more"] if rest > 0 else shown)
