"""Converts an op's shapes and values to rows of plain numbers for the C++ bindings, which read them in declare.h.

The types of the rows are those of csrc/torch/declare.h. Arguments are numbers by position and letters by place in the
alphabet.
"""

from typing import TYPE_CHECKING

from . import shapes, values

if TYPE_CHECKING:
    from .op import Op

NONE = -1  # stands for "no argument" or "no letter"


def rows(declared: "Op") -> tuple[list[tuple], list[tuple]]:
    """Returns the rows of the tensors, in the order in which they are checked, and the rows of the value rules."""
    place = {name: index for index, name in enumerate(declared.names)} | {None: NONE}
    return [_tensor(declared, name, place) for name in declared.shapes], [_value(r, place) for r in declared.rules]


def _tensor(declared: "Op", name: str, place: dict) -> tuple:
    spec = declared.shapes[name]
    yes, condition, no = shapes.alternatives(spec) or (spec, None, spec)
    (dims, dtype), (otherwise, other_dtype) = shapes.parse(yes), shapes.parse(no)
    if dtype != other_dtype:
        raise ValueError(f"{declared.qualified}: shapes= must give {name} one dtype, got {dtype} and {other_dtype}")
    return place[name], dtype, _shape(dims), _shape(otherwise), place[condition]


def _shape(dims: list[str]) -> tuple[bool, list[tuple[int, int, bool]]]:
    found = []
    for dim in dims:
        if dim != "...":
            size, _, broadcast = dim.partition("|")
            exact = size.isdigit()
            found.append((NONE if exact else _letter(size), int(size) if exact else 0, bool(broadcast)))
    return "..." in dims, found


def _value(rule: values.Rule, place: dict) -> tuple:
    is_letter = rule.name not in place
    also_argument = place[rule.also] if isinstance(rule.also, str) else NONE
    return (
        rule.kind,
        NONE if is_letter else place[rule.name],
        _letter(rule.name) if is_letter else NONE,
        list(rule.choices),
        _bound(rule.low, rule.closed[0]),
        _bound(rule.high, rule.closed[1]),
        rule.also if isinstance(rule.also, int) else None,
        also_argument,
        place[rule.start],
        _letter(rule.count) if rule.count else NONE,
        place[rule.condition],
    )


def _bound(bound: float | str, closed: bool) -> tuple[float, int, bool]:
    return (0.0, _letter(bound), closed) if isinstance(bound, str) else (float(bound), NONE, closed)


def _letter(letter: str) -> int:
    return ord(letter) - ord("A")
