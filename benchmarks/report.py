"""A picture of results: ``python -m benchmarks.report FILE.json ...`` writes report.png and report.html beside it.

Bars: how many times faster than PyTorch's best way each op is, and than transformers the model. Roofline: operations a
second over operations a byte, ours and PyTorch's, below this machine's limits. Hatches and shapes say what colours say.
"""

import argparse
import base64
import html
import io
import json
import sys
from pathlib import Path

from . import figures, generate, ops, output, peak
from .table import markdown, show

DTYPES = {
    "float32": dict(color="#1b6ca8", hatch="", marker="o"),
    "bfloat16": dict(color="#e9a23b", hatch="///", marker="s"),
}
MISSING = dict(color="0.75", hatch="xx")


def read(paths: list[str]) -> dict[str, dict]:
    """Results by kind ("ops", "generate"), the rows of several files joined."""
    found: dict[str, dict] = {}
    for path in paths:
        results = json.loads(Path(path).read_text())
        if results.get("kind") not in ("ops", "generate"):
            raise ValueError(f"{path}: expected results of benchmarks.ops or benchmarks.generate")
        kind = results["kind"]
        if kind in found:
            results["rows"] = found[kind]["rows"] + results["rows"]
            results = found[kind] | results
        found[kind] = results
    return found


def draw_bars(ax, rows: list[tuple[str, str, dict | None]], title: str) -> None:
    """Rows (label, dtype, ratio with its spread or None where it failed), on a logarithmic axis that starts at 1."""
    for i, (_, dtype, ratio) in enumerate(rows):
        style = DTYPES[dtype] if ratio else MISSING
        width = ratio["median"] if ratio else 1.0
        ax.barh(i, width - 1, left=1, color=style["color"], hatch=style["hatch"], edgecolor="black", linewidth=0.6)
        text = f" {width:.2f}x " if ratio else " failed parity "
        end = max(width, ratio["q90"], 1.0) if ratio else 1.0
        if ratio:
            ax.plot([ratio["q10"], ratio["q90"]], [i, i], color="black", linewidth=1.2, marker="|", markersize=5)
        ax.text(end, i, text, va="center", ha="left", fontsize=7)
    low = min([r["q10"] for _, _, r in rows if r], default=1)
    high = max([r["q90"] for _, _, r in rows if r], default=1)
    ax.set_xscale("log")
    ax.set_xlim(min(low * 0.8, 0.8), max(high, 2) * 2)
    ticks = [t for t in (0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if ax.get_xlim()[0] < t < ax.get_xlim()[1]]
    ax.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    ax.minorticks_off()
    ax.axvline(1, color="black", linewidth=1)
    ax.set_yticks(range(len(rows)), [f"{label}  {'f32' if dtype == 'float32' else 'bf16'}" for label, dtype, _ in rows])
    ax.tick_params(axis="y", labelsize=7)
    ax.invert_yaxis()
    ax.margins(y=0.01)
    ax.set_title(title, fontsize=10, loc="left")
    ax.grid(axis="x", color="0.9")
    ax.set_axisbelow(True)


def draw_roofline(ax, results: dict) -> None:
    """Filled: ours. Hollow: PyTorch's best. A line joins the two of a case.

    The roof is the best bandwidth of the run, before it and between the rounds: on a shared machine it comes and goes.
    """
    limit = peak.limits(results["peaks"], results["machine"]["threads"])
    rows = [row for row in results["rows"] if "failed" not in row and row["outside_cache"] and row["flops"]]
    memory = max(limit["read"], limit["copy"], *(p["q90"] for row in rows for p in row["pace"].values()))
    intensity = [row["flops"] / (row["read"] + row["written"]) for row in rows]
    top = max(limit["fma"], limit["dot"])
    low, high = min(intensity, default=0.1) / 3, 3 * max([*intensity, top / memory])
    for name, style in (("fma", "-"), ("dot", "--")):
        knee = limit[name] / memory
        label = {"fma": "float32 multiply-add", "dot": "bfloat16 pair product"}[name]
        ax.plot([knee, high], [limit[name] / 1e9] * 2, style, color="black", linewidth=1.4)
        ax.text(
            high, limit[name] / 1e9, f"{label}: {limit[name] / 1e9:.0f} GFLOP/s", ha="right", va="bottom", fontsize=7
        )
    ax.plot([low, top / memory], [low * memory / 1e9, top / 1e9], "-", color="black", linewidth=1.4)
    ax.text(low * 1.1, low * memory / 1e9 * 2, f"memory: {memory / 1e9:.0f} GB/s", fontsize=7, rotation=30)
    for row, x in zip(rows, intensity):
        style = DTYPES[row["dtype"]]
        ours, theirs = (row["flops"] / row["seconds"][n]["median"] / 1e9 for n in ("ours", row["best"]))
        ax.plot([x, x], [theirs, ours], color="0.6", linewidth=0.8)
        ax.plot(x, theirs, style["marker"], markerfacecolor="none", markeredgecolor=style["color"], markersize=6)
        ax.plot(x, ours, style["marker"], color=style["color"], markeredgecolor="black", markersize=6)
    for op in dict.fromkeys(row["op"] for row in rows):
        x, row = max(((x, r) for x, r in zip(intensity, rows) if r["op"] == op), key=lambda p: p[1]["flops_per_second"])
        ax.annotate(op, (x, row["flops_per_second"] / 1e9), (4, 5), textcoords="offset points", fontsize=7)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("operations a byte of tensors in and out")
    ax.set_ylabel("GFLOP/s")
    ax.grid(color="0.92")
    ax.set_title(
        "Roofline, out of cache: filled ours, hollow PyTorch's best; ● float32, ■ bfloat16", fontsize=10, loc="left"
    )


def draw(found: dict[str, dict]):
    """The figure; a panel for what there are results of."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    op_rows = [(f"{r['op']} {r['label']}", r["dtype"], r.get("ratio")) for r in found.get("ops", {}).get("rows", [])]
    model_rows = [
        (f"{name}: {r['what']} {r['case'].replace('x', ' x ')}", r["dtype"], ratio)
        for r in found.get("generate", {}).get("rows", []) for name, ratio in r["ratio"].items()
    ]  # fmt: skip
    panels = []
    if op_rows:
        panels.append(
            (0.17 * len(op_rows) + 0.9, lambda ax: draw_bars(ax, op_rows, "Ops: times faster than PyTorch's best"))
        )
    if model_rows:
        title = "GPT-2 124M: times faster than transformers (batch x prompt)"
        panels.append((0.17 * len(model_rows) + 0.9, lambda ax: draw_bars(ax, model_rows, title)))
    if op_rows:
        panels.append((4.5, lambda ax: draw_roofline(ax, found["ops"])))
    if not panels:
        raise ValueError("no rows in these results")
    heights = [height for height, _ in panels]
    figure, axes = pyplot.subplots(
        len(panels), figsize=(10, sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    for ax, (_, paint) in zip(axes[:, 0], panels):
        paint(ax)
    machine = next(iter(found.values()))["machine"]
    figure.suptitle(
        f"gpt2fast on {machine['cpu']}, {machine['isa']}, {machine['threads']} threads, torch {machine['torch']}; "
        "whiskers: 10th to 90th percentile",
        fontsize=10,
    )
    return figure


def tables(found: dict[str, dict]) -> list[tuple[str, list[str], list[list[str]], int]]:
    """(title, header, rows, text columns) of all results and figures."""
    out = []
    if "ops" in found:
        out.append(("Ops", ops.HEADER, [ops.cells(row) for row in found["ops"]["rows"]], 4))
    if "generate" in found:
        rows = [generate.cells(row) for row in found["generate"]["rows"]]
        out.append(("The whole model, tokens/s", generate.HEADER, rows, 3))
    for results in list(found.values())[:1]:
        out.append(("This machine's limits", *peak.table(results["peaks"]), 1))
    checked = [*figures.of_ops(found["ops"]["rows"])] if "ops" in found else []
    checked += figures.of_model(found["generate"]) if "generate" in found else []
    out.append(("Figures", ["figure", "found", "holds"], [[a, b, "yes" if c else "NO"] for a, b, c in checked], 1))
    return out


def to_html(found: dict[str, dict], png: bytes) -> str:
    """One file: the picture inside, then the tables."""

    def table(title, header, rows, text_columns):
        def row(values, tag):
            cells = (
                f"<{tag}{'' if i < text_columns else ' class=n'}>{html.escape(v)}</{tag}>" for i, v in enumerate(values)
            )
            return f"<tr>{''.join(cells)}</tr>"

        return f"<h2>{title}</h2><table>{row(header, 'th')}{''.join(row(r, 'td') for r in rows)}</table>"

    machine = "".join(
        f"<li>{html.escape(str(k))}: {html.escape(str(v))}</li>"
        for k, v in next(iter(found.values()))["machine"].items()
    )
    style = "body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}td,th{padding:2px 9px;text-align:left;"
    style += "border-bottom:1px solid #ddd}.n{text-align:right}img{max-width:100%}"
    picture = base64.b64encode(png).decode()
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>gpt2fast benchmarks</title><style>{style}</style>"
        f"<h1>gpt2fast benchmarks</h1><ul>{machine}</ul>"
        f'<img alt="Bars of speed-ups, and the roofline; the tables below hold every number" '
        f'src="data:image/png;base64,{picture}">{"".join(table(*t) for t in tables(found))}</html>\n'
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", help="JSON of benchmarks.ops and benchmarks.generate")
    parser.add_argument(
        "--out", type=output.folder, default=None, metavar="FOLDER", help="default: that of the first file"
    )
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown, draw nothing")
    args = parser.parse_args(argv)
    found = read(args.results)
    if args.markdown:
        print("\n\n".join(f"## {title}\n\n{markdown(h, rows, n)}" for title, h, rows, n in tables(found)))
        return 0
    title, header, rows, columns = tables(found)[-1]
    show(header, rows, title, columns)
    try:
        figure = draw(found)
    except ModuleNotFoundError as error:
        raise SystemExit(f"the picture needs matplotlib: pip install 'gpt2fast[bench]' ({error})") from error
    out = args.out or Path(args.results[0]).parent
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    (out / "report.png").write_bytes(buffer.getvalue())
    (out / "report.html").write_text(to_html(found, buffer.getvalue()), encoding="utf-8")
    print(f"{out / 'report.png'}\n{out / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
