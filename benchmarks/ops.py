"""Every op at GPT-2's sizes against PyTorch: ``gpt2fast bench [NAMES] [--mode bwd] [--dtype float32] [--json FILE]``.

Our way and PyTorch's ways alternate in one process. A kernel that fails its parity check is not timed. ``vs torch`` is
PyTorch's best time over ours: the median over rounds, with the tenth and the ninetieth percentile. ``limit`` is our
share of what this machine could do. Where memory is the limit, it is measured in the same rounds.
"""

import contextlib
import csv
import sys

import torch

from gpt2fast import backends
from gpt2fast.dtypes import dtype_name
from gpt2fast.op import Op
from gpt2fast.testing import cpu_isa
from gpt2fast.testing.packages import import_modules

from . import cases, compare, modes, options, peak, report
from .options import ALL_DTYPES, METRICS
from .output import origin, write
from .table import markdown, show
from .timing import alternate, keep_freed_memory, ratios, summarise
from .work import Work, peak_bytes, work_of

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
    "MB",
    "fused",
    "naive",
    "vs torch",
    "q10-q90",
]


def least_seconds(moved: tuple[int, int], flops: float, pace: dict[str, float], rate: str, cached: bool):
    """The roofline: the least time of a call, and what limits it. For data in a cache, we measure no limit of memory.

    As many bytes of reading as are written go at the speed of a copy; the rest goes at the speed of reading alone.
    """
    read, written = moved
    memory = 0.0
    if not cached:
        memory = 2 * written / pace["copy"] + max(read - written, 0) / pace["read"]
        memory = min(memory, (read + written) / pace["copy"]) if written > read else memory
    compute = flops / pace[rate]
    return (memory, "copy" if 2 * written > read else "read") if memory >= compute else (compute, rate)


def bench_case(
    op: Op, case: dict, dtype: torch.dtype, measured: dict[str, float], probe, seconds: float, mode: str = "fwd",
    baselines: list[str] | None = None,
) -> dict:  # fmt: skip
    """One row: the times, ratios, shares and memory of a case, or the reason why it was not timed."""
    row = dict(op=op.name, case=case, label=cases.describe(case), dtype=dtype_name(dtype), mode=mode)
    try:
        modes.assert_right(op, case, dtype, mode)
    except (AssertionError, RuntimeError, ValueError, TypeError) as failure:
        return row | dict(failed=str(failure))
    row["not_compared"] = {}
    with torch.inference_mode() if mode == "fwd" else contextlib.nullcontext():
        sets, outside = cases.inputs(op, case, dtype)
        contenders = dict(ours=[modes.prepared(op, op, args, mode) for args in sets])
        ways = modes.ways(op, case, baselines)
        row["not_compared"] |= {name: "the op has none" for name in baselines or () if name not in ways}
        for name, function in ways.items():
            try:
                contenders[name] = [modes.prepared(op, function, args, mode) for args in sets]
            except RuntimeError as error:
                row["not_compared"][name] = str(error).split("\n")[0]
        if len(contenders) == 1:
            return row | dict(failed=f"nothing to compare with: {row['not_compared'] or 'no baseline'}")
        probes = dict(read=lambda: probe("read"), copy=probe.copy) if outside else {}
        times = alternate(contenders, probes, seconds)
        memory = {name: peak_bytes(calls[0]) for name, calls in contenders.items()}
        work = work_of(op, case, dict(zip(op.signature.parameters, sets[0])), mode)
    found = {name: summarise(times[name]) for name in contenders}
    best = min((n for n in found if n != "ours"), key=lambda n: found[n]["median"])
    row |= dict(
        seconds=found,
        rounds={name: [float(f"{t:.5g}") for t in times[name]] for name in contenders},
        best=best,
        outside_cache=outside,
        sets=len(sets),
        memory=memory,
        ratio=ratios(times[best], times["ours"]),
        ratios={name: ratios(times[name], times["ours"]) for name in found if name != "ours"},
    )
    return row | _shares(op, dtype, measured, times, list(probes), work, best, outside)


def _shares(op, dtype, measured, times, probes, work: Work, best, outside) -> dict:
    """The bytes and operations of a case, also per second, and how near our way came to the machine's limit."""
    flops, moved = work.flops, (work.read, work.written)
    rate = "dot" if op.autocast == "lower" and dtype == torch.bfloat16 else "fma"
    paces = [measured | dict(zip(probes, p)) for p in zip(*(times[n] for n in probes))] or [measured] * len(
        times["ours"]
    )
    bounds = [least_seconds(moved, flops, pace, rate, not outside) for pace in paces]
    share = summarise([least / ours for (least, _), ours in zip(bounds, times["ours"])])
    torch_share = summarise([least / theirs for (least, _), theirs in zip(bounds, times[best])])
    ours = summarise(times["ours"])["median"]
    return dict(
        read=moved[0],
        written=moved[1],
        flops=flops,
        bytes_per_second=sum(moved) / ours,
        flops_per_second=flops / ours,
        bound=bounds[0][1],
        pace={name: summarise(times[name]) for name in probes},
        share=share,
        torch_share=torch_share,
    )


def cells(row: dict) -> list[str]:
    """The row of the table."""
    first = [row["op"], row["label"], row["dtype"].replace("float", "f")]
    if "failed" in row:
        return [*first, *[""] * (len(HEADER) - 5), "FAILED", "parity"]
    ours, ratio = row["seconds"]["ours"], row["ratio"]
    limited = row["outside_cache"] or row["bound"] not in ("read", "copy")
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
        f"{100 * row['share']['median']:.0f}% {row['bound']}" if limited else "",
        f"{row['memory']['ours'] / 1e6:.3g}",
        f"{fused['median']:.2f}" if fused else "",
        f"{naive['median']:.2f}" if naive else "",
        f"{ratio['median']:.2f}x",
        f"{ratio['q10']:.2f}-{ratio['q90']:.2f}",
    ]


def run(
    names: list[str], dtypes: list[str], quick: bool = False, keep_freed: bool = False, each=None, mode: str = "fwd",
    baselines: list[str] | None = None, shapes: list[dict] | None = None, made_by: dict | None = None,
) -> dict:  # fmt: skip
    """All rows, with the machine and its limits. ``each(found)`` is called after every row."""
    chosen = cases.bench_ops(names)
    if mode != "fwd":
        chosen = _differentiable(chosen, names)
    torch.use_deterministic_algorithms(False)  # otherwise torch.empty would fill memory
    kept = keep_freed and keep_freed_memory()
    threads = torch.get_num_threads()
    peaks = peak.measure(threads, quick=quick or bool(names))
    probe = peak.Probe(huge=True, nbytes=peak.ARRAY // (4 if quick else 2))
    measured = peak.limits(peaks, threads)
    found = dict(
        kind="ops", made_by=made_by, machine=peak.machine() | dict(freed_memory_kept=kept), peaks=peaks, rows=[]
    )
    seconds = 0.15 if quick else 0.6
    for op in chosen:
        for case in shapes or cases.bench_cases(op):
            for name in dtypes:
                if ALL_DTYPES[name] in op.dtypes:
                    row = bench_case(op, case, ALL_DTYPES[name], measured, probe, seconds, mode, baselines)
                    found["rows"].append(row)
                    if each:
                        each(found)
    return found


def _differentiable(chosen: list[Op], names: list[str]) -> list[Op]:
    """The ops that have a derivative. Raises ValueError if an op that was named has none."""
    for op in chosen:
        if names and not op.has_derivative:
            raise ValueError(f"gpt2fast bench: --mode must be fwd for {op.name}, which has no derivative")
    return [op for op in chosen if op.has_derivative]


def main(argv: list[str] | None = None) -> int:
    args = options.parser().parse_args(argv)
    if args.out:
        args.json, args.csv = args.json or str(args.out / "ops.json"), args.csv or str(args.out / "ops.csv")
        args.report = args.report or str(args.out / "report.html")
    before = compare.read(args.compare) if args.compare else None
    if args.shapes and not args.names:
        raise ValueError("gpt2fast bench: --shapes must come with the names of ops, got none")
    import_modules(args.modules)
    threads = torch.get_num_threads()
    if args.threads:
        torch.set_num_threads(args.threads)

    def each(found: dict) -> None:
        if args.json != "-":
            print(*cells(found["rows"][-1]), sep="  ", file=sys.stderr, flush=True)
            write(found, args.json)  # so that an interrupted run leaves its rows

    try:
        with contextlib.ExitStack() as chosen:
            if args.isa:
                chosen.enter_context(cpu_isa(args.isa))
            if args.backend:
                chosen.enter_context(backends.use_backend(args.backend))
            found = run(
                args.names, args.dtype, args.quick, args.keep_freed_memory, each, args.mode, args.baselines,
                args.shapes, origin("gpt2fast bench", argv),
            )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    if args.csv:
        write_csv(found, args.csv)
    if args.report:
        report.write_page(dict(ops=found), args.report)
    if args.json == "-":
        write(found, "-")
    else:
        print_tables(found, args.metrics, args.markdown)
        if before is not None:
            changes = compare.compare(before, found)
            title = f"Since {args.compare}: {len(changes)} rows that both have"
            rows = [compare.cells(row) for row in changes]
            if args.markdown:
                print(f"\n{title}\n\n{markdown(compare.HEADER, rows, 4)}")
            else:
                show(compare.HEADER, rows, title, 4)
    return int(any("failed" in row for row in found["rows"]))


def print_tables(found: dict, metrics: list[str], as_markdown: bool) -> None:
    """Prints the rows and the machine's limits and then, row by row, what failed and what could not be compared."""
    threads = str(found["machine"]["threads"])
    limits = peak.limits(found["peaks"], int(threads))
    title = f"{found['machine']['cpu']}, {found['machine']['isa']}, {threads} threads: " + ", ".join(
        f"{name} {value / 1e9:.0f} G{'B/s' if name in ('read', 'copy') else 'FLOP/s'}" for name, value in limits.items()
    )
    hidden = {column for name, columns in METRICS.items() if name not in metrics for column in columns}
    keep = [i for i, column in enumerate(HEADER) if column not in hidden]
    header, *rows = ([row[i] for i in keep] for row in (HEADER, *map(cells, found["rows"])))
    if as_markdown:
        print(f"{title}\n\n{markdown(header, rows, 4)}\n\n{markdown(*peak.table(found['peaks']))}")
    else:
        show(header, rows, title, 4)
        show(*peak.table(found["peaks"]), title="This machine's limits")
    for row in found["rows"]:
        if "failed" in row:
            print(f"{row['op']} {row['label']} {row['dtype']}: {row['failed']}")
        for name, why in row.get("not_compared", {}).items():
            print(f"{row['op']} {row['label']} {row['dtype']}: not compared with {name}: {why}")


def write_csv(found: dict, path: str) -> None:
    """Writes a line for each row: seconds of every way, ratios to ours, bytes and operations per second. ``-`` is the
    terminal."""
    ways = list(dict.fromkeys(name for row in found["rows"] for name in row.get("seconds", {})))
    lines = []
    for row in found["rows"]:
        line = {name: row.get(name, "") for name in ("op", "label", "dtype", "mode", "failed")}
        line |= {f"bytes held by {name}": row.get("memory", {}).get(name, "") for name in ways}
        line |= {f"seconds {name}": row.get("seconds", {}).get(name, {}).get("median", "") for name in ways}
        line |= {f"ratio {name}": row.get("ratios", {}).get(name, {}).get("median", "") for name in ways[1:]}
        line |= {name: row.get(name, "") for name in ("bytes_per_second", "flops_per_second")}
        lines.append(line | dict(share=row.get("share", {}).get("median", "")))
    with contextlib.nullcontext(sys.stdout) if path == "-" else open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(lines[0]) if lines else [])
        table.writeheader()
        table.writerows(lines)


if __name__ == "__main__":
    sys.exit(main())
