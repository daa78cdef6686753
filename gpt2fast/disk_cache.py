"""A cache of compiled files on disk.

An entry is found by the content of source, flags, compiler and every header that the compiler read.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

MAKING = "making-"  # the name of a folder whose content is not finished begins with it


def root() -> Path:
    """The folder of the cache: ``GPT2FAST_CACHE``, or gpt2fast in the user's cache folder."""
    if named := os.environ.get("GPT2FAST_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2fast"


def digest(*parts: str | bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()


def compiled(
    kind: str, parts: Iterable[str | bytes], name: str, compile: Callable[[Path], tuple[Path, Iterable[str]]]
) -> Path:
    """The file called ``name`` that ``compile`` makes from ``parts``. It is called only where the cache has none.

    ``kind`` is a folder in ``root()``. ``compile(folder)`` works in an empty folder and returns the file and the paths
    that it read. An entry is valid as long as none of these files has changed.
    """
    home = root() / kind / digest(*parts)[:32]
    if found := _entry(home, name):
        return found
    home.mkdir(parents=True, exist_ok=True)
    with locked(home), tempfile.TemporaryDirectory(dir=home, prefix=MAKING) as folder:
        if found := _entry(home, name):  # another process has made it while this one waited for the lock
            return found
        made, read = compile(Path(folder))
        hashes = {str(path): _hash(Path(path)) for path in read}
        entry = home / digest(json.dumps(hashes, sort_keys=True))[:32]
        finished = Path(tempfile.mkdtemp(dir=home, prefix=MAKING))
        shutil.move(made, finished / name)
        (finished / "read.json").write_text(json.dumps(hashes))
        shutil.rmtree(entry, ignore_errors=True)  # an entry whose file is missing
        finished.rename(entry)
        return entry / name


def found(kind: str, parts: Iterable[str | bytes], name: str) -> Path | None:
    """The file that ``compiled`` returns for the same arguments without compiling, or None where the cache has none."""
    return _entry(root() / kind / digest(*parts)[:32], name)


def _entry(home: Path, name: str) -> Path | None:
    for manifest in sorted(home.glob("*/read.json")):
        file = manifest.parent / name
        finished = not manifest.parent.name.startswith(MAKING)
        if finished and file.is_file() and _unchanged(json.loads(manifest.read_text())):
            return file
    return None


@contextlib.contextmanager
def locked(home: Path) -> Iterator[None]:
    """A lock between processes. Where several need the same file, one of them compiles and the others wait."""
    with open(home / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed or the process ends
        yield


def _hash(path: Path) -> str | None:
    try:
        return digest(path.read_bytes())
    except OSError:
        return None


def _unchanged(hashes: dict[str, str]) -> bool:
    return all(_hash(Path(path)) == wanted for path, wanted in hashes.items())
