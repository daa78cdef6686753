"""Tables for a terminal (with rich, if installed) and for Markdown. The first column is text, the others numbers."""

from collections.abc import Sequence


def show(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", text_columns: int = 1) -> None:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(plain(header, rows, title, text_columns))
        return
    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < text_columns else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell, style="bold red" if "FAILED" in cell else "") for cell in row))
    wanted = console.measure(table, options=console.options.update(width=1000)).maximum
    console.width = max(console.width, wanted)  # a wide table is better than one with truncated cells
    if title:
        console.print(title, soft_wrap=True)
    console.print(table)


def plain(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", text_columns: int = 1) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = (c.ljust(w) if i < text_columns else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
        return "  ".join(cells).rstrip()

    return "\n".join([*([title] if title else []), line(header), *map(line, rows)])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    rule = ["---" if i < text_columns else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])
