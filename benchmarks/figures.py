"""The figures that gpt2fast promises, and whether results hold them: ``python -m benchmarks.figures FILE.json``.

This is for people who work on gpt2fast. A user's report has no such rows.
"""

import argparse
import sys

GELU, CROSS_ENTROPY, BANDWIDTH = 8.0, 5.0, 0.85


def of_ops(rows: list[dict]) -> list[tuple[str, str, bool]]:
    """(figure, what was found, whether the promise is kept) for rows of benchmarks.ops."""
    timed = [row for row in rows if "failed" not in row]
    found = [(f"{_name(row)}: parity", "FAILED", False) for row in rows if "failed" in row]
    for row in timed:
        ratio = row["ratio"]["median"]
        least = 1.0
        if (
            row["op"] == "gelu"
            and row["case"].get("approximate") == "tanh"
            and row["dtype"] == "float32"
            and row["outside_cache"]
        ):
            least = GELU
        if row["op"] == "cross_entropy" and row["case"].get("R", 0) >= 1024:
            least = CROSS_ENTROPY
        found.append((f"{_name(row)}: at least {least:g} x PyTorch", f"{ratio:.2f} x", ratio >= least))
        if row["op"] in ("add_layer_norm", "bias_gelu") and row["outside_cache"] and "share" in row:
            share = row["share"]["median"]
            goal = f"{_name(row)}: at least {BANDWIDTH:.0%} of the read+write bandwidth"
            found.append((goal, f"{share:.0%}", share >= BANDWIDTH))
    return found


def of_model(results: dict) -> list[tuple[str, str, bool]]:
    """The same for results of benchmarks.generate."""
    found = []
    for row in results["rows"]:
        name = f"{row['what']} {row['case']} {row['dtype']}"
        if "failed" in row:
            found.append((f"{name}: parity", "FAILED", False))
            continue
        if row["what"] == "training step":  # no figure is promised for it
            continue
        for peer, ratio in row["ratio"].items():
            least = 1.2 if row["what"] == "prefill" else 2.0
            if row["what"] == "prefill" or (row["dtype"] == "float32" and row["case"].startswith("1x")):
                median = ratio["median"]
                found.append((f"{name}: {peer} at least {least:g} x transformers", f"{median:.2f} x", median >= least))
        share = row.get("share", {}).get("native", {}).get("median")
        if share and row["dtype"] == "float32" and row["case"].startswith("1x"):
            found.append((f"{name}: native at least 70% of the read bandwidth", f"{share:.0%}", share >= 0.7))
    if fresh := results.get("fresh"):
        memory, start = fresh["memory"], fresh["start"]
        found.append(("native memory at most 1.15 x the weights", f"{memory:.3f} x", memory <= 1.15))
        found.append(("start to first token at most 1.5 x import torch", f"{start:.2f} x", start <= 1.5))
    return found


def _name(row: dict) -> str:
    return f"{row['op']} {row['label']} {row['dtype']}"


def main(argv: list[str] | None = None) -> int:
    """Prints the figures of the files' results. The exit status is 1 if one of them does not hold."""
    from . import report
    from .table import show

    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", help="JSON of benchmarks.ops and benchmarks.generate")
    args = parser.parse_args(argv)
    try:
        found = report.read(args.results)
    except ValueError as error:
        parser.error(str(error))
    if not {"ops", "generate"} & set(found):
        parser.error(f"results must be of kind ops or generate, got {', '.join(found)}")
    checked = of_ops(found["ops"]["rows"]) if "ops" in found else []
    checked += of_model(found["generate"]) if "generate" in found else []
    rows = [[figure, value, "yes" if holds else "NO"] for figure, value, holds in checked]
    show(["figure", "found", "holds"], rows, "Figures", 1)
    return int(not all(holds for _, _, holds in checked))


if __name__ == "__main__":
    sys.exit(main())
