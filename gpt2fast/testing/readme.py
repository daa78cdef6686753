"""The README's table of ops, made from their declarations: ``python -m gpt2fast.testing.readme`` prints it."""

from ..op import NAMESPACE, OPS
from .check import has_kernel


def table() -> str:
    """Markdown, one row an op, in the order of their names."""
    from .. import ops  # noqa: F401  declares them

    lines = ["| op | what it is | CPU kernel | derivative | autocast |", "| --- | --- | --- | --- | --- |"]
    for op in sorted(OPS.values(), key=lambda op: op.name):
        if op.namespace != NAMESPACE:
            continue
        what = op.summary.replace("|", "\\|").rstrip(".")
        kernel = "C++" if has_kernel(op) else "reference"
        derivative = "yes" if op.has_derivative else "–"
        lines.append(f"| `{op.name}` | {what} | {kernel} | {derivative} | {op.autocast} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
