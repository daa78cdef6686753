"""Every op at GPT-2's sizes against PyTorch: ``python -m benchmarks.ops [NAMES] [--dtype float32] [--json FILE]``.

Ours and PyTorch's ways alternate in one process; a kernel whose parity check fails is not timed. ``vs torch`` is the
median over rounds of PyTorch's best time over ours, with the tenth and ninetieth percentile; ``limit`` the share of
what this machine could do, measured in the same rounds where memory is the limit.
"""

import argparse
import functools
import sys

import torch

from gpt2fast.op import Op
from gpt2fast.testing import assert_parity

from . import cases, peak
from .output import JSON_HELP, json_file, write
from .table import markdown, show
from .timing import alternate, keep_freed_memory, ratios, summarise

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEADER = [
    "op",
    "case",
    "dtype",
    "cache",
    "ours µs",
    "±%",
    "GB/s",
    "GFLOP/s",
    "limit",
    "fused",
    "naive",
    "vs torch",
    "q10-q90",
]


def least_seconds(moved: tuple[int, int], flops: float, pace: dict[str, float], rate: str, cached: bool):
    """The roofline: the least time of a call and what limits it. In cache memory is no limit that we measure.

    As much reading as there is writing goes at the pace of a copy, the rest of the reading at that of reading alone.
    """
    read, written = moved
    memory = 0.0
    if not cached:
        memory = 2 * written / pace["copy"] + max(read - written, 0) / pace["read"]
        memory = min(memory, (read + written) / pace["copy"]) if written > read else memory
    compute = flops / pace[rate]
    return (memory, "copy" if 2 * written > read else "read") if memory >= compute else (compute, rate)


def bench_case(op: Op, case: dict, dtype: torch.dtype, measured: dict[str, float], probe, seconds: float) -> dict:
    """One row: times, ratios and shares of a case; or the reason why it was not timed."""
    row = dict(op=op.name, case=case, label=cases.describe(case), dtype=str(dtype).removeprefix("torch."))
    try:
        assert_parity(op, case, dtype)
    except (AssertionError, RuntimeError, ValueError, TypeError) as failure:
        return row | dict(failed=str(failure))
    with torch.inference_mode():
        sets, outside = cases.inputs(op, case, dtype)
        functions = dict(ours=op) | cases.rivals(op, case)
        contenders = {
            name: [functools.partial(function, *args) for args in sets] for name, function in functions.items()
        }
        probes = dict(read=lambda: probe("read"), copy=probe.copy) if outside else {}
        times = alternate(contenders, probes, seconds)
        moved = cases.nbytes(op, dict(zip(op.signature.parameters, sets[0])))
    flops = op.flops(case) if op.flops else 0
    rate = "dot" if op.autocast == "lower" and dtype == torch.bfloat16 else "fma"
    found = {name: summarise(times[name]) for name in contenders}
    best = min((n for n in found if n != "ours"), key=lambda n: found[n]["median"])
    paces = [measured | dict(zip(probes, p)) for p in zip(*(times[n] for n in probes))] or [measured] * len(
        times["ours"]
    )
    bounds = [least_seconds(moved, flops, pace, rate, not outside) for pace in paces]
    share = summarise([least / ours for (least, _), ours in zip(bounds, times["ours"])])
    torch_share = summarise([least / theirs for (least, _), theirs in zip(bounds, times[best])])
    ours = found["ours"]["median"]
    return row | dict(
        seconds=found,
        best=best,
        outside_cache=outside,
        sets=len(sets),
        read=moved[0],
        written=moved[1],
        flops=flops,
        bytes_per_second=sum(moved) / ours,
        flops_per_second=flops / ours,
        bound=bounds[0][1],
        pace={name: summarise(times[name]) for name in probes},
        share=share,
        torch_share=torch_share,
        ratio=ratios(times[best], times["ours"]),
        ratios={name: ratios(times[name], times["ours"]) for name in found if name != "ours"},
    )


def cells(row: dict) -> list[str]:
    """The row of the table."""
    first = [row["op"], row["label"], row["dtype"].replace("float", "f")]
    if "failed" in row:
        return [*first, *[""] * 7, "", "FAILED", "parity"]
    ours, ratio = row["seconds"]["ours"], row["ratio"]
    memory = row["outside_cache"] or row["bound"] not in ("read", "copy")
    spread = 50 * (ours["q90"] - ours["q10"]) / ours["median"]
    naive = row["ratios"].get("naive")
    fused = row["ratios"].get("fused")
    return [
        *first,
        "out" if row["outside_cache"] else "in",
        f"{1e6 * ours['median']:.4g}",
        f"{spread:.0f}",
        f"{row['bytes_per_second'] / 1e9:.1f}",
        f"{row['flops_per_second'] / 1e9:.1f}",
        f"{100 * row['share']['median']:.0f}% {row['bound']}" if memory else "",
        f"{fused['median']:.2f}" if fused else "",
        f"{naive['median']:.2f}" if naive else "",
        f"{ratio['median']:.2f}x",
        f"{ratio['q10']:.2f}-{ratio['q90']:.2f}",
    ]


def run(names: list[str], dtypes: list[str], quick: bool = False, keep_freed: bool = False, each=None) -> dict:
    """All rows, with the machine and its limits; ``each(found)`` is called after every row."""
    chosen = cases.bench_ops(names)
    torch.use_deterministic_algorithms(False)  # or torch.empty would fill memory
    kept = keep_freed and keep_freed_memory()
    threads = torch.get_num_threads()
    peaks = peak.measure(threads, quick=quick or bool(names))
    probe = peak.Probe(huge=True, nbytes=peak.ARRAY // (4 if quick else 2))
    measured = peak.limits(peaks, threads)
    found = dict(kind="ops", machine=peak.machine() | dict(freed_memory_kept=kept), peaks=peaks, rows=[])
    for op in chosen:
        for case in cases.bench_cases(op):
            for name in dtypes:
                if DTYPES[name] in op.dtypes:
                    found["rows"].append(bench_case(op, case, DTYPES[name], measured, probe, 0.15 if quick else 0.6))
                    if each:
                        each(found)
    return found


def parse_dtypes(text: str) -> list[str]:
    found = text.split(",")
    if wrong := [name for name in found if name not in DTYPES]:
        raise argparse.ArgumentTypeError(f"dtype must be one of {', '.join(DTYPES)}, got {wrong[0]!r}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="OP", help="ops by name (default: all that have a kernel)")
    parser.add_argument("--dtype", type=parse_dtypes, default=list(DTYPES), metavar="A,B", help="float32,bfloat16")
    parser.add_argument("--json", type=json_file, nargs="?", const="-", metavar="FILE", help=JSON_HELP)
    parser.add_argument("--threads", type=int, default=None, help="default: torch's")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--keep-freed-memory", action="store_true", help="no page faults on either side: kernels alone")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)

    def each(found: dict) -> None:
        if args.json != "-":
            print(*cells(found["rows"][-1]), sep="  ", file=sys.stderr, flush=True)
            write(found, args.json)  # so that an interrupted run leaves what it has

    found = run(args.names, args.dtype, args.quick, args.keep_freed_memory, each)
    if args.json == "-":
        write(found, "-")
    if args.json != "-":
        threads = str(found["machine"]["threads"])
        limits = peak.limits(found["peaks"], int(threads))
        title = f"{found['machine']['cpu']}, {found['machine']['isa']}, {threads} threads: " + ", ".join(
            f"{name} {value / 1e9:.0f} G{'B/s' if name in ('read', 'copy') else 'FLOP/s'}"
            for name, value in limits.items()
        )
        rows = [cells(row) for row in found["rows"]]
        if args.markdown:
            print(f"{title}\n\n{markdown(HEADER, rows, 4)}\n\n{markdown(*peak.table(found['peaks']))}")
        else:
            show(HEADER, rows, title, 4)
            show(*peak.table(found["peaks"]), title="This machine's limits")
        for row in found["rows"]:
            if "failed" in row:
                print(f"{row['op']} {row['label']} {row['dtype']}: {row['failed']}")
    return int(any("failed" in row for row in found["rows"]))


if __name__ == "__main__":
    sys.exit(main())
