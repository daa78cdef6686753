"""Compiled things on disk, found again by content: source, flags, compiler and every header that was read."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path


def root() -> Path:
    """``GPT2FAST_CACHE``, or gpt2fast in the user's cache folder."""
    if named := os.environ.get("GPT2FAST_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2fast"


def digest(*parts: str | bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()


def compiled(parts: Iterable[str | bytes], name: str, compile: Callable[[Path], tuple[Path, Iterable[str]]]) -> Path:
    """The file called ``name`` that ``compile`` made of ``parts``; it is called only where the cache has none.

    ``compile(folder)`` works in an empty folder and returns the file and the paths that it read. An entry holds as
    long as each of these has the content that it had: a changed header compiles again.
    """
    home = root() / "ptx" / digest(*parts)[:32]
    for manifest in sorted(home.glob("*/read.json")):
        if (manifest.parent / name).is_file() and _unchanged(json.loads(manifest.read_text())):
            return manifest.parent / name
    home.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=home, prefix="making-"))
    try:
        made, read = compile(folder)
        hashes = {str(path): _hash(Path(path)) for path in read}
        entry = home / digest(json.dumps(hashes, sort_keys=True))[:32]
        finished = Path(tempfile.mkdtemp(dir=home, prefix="making-"))
        shutil.move(made, finished / name)
        (finished / "read.json").write_text(json.dumps(hashes))
        try:
            finished.rename(entry)
        except OSError:  # another process was faster, or an entry lost its file
            shutil.rmtree(entry, ignore_errors=True)
            finished.rename(entry)
        return entry / name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _hash(path: Path) -> str | None:
    try:
        return digest(path.read_bytes())
    except OSError:
        return None


def _unchanged(hashes: dict[str, str]) -> bool:
    return all(_hash(Path(path)) == wanted for path, wanted in hashes.items())
