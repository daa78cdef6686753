"""The results of runs as one page: ``python -m benchmarks.report FILE.json ... [--out FOLDER | --report FILE.html]``.

The files are what benchmarks.ops, generate, parity and gpu wrote, and what gpt2fast check --json printed. The page has
a section for each kind. It also has the counts of GPU kernels, which are shipped in kernels.json. ``write_page`` does
the same as a function.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import kernel_page, output, page, page_gpu, page_tables
from .page_tables import Table
from .table import markdown

KINDS = dict(ops=("machine", "peaks", "rows"), generate=("machine", "peaks", "rows"), parity=("machine", "rows"),
             gpu=("stages",), check=("ops",))  # fmt: skip
WRITERS = "benchmarks.ops, benchmarks.generate, benchmarks.parity, benchmarks.gpu or gpt2fast check --json"


def read_file(path: str | Path) -> dict:
    """The results of one file. The ValueError names the file, what was expected and what the file has."""
    wanted = f"gpt2fast report: {path}: expected JSON written by {WRITERS}"
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{wanted}, got no file to read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{wanted}, got text that is no JSON: {error}") from error
    if not isinstance(results, dict):
        raise ValueError(f"{wanted}, got a {type(results).__name__}")
    if "kind" not in results and results and all(map(is_check, results.values())):
        results = dict(kind="check", ops=results)
    kind = results.get("kind")
    if kind not in KINDS:
        keys = ", ".join(list(results)[:6])
        raise ValueError(f"{wanted}, of kind {', '.join(KINDS)}; got kind {kind!r} and the keys {keys or 'none'}")
    if missing := [key for key in KINDS[kind] if key not in results]:
        raise ValueError(f"{wanted}, of kind {kind!r} with {', '.join(KINDS[kind])}; got none of {', '.join(missing)}")
    return results


def is_check(rows: object) -> bool:
    """Whether these are the rows of an op as ``gpt2fast check --json`` prints them."""
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) and "error" in row for row in rows)


def read(paths: Sequence[str | Path]) -> dict[str, dict]:
    """Results by kind; rows of several files of one kind are joined. Raises ValueError for files of two machines."""
    found: dict[str, dict] = {}
    first: dict[str, str | Path] = {}
    for path in paths:
        results = read_file(path)
        kind = results["kind"]
        if kind in found:
            if kind in ("gpu", "check") or results["machine"] != found[kind]["machine"]:
                raise ValueError(
                    f"gpt2fast report: {path}: expected one run of kind {kind!r} a page, or several of one machine and "
                    f"setting; got another beside {first[kind]}: write a page for each"
                )
            results = joined(found[kind], results)
        found[kind], first[kind] = results, path
    return found


def joined(one: dict, other: dict) -> dict:
    """Joins two runs of one machine: the rows of both, and the higher value of each limit."""
    both = one | other | dict(rows=one["rows"] + other["rows"])
    if "peaks" in one and "peaks" in other:
        both["peaks"] = {
            threads: {
                name: max(run["peaks"][threads][name] for run in (one, other) if threads in run["peaks"])
                for name in next(run["peaks"][threads] for run in (one, other) if threads in run["peaks"])
            }
            for threads in one["peaks"] | other["peaks"]
        }
    return both


def kernel_tables(path: Path | None) -> list[Table]:
    return page_tables.of_kernels(path) if path is not None else []


def write_page(results: Mapping[str, dict] | Sequence[str | Path], path: str | Path,
               kernels: Path | None = kernel_page.COUNTS) -> None:  # fmt: skip
    """Writes the page, one HTML file that needs no other file.

    ``results``: paths of JSON files, or what they hold by kind ("ops", "generate", "parity", "check", "gpu").
    ``kernels``: the counts that benchmarks.kernel_table wrote; with None the page has no such section.
    Raises ValueError for a file that has no results or no counts.
    """
    found = dict(results) if isinstance(results, Mapping) else read(results)
    if not found or (unknown := [kind for kind in found if kind not in KINDS]):
        got = repr(unknown[0]) if found else "none"
        raise ValueError(f"gpt2fast report: results must be of kind {', '.join(KINDS)}, got {got}")
    Path(path).write_text(page.to_html(found, kernel_tables(kernels)), encoding="utf-8")


def tables(found: Mapping[str, dict]) -> list[Table]:
    """All tables of measured results."""
    made = []
    if "ops" in found:
        made.append(page_tables.of_ops(found["ops"]))
    if "parity" in found:
        made.append(page_tables.of_parity(found["parity"]))
    if "check" in found:
        made.append(page_tables.of_check(found["check"]))
    if "generate" in found:
        made.append(page_tables.of_model(found["generate"]))
        made += [page_tables.of_fresh(found["generate"]["fresh"])] if found["generate"].get("fresh") else []
    if "gpu" in found:
        made += page_gpu.tables(found["gpu"])
    for results in [found[kind] for kind in ("ops", "generate") if kind in found][:1]:
        rows = [page_tables.Row(list(pair)) for pair in page_tables.of_limits(results)]
        made.append(Table("This machine's limits", ["limit", "measured"], rows))
    return made


def one_line(cell: str) -> str:
    first, _, second = cell.replace("|", "\\|").partition("\n")
    return f"{first} ({second})" if second else first


def to_markdown(found: Mapping[str, dict]) -> str:
    parts = []
    for table in tables(found):
        cells = [[one_line(cell) for cell in row.cells] for row in table.rows]
        parts.append(f"## {table.title}\n\n{markdown(table.header, cells, table.texts)}")
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", help=f"JSON of {WRITERS}")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=output.folder, metavar="FOLDER", help="default: that of the first file")
    where.add_argument("--report", type=output.json_file, metavar="FILE.html", help="the page's own path")
    where.add_argument("--markdown", action="store_true", help="print the tables as Markdown, write nothing")
    args = parser.parse_args(argv)
    try:
        found = read(args.results)
        if args.markdown:
            print(to_markdown(found))
            return 0
        path = Path(args.report or (args.out or Path(args.results[0]).parent) / "report.html")
        write_page(found, path)
    except ValueError as error:
        parser.error(str(error))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
