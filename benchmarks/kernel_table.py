"""What each kernel in Triton and in CUDA C++ uses of a GPU and what it moves, in a table for each architecture:
``python -m benchmarks.kernel_table [sm_90 ...] > docs/kernels.md``.

Registers, spills and shared memory are what ptxas says of the compiled code. The PTX machine counts bytes, sectors,
bank conflicts and operations. All figures are exact and repeatable. None is a time, and no GPU is needed.
"""

import re
import sys
from collections.abc import Iterator

import torch

import gpt2fast.ops  # noqa: F401  declares them
from gpt2fast.backends import BACKENDS, use_backend
from gpt2fast.dtypes import dtype_name
from gpt2fast.op import OPS, Op
from gpt2fast.testing import ptx
from gpt2fast.testing.inputs import build, call, cut

from . import cases

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
GPU_BACKENDS = ("triton", "cuda")
DTYPES = (torch.bfloat16, torch.float32)
LIMIT = 1_000_000  # cases of the other ops are cut to so many operations; their kernels do not depend on the rows
SHOWN = {  # these cases have enough rows for the tiles of large inputs
    "linear": dict(B=1, T=640, K=128, N=256, bias=True, activation="gelu_tanh"),
    "linear_backward": dict(B=1, T=640, K=640, N=256),
    "mlp_backward": dict(B=1, T=640, K=128, M=640, N=128, bias_in=True, bias_out=True, keep=True),
    "attention": dict(B=1, T=256, S=256, H=2, D=64),
    "attention_backward": dict(B=1, T=256, S=256, H=2, D=64),
    "linear_cross_entropy": dict(R=16, K=64, V=12288, keep="both"),
    "linear_cross_entropy_backward": dict(R=16, K=64, V=12288),
    "adamw_": dict(each=[(64, 512), (2048,), (2048,)], step=10),
    "gradient_norm": dict(each=[(64, 512), (2048,), (2048,)]),
}
HEADS = (
    "op", "dtype", "backend", "kernel", "threads", "registers", "spilled bytes", "shared bytes", "occupancy",
    "bytes / least", "sectors / ideal", "conflicts a request", "products / least",
)  # fmt: skip
MATRICES = ("linear", "mlp", "attention", "decode_attention")  # ops whose operations are matrix products


def shown(op: Op) -> dict:
    return SHOWN.get(op.name) or cut(op, cases.bench_cases(op)[-1], LIMIT)


def launches(op: Op, dtype: torch.dtype, backend: str) -> tuple[list, float, float | None]:
    """The kernels of an op's call, each once; the call's bytes over the least possible; and its tensor-core operations
    over the operations of its formula."""
    case = shown(op)
    args = build(op, case, dtype)
    with ptx.machine() as machine, use_backend(backend):
        call(op, args)
    made = list(machine.launches)
    with use_backend("reference"):
        least = sum(cases.nbytes(op, args))
    moved = sum(bytes_moved(launch) for launch in made)
    flops = sum(launch.counters["tensor_flops"] for launch in made)
    once: dict = {}
    for launch in made:
        once[short(launch)] = max(once.get(short(launch), launch), launch, key=registers)
    products = flops / op.flops(case) if op.name.startswith(MATRICES) and flops else None
    return list(once.values()), moved / least, products


def short(launch) -> str:
    """A kernel's name without namespaces and template arguments."""
    return re.search(r"(\w+_kernel)\b", launch.name)[1]


def registers(launch) -> int:
    return launch.resources(ARCHITECTURES[0]).registers


def bytes_moved(launch) -> int:
    """The bytes that a launch moves. For each source line, these are the bytes that its threads ask for, or those of
    the sectors if that is less, since many threads ask for the same bytes."""
    lines = [(line, kind) for line in launch.per_source.values() for kind in ("load", "store")]
    return sum(
        min(line.get(f"global_{kind}_bytes", 0), 32 * line.get(f"global_{kind}_sectors", 0)) for line, kind in lines
    )


def ratio(counters: dict, over: str, under: str, kinds: tuple[str, ...]) -> float | None:
    top, bottom = (sum(counters.get(name.format(kind), 0) for kind in kinds) for name in (over, under))
    return top / bottom if bottom else None


def rows(op: Op, dtype: torch.dtype, backend: str, architectures: tuple[str, ...]) -> Iterator[tuple[str, list]]:
    """(architecture, row) for each kernel."""
    made, moved, products = launches(op, dtype, backend)
    for i, launch in enumerate(made):
        threads = launch.block[0] * launch.block[1] * launch.block[2]
        sectors = ratio(launch.counters, "global_{}_sectors", "global_{}_ideal_sectors", ("load", "store"))
        conflicts = ratio(launch.counters, "shared_{}_bank_conflicts", "shared_{}_requests", ("load", "store"))
        for architecture in architectures:
            found = launch.resources(architecture)
            yield architecture, [
                op.name, dtype_name(dtype), backend, short(launch), threads, found.registers,
                found.spill_stores, found.shared + launch.shared, f"{launch.occupancy(architecture):.0%}",
                *(None if value is None or (i and own) else f"{value:.2f}" for value, own in
                  ((moved, True), (sectors, False), (conflicts, False), (products, True))),
            ]  # fmt: skip


def table(names: list[str], architectures: tuple[str, ...] = ARCHITECTURES) -> str:
    """The table in Markdown, for the ops named or for all that have a GPU kernel, with the backends side by side."""
    found: dict[str, list[list]] = {architecture: [] for architecture in architectures}
    for name in names or OPS:
        backends = [backend for backend in GPU_BACKENDS if name in BACKENDS[backend].kernels]
        for dtype in DTYPES:
            for backend in backends:
                for architecture, row in rows(OPS[name], dtype, backend, architectures):
                    found[architecture].append(row)
    parts = []
    for architecture, lines in found.items():
        cells = [HEADS, ["---"] * len(HEADS), *(["–" if cell is None else str(cell) for cell in row] for row in lines)]
        text = "\n".join(f"| {' | '.join(row)} |" for row in cells)
        parts.append(f"## {architecture}\n\n{text}\n")
    return "\n".join(parts)


def main(argv: list[str]) -> int:
    names, architectures = [a for a in argv if a in OPS], tuple(a for a in argv if a not in OPS)
    print(INTRODUCTION)
    print(table(names, architectures or ARCHITECTURES), end="")
    return 0


INTRODUCTION = """# GPU kernels in numbers

Written by `python -m benchmarks.kernel_table`, from compiled code and from the PTX machine's counts; nothing here is
a time. Bytes, and products on tensor cores, are those of all kernels of an op's call, over what it must move (every
tensor once) and over what its formula asks for: float32 takes six products of bfloat16 each. No cache is taken away:
a tile of a product, or a weight, that several programs read counts as often. A sector is 32 bytes. Rows are few.
Of kernels of one name in a call the one with most registers is shown.

Where the kernels in CUDA C++ move more bytes than those in Triton, it is what the cache holds: layer norm asks for
weight and bias once a row, linear for the bias once a row and bias_gelu once for four rows, where Triton's programs
keep them; decode attention's parts are smaller, so that more of them are joined. Its attention of float32 multiplies
more, as a tile has 64 queries where Triton's has 32, of which causal ones see fewer keys in vain; it has three planes
of each number in shared memory, so that fewer blocks fit, and none of its registers spill.
"""

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
