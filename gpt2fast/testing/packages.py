"""Packages that declare ops of their own: those named, and those that say so by the entry point group ``gpt2fast.ops``.

In such a package's pyproject.toml:

    [project.entry-points."gpt2fast.ops"]
    my_package = "my_package.ops"
"""

import importlib
import importlib.metadata
from collections.abc import Iterable

GROUP = "gpt2fast.ops"
_errors: dict[str, str] = {}  # by entry point that failed, so that each is imported once
_imported: set[str] = set()


def import_modules(names: Iterable[str]) -> None:
    """Imports modules by name; ImportError naming the module and its error where one does not import."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise ImportError(f"gpt2fast: --import {name}: {type(error).__name__}: {error}") from error


def import_entry_points() -> dict[str, str]:
    """Imports what installed packages declare under ``gpt2fast.ops``; of those that fail, a name and the error.

    The name says the package and its entry point. One that fails does not keep the others from being imported.
    """
    for point in importlib.metadata.entry_points(group=GROUP):
        package = point.dist.name if point.dist is not None else "unknown package"
        label = f"{package}: {GROUP} {point.name} = {point.value}"
        if label in _imported or label in _errors:
            continue
        try:
            point.load()
            _imported.add(label)
        except Exception as error:
            _errors[label] = f"{type(error).__name__}: {error}"
    return dict(_errors)
