"""Where results go: JSON files and folders, found writable before anything is measured."""

import argparse
import json
import tempfile
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


def write(found: dict, path: str | None) -> None:
    """JSON to a file, or to the terminal for ``-``."""
    if path == "-":
        print(json.dumps(found))
    elif path:
        Path(path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
