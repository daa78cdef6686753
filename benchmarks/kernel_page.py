"""The counts of GPU kernels that benchmarks.kernel_table made, from kernels.json, and docs/kernels.md made of them.

kernels.json is the only copy that is kept. It holds the columns, and for each architecture a row for each kernel.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

COUNTS = Path(__file__).parent / "kernels.json"
HEADS = (
    "op", "dtype", "backend", "kernel", "threads", "registers", "spilled bytes", "shared bytes", "occupancy",
    "bytes / least", "sectors / ideal", "conflicts a request", "products / least",
)  # fmt: skip
Rows = Sequence[Sequence[str | int | None]]  # None: the kernel has nothing to count there


def read(path: Path = COUNTS) -> dict[str, Rows]:
    """The rows of each architecture. Raises ValueError for a file that holds something else."""
    wanted = f"{path}: expected counts of benchmarks.kernel_table"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{wanted}, got text that is no JSON: {error}") from error
    if not isinstance(found, dict) or not found.get("architectures"):
        raise ValueError(f"{wanted}, got no architectures")
    if found.get("columns") != list(HEADS):
        raise ValueError(f"{wanted}, got the columns {found.get('columns')}")
    for architecture, rows in found["architectures"].items():
        if not rows or any(len(row) != len(HEADS) for row in rows):
            raise ValueError(f"{wanted}, got rows of {architecture} that are not as long as the columns, or none")
    return found["architectures"]


def write(counts: Mapping[str, Rows], path: Path = COUNTS) -> None:
    """Writes the counts as JSON, with a line for each row."""
    parts = []
    for architecture, rows in counts.items():
        lines = ",\n".join(json.dumps(list(row), ensure_ascii=False) for row in rows)
        parts.append(f"{json.dumps(architecture)}: [\n{lines}\n]")
    text = f'{{"columns": {json.dumps(HEADS)},\n"architectures": {{\n{",".join(parts)}\n}}}}\n'
    path.write_text(text, encoding="utf-8")


def cells(row: Sequence[str | int | None]) -> list[str]:
    return ["–" if cell is None else str(cell) for cell in row]


def to_markdown(counts: Mapping[str, Rows]) -> str:
    """A table for each architecture."""
    parts = []
    for architecture, rows in counts.items():
        lines = [HEADS, ["---"] * len(HEADS), *map(cells, rows)]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"## {architecture}\n\n{text}\n")
    return "\n".join(parts)


INTRODUCTION = """# GPU kernels in numbers

`python -m benchmarks.kernel_table` wrote this page. Each row is a kernel of ours, compiled for the architecture above
the table. The compiler reports registers and shared memory. The PTX machine ([ptx.md](ptx.md)) runs the kernels on few
rows of data and counts the rest. Nothing here is a time. A dash means that there is nothing to count.

- `threads` are those of a block. `registers` are those of a thread. `spilled bytes` are the values of a thread that
  found no register and went to slow memory. `shared bytes` are the fast memory of a block. `occupancy` is the share of
  a multiprocessor's places for threads that the kernel can fill with so many registers and so much shared memory.
- `bytes / least` is what all kernels of a call move, over the bytes of its tensors. A repeated read counts again, even
  if a cache serves it. `sectors / ideal` is how many pieces of 32 bytes are touched, over the fewest that would do.
- `conflicts a request` is how many extra turns an access to shared memory takes, as threads want the same bank at once.
  `products / least` is the call's work on tensor cores, over its formula's. Float32 takes six bfloat16 products each.

Look for spills and conflicts above 0, and for ratios far above 1. Of variants of a kernel in a call, the one with most
registers is shown. CUDA C++ moves more than Triton where a cache serves it: for each row, its layer norm reads weight
and bias again and its linear the bias; bias_gelu does so for every four. Its decode attention has more parts to join.
Its float32 attention has tiles of 64 queries, not 32, so that more products are masked. It keeps three parts of a
number in shared memory, so that fewer blocks fit, but no register spills.
"""


def document(counts: Mapping[str, Rows]) -> str:
    """The text of docs/kernels.md."""
    return f"{INTRODUCTION}\n{to_markdown(counts)}"
