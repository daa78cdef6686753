"""Prints the path of GPT-2's BPE ranks. They are fetched once, from openai-whisper's source package, into the user's
cache."""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "openai-whisper==20250625"
MEMBER = "whisper/assets/gpt2.tiktoken"
RANKS = 50256


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2fast"


def ranks(fetch: bool = True) -> Path:
    """The file named by GPT2FAST_GPT2_RANKS, or the fetched one. Raises OSError, which says why there is none."""
    given = os.environ.get("GPT2FAST_GPT2_RANKS")
    path = Path(given) if given else cache_folder() / "gpt2.tiktoken"
    if not path.is_file():
        if given:
            raise OSError(f"GPT2FAST_GPT2_RANKS names {given}, which is no file")
        if not fetch:
            raise OSError(f"GPT-2's ranks are not on this machine; `python tests/{Path(__file__).name}` fetches them")
        _fetch(path)
    if len(path.read_bytes().splitlines()) != RANKS:
        raise OSError(f"{path} must hold {RANKS} ranks")
    return path


def _fetch(path: Path) -> None:
    content = download(PACKAGE, MEMBER)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)


def download(package: str, member: str) -> bytes:
    """A file of a package's source distribution. Raises OSError with pip's reason."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        done = subprocess.run([*command, "-d", folder, package], capture_output=True, text=True, timeout=120)
        archives = list(Path(folder).glob("*.tar.gz"))
        if not archives:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no archive came"]
            raise OSError(f"pip could not download {package}: {lines[-1]}")
        with tarfile.open(archives[0]) as archive:
            found = next(m for m in archive.getmembers() if m.name.endswith(member))
            return archive.extractfile(found).read()


if __name__ == "__main__":
    try:
        print(ranks())
    except (OSError, subprocess.SubprocessError) as error:
        sys.exit(f"fetch_ranks: {error}")
