"""The drawings of the report as SVG text: bars of ratios, row by row, and the roofline.

Shapes and hatches repeat what colours say, for readers who cannot tell the colours apart. Colours are classes of
page.css, so that dark screens and print have colours of their own.
"""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .units import number

SYMBOLS = {"float32": "circle", "bfloat16": "square", "float16": "triangle"}
LETTER = 0.62  # the width of a letter, as a share of the font's size; rather too wide than too narrow
FONT = 13
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def element(tag: str, content: str = "", **attributes) -> str:
    """An SVG element. ``klass`` stands for class, and ``_`` in a name for ``-``. Numbers get two decimals."""
    words = []
    for name, value in attributes.items():
        name = "class" if name == "klass" else name.replace("_", "-")
        value = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
        words.append(f' {name}="{html.escape(value)}"')
    return f"<{tag}{''.join(words)}>{content}</{tag}>"


def write(x: float, y: float, text: str, anchor: str = "start", klass: str = "label") -> str:
    return element("text", html.escape(text), x=float(x), y=float(y), text_anchor=anchor, klass=klass)


def titled(name: str, title: str, description: str) -> tuple[dict, str]:
    """Attributes and first children of an SVG that a screen reader takes as one picture. ``name`` must be unique."""
    attributes = dict(role="img", aria_labelledby=f"{name}-title {name}-desc")
    inner = element("title", html.escape(title), id=f"{name}-title")
    return attributes, inner + element("desc", html.escape(description), id=f"{name}-desc")


# --- bars ---


@dataclass
class Scale:
    """A logarithmic axis over the width of a drawing, in percent. Its range includes 1 and every value."""

    low: float
    high: float

    @classmethod
    def over(cls, spreads: Iterable[dict]) -> "Scale":
        values = [v for s in spreads for v in s.values() if v > 0] + [1.0]
        low, high = min(values), max(values)
        return cls(min(low / 1.15, 0.8), max(high * 1.15, 2.0))

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return 100 * min(max(share, 0.0), 1.0)

    def ticks(self, most: int = 6) -> list[float]:
        """At most ``most`` round values. 1 is among them, and none is at the edge."""
        inside = [t for t in TICKS if 4 < self.at(t) < 95]
        step = max(1, math.ceil(len(inside) / most))
        one = inside.index(1) if 1 in inside else 0
        return [t for i, t in enumerate(inside) if (i - one) % step == 0]


def axis(scale: Scale) -> str:
    """The scale above the bars: ticks and their values."""
    inner = "".join(
        element("text", f"{number(t, 1)}{' ×'}", x=f"{scale.at(t):.2f}%", y="13", text_anchor="middle", klass="label")
        for t in scale.ticks()
    )
    return element("svg", inner, klass="axis", aria_hidden="true", width="100%", height="18")


def bar(scale: Scale, spread: dict, dtype: str, title: str) -> str:
    """A bar from 1 to the median, with a whisker from the 10 % to the 90 % quantile."""
    one, end = scale.at(1.0), scale.at(spread["median"])
    left, right = sorted((one, end))
    low, high = scale.at(spread["q10"]), scale.at(spread["q90"])

    def line(x: float, x2: float, y: int, y2: int, klass: str) -> str:
        return element("line", x1=f"{x:.2f}%", x2=f"{x2:.2f}%", y1=y, y2=y2, klass=klass)

    grid = "".join(line(scale.at(t), scale.at(t), 0, 22, "grid") for t in scale.ticks() if t != 1)
    body = "".join(
        element("rect", x=f"{left:.2f}%", y="4", width=f"{right - left:.2f}%", height="14", klass=klass)
        for klass in ("bar", f"hatch {dtype}")
    )
    whisker = "".join(
        line(low, high, 11, 11, klass) + "".join(line(x, x, 7, 15, klass) for x in (low, high))
        for klass in ("halo", "whisker")
    )
    inner = element("title", html.escape(title)) + grid + body + line(one, one, 0, 22, "one") + whisker
    return element("svg", inner, role="img", aria_label=title, width="100%", height="22")


def hatches() -> str:
    """The hatch patterns of the bars in all drawings, one for each dtype. float32 is plain."""
    lines = dict(bfloat16="M-1,1 l2,-2 M0,6 l6,-6 M5,7 l2,-2", float16="M0,3 h6")
    patterns = "".join(
        element("pattern", element("path", d=d, klass="hatching"), id=f"hatch-{name}", width=6, height=6,
                patternUnits="userSpaceOnUse")
        for name, d in lines.items()
    )  # fmt: skip
    return element("svg", element("defs", patterns), width=0, height=0, aria_hidden="true", klass="defs")


# --- the roofline ---


@dataclass
class Point:
    """A case: operations per byte, and operations per second of our way and of PyTorch's fastest way."""

    op: str
    dtype: str
    text: str
    intensity: float
    ours: float
    other: float


@dataclass
class Roof:
    """The limits of a machine: bytes per second of its memory, and operations per second, by the unit that computes."""

    memory: float
    rates: dict[str, float]

    def at(self, intensity: float) -> float:
        return min(intensity * self.memory, max(self.rates.values()))


Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass
class Frame:
    """Two logarithmic axes, which convert data to units of the drawing, and the boxes that text and points occupy."""

    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    left: float = 62
    right: float = 16
    top: float = 30
    bottom: float = 46
    taken: list[Box] = field(default_factory=list)

    def px(self, value: float) -> float:
        share = math.log(value / self.x[0]) / math.log(self.x[1] / self.x[0])
        return self.left + share * (self.width - self.left - self.right)

    def py(self, value: float) -> float:
        share = math.log(value / self.y[0]) / math.log(self.y[1] / self.y[0])
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)

    def free(self, box: Box) -> bool:
        inside = box[0] >= self.left and box[2] <= self.width - self.right
        inside = inside and box[1] >= self.top - 12 and box[3] <= self.height - self.bottom
        return inside and not any(overlap(box, other) for other in self.taken)


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def text_box(x: float, y: float, text: str, anchor: str) -> Box:
    """The box that a text occupies. ``y`` is its baseline."""
    width = LETTER * FONT * len(text)
    left = x - dict(start=0.0, middle=width / 2, end=width)[anchor]
    return left - 2, y - FONT, left + width + 2, y + 4


def symbol(kind: str, x: float, y: float, klass: str) -> str:
    shape = SYMBOLS.get(kind, "triangle")
    if shape == "circle":
        return element("circle", cx=float(x), cy=float(y), r=5, klass=klass)
    if shape == "square":
        return element("rect", x=float(x - 4.5), y=float(y - 4.5), width=9, height=9, klass=klass)
    return element("path", d=f"M{x:.1f},{y - 5.5:.1f} l5.5,10 h-11 z", klass=klass)


def decades(low: float, high: float) -> list[float]:
    return [10.0**n for n in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)]


def roofline(points: Sequence[Point], roof: Roof, name: str, width: int, height: int) -> tuple[str, list[str]]:
    """The drawing, and the ops whose names found no room. A filled point is ours, a hollow one PyTorch's; a line joins
    the two of a case."""
    knee = max(roof.rates.values()) / roof.memory
    xs, ys = [p.intensity for p in points], [v for p in points for v in (p.ours, p.other)]
    low, high = min([*xs, knee / 10]) / 1.8, max([*xs, knee]) * 4
    lowest, highest = min([*ys, roof.at(low)]) / 1.8, max([*ys, *roof.rates.values()]) * 2.2
    frame = Frame(width, height, (low, high), (lowest, highest))
    drawn = []
    for p in points:
        x, y, other = frame.px(p.intensity), frame.py(p.ours), frame.py(p.other)
        frame.taken += [(x - 6, v - 6, x + 6, v + 6) for v in (y, other)] + [(x, min(y, other), x, max(y, other))]
        inner = element("title", html.escape(p.text)) + element("line", x1=x, x2=x, y1=y, y2=other, klass="join")
        inner += symbol(p.dtype, x, other, "point other") + symbol(p.dtype, x, y, "point ours")
        drawn.append(element("g", inner, klass="row", data_dtype=p.dtype, data_text=p.text.lower()))
    parts, names, left_out = [*axes(frame), *roof_lines(frame, roof)], [], []
    for op in dict.fromkeys(p.op for p in points):
        best = max((p for p in points if p.op == op), key=lambda p: p.ours)
        label = name_beside(frame, op, frame.px(best.intensity), frame.py(best.ours))
        names.append(label) if label else left_out.append(op)
    best = ", ".join(f"{what} {number(rate / 1e9)} GFLOP/s" for what, rate in roof.rates.items())
    attributes, inner = titled(
        name,
        "Roofline: operations a second over operations a byte",
        f"Below the roof, memory {number(roof.memory / 1e9)} GB/s, {best}, there are {len(points)} cases, each with a "
        "filled point for our kernel and a hollow one for PyTorch's fastest way. The table of ops has their numbers.",
    )
    content = inner + "".join(parts + drawn + names)
    return element("svg", content, viewBox=f"0 0 {width} {height}", klass=f"roofline {name}", **attributes), left_out


def axes(frame: Frame) -> list[str]:
    bottom, end = frame.height - frame.bottom, frame.width - frame.right
    parts, last = [], -1e9
    for value in decades(*frame.x):
        x, text = frame.px(value), number(value, 1)
        parts.append(element("line", x1=x, x2=x, y1=float(frame.top), y2=float(bottom), klass="grid"))
        if text_box(x, 0, text, "middle")[0] > last and text_box(x, 0, text, "middle")[2] < frame.width:
            parts.append(write(x, bottom + 17, text, "middle"))
            last = text_box(x, 0, text, "middle")[2]
    for value in decades(*frame.y):
        y = frame.py(value)
        parts.append(element("line", x1=float(frame.left), x2=float(end), y1=y, y2=y, klass="grid"))
        parts.append(write(frame.left - 7, y + 4, number(value / 1e9, 1), "end"))
    parts.append(element("path", d=f"M{frame.left},{frame.top} V{bottom} H{end}", klass="frame"))
    parts.append(write(4, 14, "GFLOP/s", "start", "label strong"))
    parts.append(write(end, frame.height - 8, "operations a byte of tensors in and out", "end", "label strong"))
    return parts


def roof_lines(frame: Frame, roof: Roof) -> list[str]:
    """The sloped line of memory and a level line for each rate, each with its measured figure."""
    parts = []
    top = max(roof.rates.values())
    low, knee = frame.x[0], top / roof.memory
    ends = [(frame.px(x), frame.py(x * roof.memory)) for x in (low, knee)]
    (x1, y1), (x2, y2) = ends
    parts.append(element("line", x1=x1, y1=y1, x2=x2, y2=y2, klass="roof"))
    steps = 40
    for i in range(steps):
        x, y = x1 + (x2 - x1) * i / steps, y1 + (y2 - y1) * i / steps
        frame.taken.append((x - 1, y + (y2 - y1) / steps, x + (x2 - x1) / steps, y))
    text = f"memory: {number(roof.memory / 1e9)} GB/s"
    wide = text_box(x1 + 6, 0, text, "start")[2] - x1
    y = y1 + (y2 - y1) * min(wide / (x2 - x1), 1.0) - 8  # above the slope where the text ends
    frame.taken.append(text_box(x1 + 6, y, text, "start"))
    parts.append(write(x1 + 6, y, text, "start", "label roofed"))
    for i, (what, rate) in enumerate(sorted(roof.rates.items(), key=lambda item: item[1])):
        x, y, end = frame.px(max(rate / roof.memory, frame.x[0])), frame.py(rate), frame.px(frame.x[1])
        dashes = "6 4" if i else "none"
        parts.append(element("line", x1=x, x2=end, y1=y, y2=y, klass="roof", stroke_dasharray=dashes))
        text = f"{what}: {number(rate / 1e9)} GFLOP/s"
        frame.taken.append((x, y - 1, end, y + 1))
        for at, base, anchor in ((end - 4, y - 6, "end"), (end - 4, y + 17, "end"), (x + 12, y + 17, "start")):
            box = text_box(at, base, text, anchor)
            if frame.free(box):
                break
        frame.taken.append(box)
        parts.append(write(at, base, text, anchor, "label roofed"))
    return parts


def name_beside(frame: Frame, text: str, x: float, y: float) -> str | None:
    """The text, at the nearest place with room for it. If that is not close to its point, a line leads there. None if
    there is no room."""
    for distance in (9, 18, 30, 44, 60, 80, 105, 135):
        for dx, dy in ((1, 0), (0.7, -0.7), (0, -1), (0.7, 0.7), (0, 1), (-0.7, -0.7), (-1, 0), (-0.7, 0.7)):
            at, base = x + distance * dx, y + distance * dy + 4
            anchor = "middle" if not dx else "start" if dx > 0 else "end"
            box = text_box(at, base, text, anchor)
            if frame.free(box):
                frame.taken.append(box)
                near = base - 4 if dx else base + 3 if dy < 0 else base - FONT + 2  # the edge towards the point
                leader = element("line", x1=x, y1=y, x2=float(at), y2=float(near), klass="leader")
                return (leader if distance > 18 else "") + write(at, base, text, anchor, "label name")
    return None
