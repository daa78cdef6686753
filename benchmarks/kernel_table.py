"""What each kernel in Triton and in CUDA C++ uses of a GPU and what it moves, on each architecture.

``python -m benchmarks.kernel_table > docs/kernels.md`` prints the counts of kernels.json. With ``--count`` it counts
all kernels anew first. ``python -m benchmarks.kernel_table gelu sm_90`` counts and prints only what is named.

Registers, spills and shared memory are what ptxas says of the compiled code. The PTX machine counts bytes, sectors,
bank conflicts and operations. All figures are exact and repeatable. None is a time, and no GPU is needed.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence

import torch

import gpt2fast.ops  # noqa: F401  declares them
from gpt2fast.backends import BACKENDS, use_backend
from gpt2fast.dtypes import dtype_name
from gpt2fast.op import OPS, Op
from gpt2fast.testing import ptx
from gpt2fast.testing.inputs import build, call, cut

from . import cases, kernel_page

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


def count(names: Sequence[str] = (), architectures: tuple[str, ...] = ARCHITECTURES) -> dict[str, list[list]]:
    """The rows of each architecture, for the ops named or for all that have a GPU kernel, with the backends side by
    side."""
    found: dict[str, list[list]] = {architecture: [] for architecture in architectures}
    for name in names or OPS:
        backends = [backend for backend in GPU_BACKENDS if name in BACKENDS[backend].kernels]
        for dtype in DTYPES:
            for backend in backends:
                for architecture, row in rows(OPS[name], dtype, backend, architectures):
                    found[architecture].append(row)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_table", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="OP|sm_NN", help="count these and print them, write no file")
    parser.add_argument("--count", action="store_true", help="count all kernels anew (minutes) into kernels.json first")
    args = parser.parse_args(argv)
    names = [name for name in args.names if name in OPS]
    architectures = tuple(name for name in args.names if name not in OPS)
    if wrong := [name for name in architectures if not re.fullmatch(r"sm_\d+a?", name)]:
        parser.error(f"names must be ops or architectures such as sm_90, got {wrong[0]!r}")
    if args.count and args.names:
        parser.error(f"--count counts all kernels, got also the names {', '.join(args.names)}")
    if args.names:
        print(kernel_page.to_markdown(count(names, architectures or ARCHITECTURES)), end="")
        return 0
    if args.count:
        kernel_page.write(count())
    print(kernel_page.document(kernel_page.read()), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
