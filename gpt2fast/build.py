"""Builds and loads C++ kernels of a package of your own.

They are built against gpt2fast's headers and connected to the gpt2fast that runs. ``load(name, sources, kernels)``
builds and loads at once. ``extension(...)`` and ``BuildExtension`` are for a setup.py; the package then calls
``load_extension("package._C")`` when it is imported.

``kernels`` are headers. ``scale.h``, for example, defines ``scale_tasks(args)`` and ``scale_run(args, begin, end)``, as
csrc/cpu/gelu.h does, and is compiled once for each instruction set. ``sources`` are the bindings, which include
``torch/binding.h``. tests/scale_package is an example.
"""

import ctypes
import importlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from . import __version__, backends, disk_cache
from .extension import _C
from .extension import error as _extension_error

if TYPE_CHECKING:
    from .build_extension import BuildExtension, extension

__all__ = ["BuildExtension", "connect", "extension", "include_path", "load", "load_extension"]

_PACKAGE = Path(__file__).parent

if not TYPE_CHECKING:  # loaded at the first use, because they import setuptools

    def __getattr__(name: str):
        if name in ("BuildExtension", "extension"):
            return getattr(importlib.import_module("gpt2fast.build_extension"), name)
        raise AttributeError(f"module 'gpt2fast.build' has no attribute {name!r}")


def sources() -> Path:
    """The folder csrc. It is in the package if that was installed from a wheel, and next to it in a checkout."""
    inside, beside = _PACKAGE / "csrc", _PACKAGE.parent / "csrc"
    return beside if beside.is_dir() and not inside.is_dir() else inside


def include_path() -> Path:
    """The folder of the headers "torch/binding.h", "cpu/vec_math.h" and "cuda/device.cuh", for the option ``-I``.

    Raises FileNotFoundError where this gpt2fast has no headers.
    """
    if not (sources() / "torch" / "binding.h").is_file():
        raise FileNotFoundError(
            f"gpt2fast {__version__} in {_PACKAGE} has no C++ headers: there is no torch/binding.h in {sources()}. "
            "Install gpt2fast again: pip install --force-reinstall --no-deps --no-build-isolation, from a wheel or "
            "from its sources"
        )
    return sources()


def load(
    name: str,
    sources: Sequence[str | Path],
    kernels: Sequence[str | Path] = (),
    include_dirs: Sequence[str | Path] = (),
    cflags: Sequence[str] = (),
    ldflags: Sequence[str] = (),
    verbose: bool = False,
) -> Path:
    """Builds a library, loads and connects it, and returns its path.

    The library is kept in ``GPT2FAST_CACHE``, or else in gpt2fast in the user's cache folder. It is built again only
    where a source or a header has changed.

    Args:
        name: the name of the library, an identifier.
        sources: files in C++ with the bindings, which include "torch/binding.h".
        kernels: headers, each with one kernel, compiled once for each instruction set.
        include_dirs: folders of headers, besides gpt2fast's own.
        cflags, ldflags: further options for all files, and for the linker.
        verbose: prints the commands.

    Raises FileNotFoundError for a file, compiler or ninja that is missing, RuntimeError with the compiler's message
    where something does not compile, and ImportError where the library does not load.
    """
    from . import build_kernels, build_library

    _need_own_kernels()
    if not name.isidentifier():
        raise ValueError(f"gpt2fast.build.load: name must be an identifier, got {name!r}")
    files = [build_kernels.existing(path, "sources") for path in sources]
    if len({file.stem for file in files}) < len(files):  # torch names an object after the stem of its source
        raise ValueError(f"gpt2fast.build.load: sources must have different names, got {', '.join(map(str, files))}")
    objects = build_kernels.compile_kernels(kernels, include_dirs, cflags)
    build_library.need_tools("gpt2fast.build.load", "setup.py with gpt2fast.build.extension builds without it")
    of = (name, torch.__version__, build_library.compiler_version(), str(include_path()))
    key = disk_cache.digest(*of, *map(str, files))
    folder = disk_cache.root() / "extensions" / key[:32]
    (folder / "build").mkdir(parents=True, exist_ok=True)
    try:
        with disk_cache.locked(folder):
            library = build_library.compile_library(
                "gpt2fast.build.load",
                name,
                files,
                folder / "build",
                build_kernels.binding_flags(cflags),
                [*map(str, objects), *ldflags],
                [include_path(), *include_dirs],
                verbose,
            )
    except OSError as error:
        raise ImportError(
            f"gpt2fast.build.load: {name} does not load: {_words(error)}. {_undefined(_words(error))}"
        ) from error
    connect(library)
    return library


def load_extension(name: str | Path) -> Path:
    """Loads and connects a library that a setup.py has built, and returns its path.

    ``name`` is ``"package._C"`` or the path of the library. A package calls this in its ``__init__``. Raises
    ImportError where the library is missing or does not load, for example after another torch was installed.
    """
    path = name if isinstance(name, Path) else _find(name)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        known = _built_with(path)
        fix = _undefined(_words(error))
        if known != torch.__version__:
            fix = (
                f"It was built with torch {known or 'of an unknown version'}, this is torch {torch.__version__}: build "
                "it again, in its sources: pip install --no-build-isolation ."
            )
        raise ImportError(f"{name} does not load: {_words(error)}. {fix}") from error
    connect(path)
    return path


def _find(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ImportError(
            f"{name} is not built: in the sources of {name.partition('.')[0]}, pip install --no-build-isolation ."
        )
    return Path(spec.origin)


def _built_with(path: Path) -> str | None:
    note = path.parent / (path.name.split(".")[0] + ".built_with")
    return note.read_text(encoding="utf-8") if note.is_file() else None


def _words(error: OSError) -> str:
    """The message of the dynamic loader, which is the cause of torch's error."""
    return str(error.__cause__ or error)


def _undefined(words: str) -> str:
    """What is missing in a library that was built with this torch, from the message of the loader."""
    if "undefined symbol: _ZN8gpt2fast3cpu" in words:
        return "A kernel of GPT2FAST_CPU_KERNEL was not compiled: name its header in kernels="
    return "A source of it was not compiled, or a library not linked: name them in sources= and ldflags="


def _need_own_kernels() -> None:
    if _C is None:
        raise RuntimeError(
            f"gpt2fast's own kernels in C++, which others are connected to, are not there: {_extension_error}"
        )


def connect(library: ModuleType | str | os.PathLike) -> None:
    """Connects a loaded library to this gpt2fast, so that its bindings get declarations, instruction set and memory.

    ``library`` is its module or path. The ops of a library that is not connected raise. Raises ValueError for a library
    without our bindings, and RuntimeError for one that was built against another gpt2fast.
    """
    _need_own_kernels()
    path = str(getattr(library, "__file__", library))
    function = getattr(ctypes.CDLL(path), "gpt2fast_connect", None)
    if function is None:
        raise ValueError(
            f"gpt2fast.build.connect: {path} has no gpt2fast_connect: a source of it must include torch/binding.h, and "
            "gpt2fast.build must build it"
        )
    function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_char_p
    if misfit := function(_C.joint()):
        raise RuntimeError(
            f"{path} was built against gpt2fast {misfit.decode()} in this gpt2fast, {__version__}: build it again, in "
            "its sources: pip install --no-build-isolation ."
        )
    backends.native_kernels_changed()
