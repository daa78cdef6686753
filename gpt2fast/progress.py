"""A line on standard error that says how far a command is."""

import sys
from collections.abc import Callable


def progress(count: int, text: Callable[..., str]) -> Callable[..., None] | None:
    """A function that shows ``text(done, ...)`` in place of what it showed before; None where nobody sees it.

    Nobody sees it where standard error is no terminal. The line ends when ``done`` is ``count``.
    """
    if not sys.stderr.isatty():
        return None

    def show(done: int, *more: object) -> None:
        print(text(done, *more), end="\r" if done < count else "\n", file=sys.stderr, flush=True)

    return show
