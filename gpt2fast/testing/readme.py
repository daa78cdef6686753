"""Makes the README's table of ops from the declarations: ``python -m gpt2fast.testing.readme README.md`` updates it."""

import sys
from pathlib import Path

from .. import backends
from ..op import NAMESPACE, OPS


def table() -> str:
    """The table in Markdown, with one row for each op, in the order of their names."""
    from .. import ops  # noqa: F401  declares them

    lines = ["| op | what it is | CPU | Triton | CUDA | derivative | autocast |", "| --- " * 7 + "|"]
    for op in sorted(OPS.values(), key=lambda op: op.name):
        if op.namespace != NAMESPACE:
            continue
        what = op.summary.replace("|", "\\|").rstrip(".")
        found = backends.choose(op, **op.example()).backend
        cpu = "C++" if found == "cpu" else found
        triton, cuda = ("yes" if op.key in backends.BACKENDS[n].kernels else "–" for n in ("triton", "cuda"))
        derivative = "yes" if op.has_derivative else "–"
        lines.append(f"| `{op.name}` | {what} | {cpu} | {triton} | {cuda} | {derivative} | {op.autocast} |")
    return "\n".join(lines)


def renew(path: str) -> None:
    """Replaces the text between the two lines ``<!-- ops -->`` of a file by the table."""
    before, _, after = Path(path).read_text(encoding="utf-8").split("<!-- ops -->")
    Path(path).write_text("<!-- ops -->".join((before, f"\n{table()}\n", after)), encoding="utf-8")


if __name__ == "__main__":
    renew(sys.argv[1])
