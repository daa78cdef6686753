"""Words and cells that the tables of the README's numbers share, and its paragraphs."""

import re
from collections.abc import Sequence

from .units import between, times

PREPOSITIONS = {"decode": "after", "prefill": "of", "training step": "on"}


def ratio(found: dict | None) -> str:
    """``1.64 × (1.46–1.83)``: a median and its quantiles; a dash for None."""
    return f"{times(found['median'])} ({between(found)})".replace("\u00a0", " ") if found else "–"


def work(what: str, case: str) -> str:
    """``decode after 32, batch 8`` for a kind of work and a case like ``8x32``."""
    batch, tokens = case.split("x")
    return f"{what} {PREPOSITIONS[what]} {tokens}, batch {batch}"


def listed(items: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def wrap(text: str, width: int = 120) -> str:
    """Paragraphs in lines of at most that many letters. What stands in backquotes stays whole. Tables, pictures and
    blocks of code stay as they are."""
    if text.startswith(("|", "!", "```")):
        return text
    lines, line = [], ""
    for word in re.findall(r"[^\s`]*`[^`]*`\S*|\S+", text):
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    return "\n".join([*lines, line])
