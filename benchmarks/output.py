"""Where results go: JSON files and folders, which are checked to be writable before anything is measured. Also notes
what made the results."""

import argparse
import datetime
import importlib.metadata
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

JSON_HELP = "write JSON, without FILE to the terminal"


def folder(text: str | Path) -> Path:
    """For argparse, which reports the error: the folder, which is made if it is missing."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write into {path}: {error.strerror}") from error
    return path


def json_file(text: str) -> str:
    """For argparse, as ``folder``: a path that can be written, or ``-`` for the terminal."""
    if text != "-":
        folder(Path(text).parent)
        try:
            existed = Path(text).exists()
            open(text, "a").close()
            if not existed:
                Path(text).unlink()
        except OSError as error:
            raise argparse.ArgumentTypeError(f"cannot write {text}: {error.strerror}") from error
    return text


def versions(*names: str) -> dict[str, str | None]:
    """The installed versions of packages, None for those that are not installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def origin(program: str, argv: Sequence[str] | None) -> dict:
    """When and by which command the results were made, and with which versions. Of paths the command keeps only the
    file names."""
    words = [word.rsplit("/", 1)[-1] for word in (sys.argv[1:] if argv is None else argv)]
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    made_with = versions("gpt2fast", "torch", "transformers", "triton")
    return dict(date=date, command=shlex.join([*program.split(), *words]), versions=made_with)


def write(found: dict, path: str | None) -> None:
    """Writes JSON to a file, or to the terminal for ``-``."""
    if path == "-":
        print(json.dumps(found))
    elif path:
        Path(path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
