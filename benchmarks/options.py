"""The options of ``gpt2fast bench``."""

import argparse
import json
from collections.abc import Callable

import torch

from . import modes, output

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ALL_DTYPES = DTYPES | {"float16": torch.float16}
# For each metric, the columns of the table that show it.
METRICS = dict(
    time=("ours µs", "±%"), bandwidth=("GB/s",), flops=("GFLOP/s",), limit=("limit",), memory=("MB",),
    ratio=("fused", "naive", "vs torch", "q10-q90"),
)  # fmt: skip


def parse_list(known) -> Callable[[str], list[str]]:
    """For argparse: a list of names, each one of ``known``."""

    def parse(text: str) -> list[str]:
        found = text.split(",")
        if wrong := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {wrong[0]!r}")
        return found

    return parse


def parse_shapes(text: str) -> list[dict]:
    """For argparse: converts ``B=8,T=128,C=768;B=1,T=1,C=768`` to cases. A value is a number, true, false or a word."""
    found = []
    for part in filter(None, text.split(";")):
        case = {}
        for item in part.split(","):
            name, equals, value = item.strip().partition("=")
            if not equals or not name.isidentifier():
                raise argparse.ArgumentTypeError(f"must be like B=8,T=128,C=768;B=1,T=1,C=768, got {item!r}")
            try:
                case[name] = json.loads(value)
            except ValueError:
                case[name] = value
        found.append(case)
    return found


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text!r}")
    return int(text)


def parser(prog: str = "gpt2fast bench") -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=prog, description="Every op at GPT-2's sizes against PyTorch.")
    add = made.add_argument
    add("names", nargs="*", metavar="OP", help="ops by name (default: all that have a kernel)")
    add(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this module, which declares ops, first",
    )
    add("--backend", metavar="NAME", help="run every op on this backend (see gpt2fast info)")
    add("--isa", metavar="NAME", help="run the CPU kernels of this instruction set (see gpt2fast info)")
    add("--mode", choices=modes.MODES, default="fwd", help="what is timed (default: fwd)")
    add("--dtype", type=parse_list(ALL_DTYPES), default=list(DTYPES), metavar="A,B", help=", ".join(ALL_DTYPES))
    add("--threads", type=positive, default=None, metavar="N", help="default: torch's")
    add("--shapes", type=parse_shapes, metavar="CASES", help="instead of GPT-2's: B=8,T=128,C=768;B=1,T=1,C=768")
    known = ", ".join((*modes.BASELINES, "a backend"))
    add("--baselines", type=lambda text: text.split(","), metavar="A,B", help=f"of {known} (default: fused,naive)")
    add("--metrics", type=parse_list(METRICS), default=list(METRICS), metavar="A,B", help=", ".join(METRICS))
    add("--json", type=output.json_file, nargs="?", const="-", metavar="FILE", help=output.JSON_HELP)
    add("--save", dest="json", type=output.json_file, metavar="FILE", help="the same, for --compare later")
    add("--csv", type=output.json_file, metavar="FILE", help="write a table of numbers")
    add(
        "--report", type=output.json_file, metavar="FILE", help="write a page, one file of HTML, with tables and charts"
    )
    add("--out", type=output.folder, metavar="FOLDER", help="write ops.json, ops.csv and report.html there")
    add("--compare", metavar="FILE", help="JSON of an earlier run, to compare with")
    add("--quick", action="store_true", help="fewer rounds")
    add("--keep-freed-memory", action="store_true", help="no page faults on either side: kernels alone")
    add("--markdown", action="store_true", help="print the table as Markdown")
    return made
