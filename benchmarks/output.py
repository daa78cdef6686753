"""Where results go: JSON files and folders, found writable before anything is measured; and what made them."""

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
    """The folder, made where it is missing; for argparse, which words the error."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write into {path}: {error.strerror}") from error
    return path


def json_file(text: str) -> str:
    """A path that can be written, or ``-`` for the terminal; for argparse, as ``folder``."""
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


def origin(program: str, argv: Sequence[str] | None) -> dict:
    """When and by which command results came about, and of which versions. Of files the command has the names alone."""
    words = [word.rsplit("/", 1)[-1] for word in (sys.argv[1:] if argv is None else argv)]
    versions = {}
    for name in ("gpt2fast", "torch", "transformers", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return dict(date=date, command=shlex.join([*program.split(), *words]), versions=versions)


def write(found: dict, path: str | None) -> None:
    """JSON to a file, or to the terminal for ``-``."""
    if path == "-":
        print(json.dumps(found))
    elif path:
        Path(path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
