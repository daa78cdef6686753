"""This machine's limits: ``python -m benchmarks.peak [--json] [--quick]``.

The limits are the bandwidth of reading, the bandwidth of copying (bytes read plus bytes written) with plain and with
streaming stores, both on 4 KiB and on 2 MiB pages, and the rates of float32 multiply-adds and bfloat16 pair products in
registers. All are measured on one thread and on all threads.
"""

import argparse
import json
import mmap
import platform
import statistics
import sys

import torch
from torch import Tensor

from gpt2fast import backends
from gpt2fast.cli import gather_info

from .table import show

ARRAY = 256 << 20  # bytes; far larger than a usual last-level cache
PAGES = {"4 KiB": False, "2 MiB": True}
BANDWIDTHS = ("read", "copy", "stream")
RATES = {"fma": "float32 multiply-add", "dot": "bfloat16 pair product"}
STEPS = 2_000_000


def extension():
    """gpt2fast._C. Raises RuntimeError, which says why, if it is not there."""
    if backends._C is None:
        raise RuntimeError(f"gpt2fast: peaks are measured by the C++ extension: {backends.status()['cpu']}")
    return backends._C


def array(nbytes: int, huge: bool) -> Tensor:
    """Float32 zeros on pages of one size. All pages have been touched."""
    if huge:
        memory = extension().huge_empty(nbytes)
    else:
        mapping = mmap.mmap(-1, nbytes)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            mapping.madvise(mmap.MADV_NOHUGEPAGE)
        memory = torch.frombuffer(mapping, dtype=torch.uint8)
    return memory.view(torch.float32).zero_()


class Probe:
    """Two arrays on pages of one size. ``probe(what)`` is one measurement, in bytes per second."""

    def __init__(self, huge: bool, nbytes: int):
        self.x, self.y = array(nbytes, huge), array(nbytes, huge)

    def __call__(self, what: str) -> float:
        seconds, moved = extension().measure_peak(what, self.x, self.y)
        return moved / seconds

    def copy(self) -> float:
        """The bandwidth of a copy, by the faster of the two kinds of stores."""
        return max(self("copy"), self("stream"))


def rate(what: str, repeats: int = 3) -> float:
    """Operations per second in registers, by all threads."""
    x = torch.full((1 << 16,), 0.5)
    runs = (extension().measure_peak(what, x, None, STEPS) for _ in range(repeats + 1))
    return statistics.median([operations / seconds for seconds, operations in runs][1:])


def measure(threads: int | None = None, quick: bool = False) -> dict:
    """The limits by number of threads: bandwidths (``read 4 KiB`` ...) in bytes, rates in operations, per second."""
    before = torch.get_num_threads()
    found: dict[str, dict[str, float]] = {}
    probes = {pages: Probe(huge, ARRAY // 2 if quick else ARRAY) for pages, huge in PAGES.items()}
    try:
        for n in sorted({1, threads or before}) if not quick else [threads or before]:
            torch.set_num_threads(n)
            row = found[str(n)] = {}
            for what in BANDWIDTHS:
                for pages, probe in probes.items():
                    probe(what)
                    row[f"{what} {pages}"] = statistics.median([probe(what) for _ in range(3 if quick else 7)])
            row |= {what: rate(what) for what in RATES}
    finally:
        torch.set_num_threads(before)
    return found


def limits(measured: dict, threads: int) -> dict[str, float]:
    """What shares refer to: the best read and copy bandwidth of the two page sizes and both rates, by all threads."""
    row = measured[str(threads)]
    read = max(row[f"read {pages}"] for pages in PAGES)
    copy = max(row[f"{what} {pages}"] for what in ("copy", "stream") for pages in PAGES)
    return dict(read=read, copy=copy, fma=row["fma"], dot=row["dot"])


def machine() -> dict:
    """What a reader must know about the machine that the figures come from."""
    return dict(
        cpu=gather_info()["machine"]["cpu"],
        isa=backends.isa(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
    )


def table(measured: dict) -> tuple[list[str], list[list[str]]]:
    """The header and the rows: a row for each limit, and a column for each number of threads."""
    names = {**{f"{w} {p}": f"{w}, {p} pages (GB/s)" for w in BANDWIDTHS for p in PAGES},
             **{w: f"{text} (GFLOP/s)" for w, text in RATES.items()}}  # fmt: skip
    rows = [[label, *(f"{row[name] / 1e9:.1f}" for row in measured.values())] for name, label in names.items()]
    return ["limit", *(f"{n} thread{'s' if n != '1' else ''}" for n in measured)], rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peak", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--threads", type=int, default=None, help="the most threads (default: torch's)")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, all threads only")
    args = parser.parse_args(argv)
    found = measure(args.threads, args.quick)
    if args.json:
        print(json.dumps(dict(machine=machine(), peaks=found)))
        return 0
    show(*table(found), title=f"{backends.isa()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
