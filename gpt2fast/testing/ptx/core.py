"""The core of the machine is the extension gpt2fast._ptx. This file finds it, or compiles it.

Building gpt2fast with ``GPT2FAST_PTX=1`` makes the core. Elsewhere it is compiled at its first use, from the sources in
csrc/ptx, which every wheel has. It stays in the cache as long as sources, torch, Python and compiler are the same.
"""

import importlib.machinery
import importlib.util
import sys
import sysconfig
import threading
from pathlib import Path
from types import ModuleType

import torch

from ... import build, build_library, disk_cache
from ...compiler_flags import PTX_FLAGS
from .toolchain import WHAT

NAME, FILE, CACHE = "gpt2fast._ptx", "_ptx.so", "ptx_machine"
HOW = "pip install 'gpt2fast[ptx]', then python -m gpt2fast.testing.ptx"

_lock = threading.Lock()


def load() -> ModuleType:
    """The module of the core. It is compiled first where it is neither built nor in the cache.

    Raises FileNotFoundError where the compiler, ninja, setuptools or the sources are missing, and RuntimeError where
    the core does not compile or does not load.
    """
    with _lock:
        if NAME not in sys.modules:
            sys.modules[NAME] = _load(file())
        return sys.modules[NAME]


def file() -> Path:
    """The library of the core. It is compiled first where it is neither built nor in the cache.

    Raises FileNotFoundError where the compiler, ninja, setuptools or the sources are missing, and RuntimeError where
    the core does not compile.
    """
    return find() or _compile()


def ready() -> bool:
    """Whether the core is built, in the cache or loaded, so that nothing must be compiled."""
    return NAME in sys.modules or find() is not None


def find() -> Path | None:
    """The library of the core that is built or in the cache, or None."""
    if built := _built():
        return built
    try:
        return disk_cache.found(CACHE, _parts(), FILE)
    except FileNotFoundError:  # without a compiler or sources, no entry of the cache is known to be the right one
        return None


def _built() -> Path | None:
    """The library in the folder of this package. The finder of an editable installation would offer another's."""
    spec = importlib.machinery.PathFinder.find_spec(NAME, [str(Path(build.__file__).parent)])
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def _sources() -> list[Path]:
    """The files in csrc/ptx, sources and headers."""
    folder = build.sources() / "ptx"
    found = sorted([*folder.glob("*.cpp"), *folder.glob("*.h")])
    if not found:
        raise FileNotFoundError(
            f"{WHAT}: the sources of the PTX machine are missing: there are none in {folder}. Install gpt2fast again: "
            "pip install --force-reinstall --no-deps --no-build-isolation, from a wheel or from its sources"
        )
    return found


def _parts() -> list[str | bytes]:
    """What the library depends on."""
    contents = [part for source in _sources() for part in (source.name, source.read_bytes())]
    python = sysconfig.get_config_var("SOABI") or sys.version
    return [*contents, *PTX_FLAGS, torch.__version__, python, build_library.compiler_version(WHAT)]


def _compile() -> Path:
    build_library.need_tools(WHAT, "it comes with gpt2fast[ptx]")

    def compile(folder: Path) -> tuple[Path, list[str]]:
        sources = [source for source in _sources() if source.suffix == ".cpp"]
        print(
            f"{WHAT}: compiling the PTX machine, {len(sources)} files of C++. This happens once and may take some "
            f"minutes. It is kept in {disk_cache.root() / CACHE}.",
            file=sys.stderr,
            flush=True,
        )
        return build_library.compile_library(WHAT, "_ptx", sources, folder, PTX_FLAGS), []

    return disk_cache.compiled(CACHE, _parts(), FILE, compile)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise RuntimeError(
            f"{WHAT}: {path} does not load ({error}): remove it, and python -m gpt2fast.testing.ptx compiles it again"
        ) from error
    return module
