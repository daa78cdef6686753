"""The report as one HTML file. Style, drawings and a filter are inside, nothing is fetched, and it is complete without
JavaScript."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import page_gpu, page_tables
from .drawings import Point, Roof, Scale, axis, bar, element, hatches, roofline, symbol
from .page_tables import Bar, Table
from .units import between, number, quantity, times

HERE = Path(__file__).parent
LETTERS = (
    "Letters: B batch, T tokens in this call, S tokens visible, C width of the model, H heads, D head size, "
    "V vocabulary, R rows, K and N inputs and outputs of a linear layer."
)


@dataclass
class Section:
    name: str  # the id of the section
    title: str
    content: str


def escape(text: str) -> str:
    """A text as HTML. A long case may break at its signs, and text after a line break is small."""
    for sign in "·=":
        text = text.replace(sign, sign + "\0")
    first, _, second = html.escape(text).replace("\0", "<wbr>").partition("\n")
    return first + (f"<small>{second}</small>" if second else "")


def tags_of(tags: dict[str, str]) -> dict[str, str]:
    return {f"data_{name}": value for name, value in tags.items()}


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    inner = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{inner}</dl>'


def html_table(table: Table) -> str:
    """A table that scrolls in its own box. It has a name for screen readers, and its headers have scopes."""

    def klass(i: int) -> dict:
        wide = {"case": "case", "compared with": "rival"}.get(table.header[i])
        return dict(klass=wide) if wide else {} if i < table.texts else dict(klass="n")

    head = "".join(element("th", escape(name), scope="col", **klass(i)) for i, name in enumerate(table.header))
    body = []
    for row in table.rows:
        first = element("th", escape(row.cells[0]), scope="row")
        cells = [element("td", escape(cell), **klass(i)) for i, cell in enumerate(row.cells) if i]
        body.append(element("tr", first + "".join(cells), klass="row bad" if row.bad else "row", **tags_of(row.tags)))
    inner = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    box = element(
        "div", element("table", inner, aria_label=table.title),
        klass="scroll", tabindex=0, role="region", aria_label=f"{table.title}, table",
    )  # fmt: skip
    return group(box)


def group(content: str) -> str:
    """Content with rows, and the text that stands there if the filter hides all of them."""
    return f'<div class="group">{content}<p class="none" hidden>No row fits the filter.</p></div>'


def noted(table: Table, level: int = 2) -> str:
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return f"<h{level}>{html.escape(table.title)}</h{level}>{note}{html_table(table)}"


def html_bars(bars: Sequence[Bar], without: Sequence[str] = ()) -> str:
    """A bar for each row. The ratio stands beside it in figures, and the rival below the row's name."""
    scale = Scale.over(b.ratio for b in bars)
    items = [
        f'<li class="scale" aria-hidden="true"><span class="what"></span>{axis(scale)}<span class="value"></span></li>'
    ]
    for b in bars:
        ratio, dtype = b.ratio, b.tags["dtype"]
        what = f'<span class="what">{escape(b.name)}<small>{dtype}, against {html.escape(b.rival)}</small></span>'
        value = f'<span class="value"><b>{times(ratio["median"])}</b> <small>{between(ratio)}</small></span>'
        title = f"{number(ratio['median'])} times as fast as {b.rival}"
        items.append(element("li", what + bar(scale, ratio, dtype, title) + value, klass="row", **tags_of(b.tags)))
    names = ", ".join(without)
    left = f'<p class="note">Without a bar: {html.escape(names)}.</p>' if without else ""
    caption = (
        "The vertical line at 1 × is the rival: bars to its right are faster, to its left slower. The axis is "
        "logarithmic. The thin line goes from the 10 % to the 90 % quantile."
    )
    inner = group(f'<ul class="bars">{"".join(items)}</ul>')
    return f"{key_of_bars(bars)}<figure>{inner}<figcaption>{caption}</figcaption></figure>{left}"


def key_of_bars(bars: Sequence[Bar]) -> str:
    items = []
    for dtype in dict.fromkeys(b.tags["dtype"] for b in bars):
        shape = "".join(
            element("rect", x=0, y=1, width=24, height=12, klass=klass) for klass in ("bar", f"hatch {dtype}")
        )
        items.append(f"<li>{element('svg', shape, width=24, height=14, aria_hidden='true')}{dtype}</li>")
    return f'<ul class="key">{"".join(items)}</ul>'


def html_roofline(results: dict) -> str:
    """The roofline, as a wide drawing and as a narrow one for phones. It is "" if all cases fit in the caches."""
    limit = page_tables.limits(results)
    roof = Roof(
        max(limit["read"], limit["copy"]),
        dict(float32=limit["fma"], bfloat16=limit["dot"]),
    )
    points = []
    for row in results["rows"]:
        way = page_tables.fair(row)
        if way is None or not row.get("flops") or not row["outside_cache"]:
            continue
        seconds = {name: row["seconds"][name]["median"] for name in ("ours", way)}
        text = (
            f"{row['op']} {page_tables.case(row)} {row['dtype']}: ours {quantity(seconds['ours'], 's')}, "
            f"{page_tables.RIVALS[way]} {quantity(seconds[way], 's')}"
        )
        points.append(Point(
            row["op"], row["dtype"], text, row["flops"] / (row["read"] + row["written"]),
            *(row["flops"] / s for s in seconds.values()),
        ))  # fmt: skip
    if not points:
        return ""
    drawn, unnamed = "", ""
    for name, width in (("wide", 1000), ("narrow", 420)):
        picture, missing = roofline(points, roof, name, width, 520)
        drawn += picture
        if missing:
            unnamed += element("span", f" No room for the names of {html.escape(', '.join(missing))}.", klass=name)
    items = []
    for dtype in dict.fromkeys(p.dtype for p in points):
        signs = symbol(dtype, 8.0, 8.0, "point ours") + symbol(dtype, 26.0, 8.0, "point other")
        picture = element("svg", signs, width=34, height=16, aria_hidden="true")
        items.append(f"<li>{picture}{dtype}: ours filled, PyTorch's fastest way hollow</li>")
    caption = (
        "Cases that do not fit into the caches. The roof is drawn from the figures at the head of this page; as memory "
        "of a shared machine is faster at some moments than at others, a point may lie above it."
    )
    return (
        f'<h2>Roofline</h2><ul class="key">{"".join(items)}</ul>'
        f'<figure class="roof">{drawn}<figcaption>{caption}{unnamed}</figcaption></figure>'
    )


def sections(found: dict[str, dict], kernels: list[Table]) -> list[Section]:
    """The sections for which there are results, in the order of the page."""
    made = []
    ops, model, parity, gpu = (found.get(kind) for kind in ("ops", "generate", "parity", "gpu"))
    if ops:
        bars, without = page_tables.bars_of_ops(ops)
        title = "Ops: how many times as fast as PyTorch"
        if bars or without:
            drawn = html_bars(bars, without) if bars else f"<p>Without a bar: {html.escape(', '.join(without))}.</p>"
            made.append(Section("speed", title, f"<h2>{title}</h2>{drawn}"))
        if drawn := html_roofline(ops):
            made.append(Section("roofline", "Roofline", drawn))
        table = noted(page_tables.of_ops(ops))
        made.append(Section("ops", "Ops: all numbers", f'{table}<p class="note">{LETTERS}</p>'))
    if parity:
        made.append(Section("parity", "Parity", noted(page_tables.of_parity(parity))))
    if "check" in found:
        made.append(Section("checks", "Checks", noted(page_tables.of_check(found["check"]))))
    if model:
        bars = page_tables.bars_of_model(model)
        parts = [noted(page_tables.of_model(model))] if model["rows"] else ["<h2>The whole model</h2>"]
        if bars:
            parts.append(f"<h3>How many times as fast as transformers</h3>{html_bars(bars)}")
        if model.get("fresh"):
            parts.append(noted(page_tables.of_fresh(model["fresh"]), 3))
        made.append(Section("model", "The whole model", "".join(parts)))
    if gpu:
        bars = page_gpu.bars(gpu)
        drawn = f"<h3>How many times as fast as the fastest other way</h3>{html_bars(bars)}" if bars else ""
        parts = "".join(noted(table, 3) for table in page_gpu.tables(gpu))
        content = f"<h2>Measured on a GPU</h2>{facts(page_gpu.of_machine(gpu))}{drawn}{parts}"
        made.append(Section("gpu", "Measured on a GPU", content))
    if kernels:
        note = (
            "These figures come from compiled code and from counts that need no GPU. None of them is a time, and none "
            "was measured on this machine. Bytes moved, and products on tensor cores, are those of all kernels of a "
            "call. They stand in the row of its first kernel."
        )
        parts = "".join(noted(table, 3) for table in kernels)
        made.append(Section("kernels", "GPU kernels", f'<h2>GPU kernels</h2><p class="note">{note}</p>{parts}'))
    return made


def filter_form(made: Sequence[Section], rows: list[dict[str, str]]) -> str:
    """A field for words, and a choice for each property in which rows differ. It is shown only if JavaScript runs."""
    choices = [("section", "Section", [(s.name, s.title) for s in made])]
    for name in ("dtype", "backend", "architecture"):
        values = dict.fromkeys(tags[name] for tags in rows if name in tags)
        choices.append((name, name.capitalize() if name != "dtype" else "dtype", [(v, v) for v in values]))
    parts = ['<label>Words<input name="words" type="search" placeholder="an op or a size"></label>']
    for name, label, values in choices:
        if len(values) > 1:
            options = "".join(element("option", html.escape(text), value=value) for value, text in values)
            parts.append(f'<label>{label}<select name="{name}"><option value="">all</option>{options}</select></label>')
        else:
            parts.append(f'<input type="hidden" name="{name}" value="">')
    parts.append('<button type="reset">Show all</button><output aria-live="polite"></output>')
    return f'<form class="filter" aria-label="Filter" hidden>{"".join(parts)}</form>'


def to_html(found: dict[str, dict], kernels: list[Table]) -> str:
    """The page, from results by kind and from the tables of GPU kernels."""
    made = sections(found, kernels)
    measured = next((found[kind] for kind in ("ops", "generate") if kind in found), None)
    about = measured or found.get("parity")
    head = facts(page_tables.of_machine(about)) if about else ""
    if measured:
        head += "<h2>What this machine can do at most, measured in the same run</h2>"
        head += facts(page_tables.of_limits(measured))
    tables = [*kernels, *(page_gpu.tables(found["gpu"]) if "gpu" in found else [])]
    tables += [of(found[kind]) for kind, of in ALL_ROWS.items() if kind in found]
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    links = "".join(f'<li><a href="#{s.name}">{html.escape(s.title)}</a></li>' for s in made)
    body = "".join(f'<section id="{s.name}">{s.content}</section>' for s in made)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>gpt2fast: measured</title>\n<style>\n{style}</style>\n</head>\n<body>\n{hatches()}\n"
        f"<header><h1>gpt2fast, measured</h1>{head}"
        f'<nav aria-label="Sections"><ul class="key">{links}</ul></nav></header>\n'
        f"{filter_form(made, [row.tags for table in tables for row in table.rows])}\n"
        f"<main>\n{body}\n</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


ALL_ROWS = dict(ops=page_tables.of_ops, parity=page_tables.of_parity, generate=page_tables.of_model)
