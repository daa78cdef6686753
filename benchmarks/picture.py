"""The README's picture: how many times as fast as transformers the model is, as one SVG file without anything outside.

A browser shows it on a light or a dark page; bars have a hatch where they have another colour.
"""

import html

from .drawings import Scale, element, write
from .page_tables import Bar, bars_of_model
from .units import between, times

WIDTH, LEFT, RIGHT = 1000, 420, 160  # of the drawing, of the names at its left, of the figures at its right
ROW, TOP = 24, 84
STYLE = """
text { font: 13px system-ui, "Segoe UI", Roboto, sans-serif; fill: #17202b; }
.paper { fill: #ffffff; } .quiet { fill: #566373; } .title { font-size: 17px; font-weight: 600; }
.strong { font-weight: 600; } .grid { stroke: #d8dee6; } .one, .whisker { stroke: #17202b; stroke-width: 1.3; }
.float32 { fill: #1b62a8; } .bfloat16 { fill: url(#hatch); stroke: #1b62a8; }
.line { stroke: #1b62a8; stroke-width: 2; }
@media (prefers-color-scheme: dark) {
  text { fill: #e8edf3; } .paper { fill: #12171d; } .quiet { fill: #a3b0bf; } .grid { stroke: #35404c; }
  .one, .whisker { stroke: #e8edf3; } .float32 { fill: #69aef0; } .bfloat16, .line { stroke: #69aef0; }
}
"""


def of_model(results: dict) -> str:
    """Of results of benchmarks.generate: a bar for each kind of work, dtype and way to load the model."""
    bars = bars_of_model(results)
    scale = Scale.over(b.ratio for b in bars)
    height = TOP + ROW * len(bars) + 12

    def x(value: float) -> float:
        return LEFT + scale.at(value) / 100 * (WIDTH - LEFT - RIGHT)

    def line(x1: float, y1: float, x2: float, y2: float, klass: str) -> str:
        return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), klass=klass)

    title = "GPT-2 124M on a CPU: how many times as fast as transformers"
    machine = results["machine"]
    below = f"{machine['cpu']}, {machine['threads']} threads. Thin line: 10 % to 90 % of the pairs. Logarithmic axis."
    drawn = [
        element("title", html.escape(title), id="title"),
        element("style", STYLE),
        element("defs", element(
            "pattern", element("path", d="M-1,1 l2,-2 M0,6 l6,-6 M5,7 l2,-2", klass="line"),
            id="hatch", width=6, height=6, patternUnits="userSpaceOnUse",
        )),
        element("rect", width=WIDTH, height=height, klass="paper"),
        write(16, 28, title, klass="title"),
        write(16, 50, below, klass="quiet"),
    ]  # fmt: skip
    for tick in scale.ticks():
        drawn.append(write(x(tick), TOP - 10, f"{tick:g} ×", "middle", "quiet"))
        drawn.append(line(x(tick), TOP - 4, x(tick), height - 12, "one" if tick == 1 else "grid"))
    for i, b in enumerate(bars):
        drawn.append(_bar(b, TOP + ROW * i, x, line))
    attributes = dict(role="img", aria_labelledby="title", viewBox=f"0 0 {WIDTH} {height}")
    return element("svg", "\n".join(drawn), xmlns="http://www.w3.org/2000/svg", **attributes) + "\n"


def _bar(b: Bar, top: int, x, line) -> str:
    middle, dtype = top + ROW / 2, b.tags["dtype"]
    left, right = sorted((x(1.0), x(b.ratio["median"])))
    low, high = x(b.ratio["q10"]), x(b.ratio["q90"])
    return "".join((
        write(LEFT - 10, middle + 4, f"{b.name}, {dtype}", "end"),
        element("rect", x=left, y=top + 5.0, width=right - left, height=ROW - 10.0, klass=dtype),
        line(low, middle, high, middle, "whisker"),
        *(line(end, middle - 4, end, middle + 4, "whisker") for end in (low, high)),
        write(WIDTH - RIGHT + 10, middle + 4, times(b.ratio["median"]), klass="strong"),
        write(WIDTH - 12, middle + 4, between(b.ratio), "end", "quiet"),
    ))  # fmt: skip
