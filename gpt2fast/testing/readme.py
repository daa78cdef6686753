"""The README's table of ops, made from their declarations: ``python -m gpt2fast.testing.readme`` prints it."""

from .. import backends
from ..op import NAMESPACE, OPS


def table() -> str:
    """Markdown, one row an op, in the order of their names."""
    from .. import ops  # noqa: F401  declares them

    lines = ["| op | what it is | CPU | Triton | derivative | autocast |", "| --- | --- | --- | --- | --- | --- |"]
    for op in sorted(OPS.values(), key=lambda op: op.name):
        if op.namespace != NAMESPACE:
            continue
        what = op.summary.replace("|", "\\|").rstrip(".")
        found = backends.choose(op, **op.example()).backend
        cpu = "C++" if found == "cpu" else found
        triton = "yes" if op.key in backends.BACKENDS["triton"].kernels else "–"
        derivative = "yes" if op.has_derivative else "–"
        lines.append(f"| `{op.name}` | {what} | {cpu} | {triton} | {derivative} | {op.autocast} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
