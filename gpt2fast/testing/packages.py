"""Imports packages that declare ops of their own: by name, or by the entry point group ``gpt2fast.ops``.

Such a package has in its pyproject.toml:

    [project.entry-points."gpt2fast.ops"]
    my_package = "my_package.ops"
"""

import importlib
import importlib.metadata
from collections.abc import Iterable

GROUP = "gpt2fast.ops"
_errors: dict[str, str] = {}  # of each entry point that failed, so that it is not imported again
_imported: set[str] = set()


def import_modules(names: Iterable[str]) -> None:
    """Imports modules by name. Raises ImportError with the module and its error where one cannot be imported."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise ImportError(f"gpt2fast: --import {name}: {type(error).__name__}: {error}") from error


def import_entry_points() -> dict[str, str]:
    """Imports the entry points of installed packages under ``gpt2fast.ops``. Returns the errors of those that fail.

    The key of an error has the package and its entry point. The others are imported all the same.
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
