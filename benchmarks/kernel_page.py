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
    """One table. Where the architectures differ, a cell has a value for each of them, in the order of ``counts``."""
    lines = [HEADS, ["---"] * len(HEADS)]
    for rows in zip(*counts.values(), strict=True):
        columns = zip(*map(cells, rows))
        lines.append([" / ".join(column if len(set(column)) > 1 else column[:1]) for column in columns])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


INTRODUCTION = """# GPU kernels in numbers

Each row of the table below is one of our kernels for GPUs. `python -m benchmarks.kernel_table` wrote this page. The
registers, spilled bytes and shared bytes are the compiler's figures, and the occupancy follows from them. All figures
to the right of it were counted on the PTX machine ([ptx.md](ptx.md)), which ran the kernels on few rows of data.
Nothing here is a time, and no GPU was needed.

The kernels are compiled for {architectures}. Where a figure differs between them, the cell has one for
each, in this order. A dash means that there is nothing to count, or that the row of the call's first kernel has the
figure.

- **op, dtype, backend, kernel**: The op and the dtype say which call was made. Some calls run several kernels. A call
  may also run several variants of a kernel; the table shows the variant with the most registers.
- **threads**: The threads of a block. A GPU gives work to its multiprocessors in blocks.
- **registers**: The registers of a thread. A thread can have at most 255.
- **spilled bytes**: The bytes that a thread moves to slow memory because its registers do not suffice.
- **shared bytes**: The shared memory of a block. It is the fast memory through which the threads of a block exchange
  data.
- **occupancy**: A multiprocessor has a limited number of places for threads. Occupancy is the share of these places
  that the kernel can fill. Registers, shared memory and the size of the blocks limit it.
- **bytes / least**: The bytes that all kernels of the call move, divided by the bytes of the tensors that the call must
  read or write. Bytes that are read twice count twice, even if a cache serves the second read. The first kernel's row
  has this figure.
- **sectors / ideal**: Memory is read and written in sectors of 32 bytes. This is the number of sectors that the kernel
  touches, divided by the smallest number that could hold the bytes.
- **conflicts a request**: Shared memory has 32 banks. If threads want different words of one bank at once, they wait
  for each other. This is the number of extra turns of an access, on average.
- **products / least**: The operations on tensor cores of all kernels of the call, divided by those of the op's formula.
  A product of float32 numbers takes six products of bfloat16 numbers, so that 6 is the least for float32.
  The first kernel's row has this figure.

What to look for: spilled bytes and conflicts should be 0, and the ratios should be near 1. Anything above is work that
a better kernel might not do. Low occupancy is a problem for kernels that wait for memory, since few other threads can
run meanwhile.

Some kernels in CUDA C++ have higher figures than those in Triton. These are the main reasons:

- Layer norm reads weight and bias again for every row, `linear` reads the bias again for every row, and `bias_gelu`
  reads it again for every four rows. Triton's programs keep them. The cache serves these reads.
- Decode attention splits the keys into smaller parts, so that more parts are joined at the end.
- Float32 attention works on tiles of 64 queries, Triton's on tiles of 32. Larger tiles compute more products that the
  causal mask then hides. The kernel also keeps three bfloat16 parts of each number in shared memory, so that fewer
  blocks fit on a multiprocessor. In return, none of its registers spill.
- The backward pass of attention computes the row sums of output times gradient in a kernel of their own, which reads
  both tensors once more. Triton's kernel for the queries computes them on the way.
"""


def document(counts: Mapping[str, Rows]) -> str:
    """The text of docs/kernels.md."""
    *most, last = counts
    architectures = f"{', '.join(most)} and {last}" if most else last
    return f"{INTRODUCTION.format(architectures=architectures)}\n{to_markdown(counts)}"
