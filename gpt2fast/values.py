"""Rules for the values of an op's arguments: a small language next to that of the shapes.

- ``window="[0, inf); 0: unlimited"`` is an interval. The text after ``;`` is a hint for the error message. A bound is a
  number, or a letter that stands for a size.
- ``tokens="[0, V)"`` holds for every value of a tensor. ``"[0, V) or ignore_index"`` also allows the value of that
  argument.
- ``positions="[0, P) else start + T"``: where the tensor is not given, its values are the T numbers from ``start`` on.
- ``approximate="tanh | none"`` lists the strings to choose from.
- ``seed="given if dropout_p"``: the tensor must be given where ``dropout_p`` is above 0.
- ``logits="drawable if temperature"``: no row has a NaN. Where ``temperature`` is above 0, the greatest value of each
  row is finite.
- ``V="[1, inf)"`` is a rule for a size.

A declaration is parsed once. Two fast checks use it, ``shapes.compile_check`` in Python and csrc/torch/declaration.h in
C++. They only find out whether a call fits. ``check`` raises the error of a call that does not.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_INTERVAL = re.compile(r"([\[(])(\S+), (\S+)([\])])(?: or (\S+))?(?: else (\w+) \+ ([A-Z]))?(?:; (.+))?")


@dataclass(frozen=True)
class Rule:
    """One line of ``values=``; ``kind`` is "choice", "interval", "given" or "drawable"."""

    name: str
    kind: str
    choices: tuple[str, ...] = ()
    low: float | str = -math.inf  # a letter stands for a size
    high: float | str = math.inf
    closed: tuple[bool, bool] = (True, True)
    also: int | str | None = None
    start: str | None = None  # the argument that the values of an absent tensor start with; ``count``: their number
    count: str | None = None
    condition: str | None = None
    hint: str | None = None


def parse(op: str, values: dict[str, str], arguments: tuple[str, ...]) -> list[Rule]:
    """The rules of a declaration. Raises ValueError for a text that is not a rule, or names an unknown argument."""
    return [_parse(op, name, text, arguments) for name, text in values.items()]


def _parse(op: str, name: str, text: str, arguments: tuple[str, ...]) -> Rule:
    rule = None
    if text.startswith("drawable if "):
        rule = Rule(name, "drawable", condition=text.removeprefix("drawable if "))
    elif text.startswith("given if "):
        rule = Rule(name, "given", condition=text.removeprefix("given if "))
    elif match := _INTERVAL.fullmatch(text):
        left, low, high, right, also, start, count, hint = match.groups()
        if also is not None and re.fullmatch(r"-?\d+", also):
            also = int(also)
        closed = left == "[", right == "]"
        rule = Rule(name, "interval", (), _bound(low), _bound(high), closed, also, start, count, None, hint)
    elif re.fullmatch(r"\w+( \| \w+)*", text):
        rule = Rule(name, "choice", tuple(text.split(" | ")))
    if rule is None:
        raise ValueError(
            f"{op}: values= must be an interval, choices, 'given if NAME' or 'drawable if NAME', got {text!r}"
        )
    for used in (name, rule.also, rule.start, rule.condition):
        if isinstance(used, str) and used not in arguments and not re.fullmatch("[A-Z]", used):
            raise ValueError(f"{op}: values= must name arguments, {', '.join(arguments)}, got {used!r}")
    return rule


def _bound(text: str) -> float | str:
    if re.fullmatch("[A-Z]", text):
        return text
    number = float(text)
    return int(number) if number == round(number, 0) and math.isfinite(number) else number


def checkable(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be read here: it is on the CPU, and no transform of torch.func is active."""
    return tensor.device.type == "cpu" and torch._C._functorch.peek_interpreter_stack() is None


def lies_in(tensor: Tensor, low: int, high: int, also: int | None = None) -> bool:
    """Whether each value is in [low, high] or is ``also``. True for a tensor that is not ``checkable``."""
    if not checkable(tensor) or not tensor.numel():
        return True
    least, most = tensor.aminmax()
    if least >= low and most <= high:
        return True
    return also is not None and not _outside(tensor, low, high, also).any()


def drawable(logits: Tensor, finite: bool) -> bool:
    """Whether each row (..., V) has no NaN and, where ``finite``, a finite maximum. True where not ``checkable``."""
    if not checkable(logits) or not logits.numel():
        return True
    top = logits.amax(-1)  # NaN where there is one
    return not bool((~top.isfinite() if finite else top.isnan()).any())


def _outside(tensor: Tensor, low: int, high: int, also: int | None) -> Tensor:
    wrong = (tensor < low) | (tensor > high)
    return wrong if also is None else wrong & (tensor != also)


def conditions(rules: list[Rule], tensors: tuple[str, ...]) -> list[str]:
    """Python expressions that are true where the rules hold; ``_V`` stands for the size of letter V."""
    found = []
    for rule in rules:
        name, (closed_low, closed_high) = rule.name, rule.closed
        if rule.kind == "choice":
            found.append(f"{name} in {rule.choices!r}")
        elif rule.kind == "given":
            found.append(f"({name} is not None or not {rule.condition} > 0)")
        elif rule.kind == "drawable":
            found.append(f"drawable({name}, {rule.condition} > 0)")
        elif name in tensors:
            low, high = _word(rule.low, closed_low, "+"), _word(rule.high, closed_high, "-")
            absent = "True" if rule.start is None else f"{low} <= {rule.start} <= {high} - _{rule.count} + 1"
            found.append(f"({absent} if {name} is None else lies_in({name}, {low}, {high}, {rule.also}))")
        else:
            low, high = (f"_{b}" if isinstance(b, str) else f"float('{b}')" for b in (rule.low, rule.high))
            value = f"_{name}" if re.fullmatch("[A-Z]", name) else name
            found.append(f"{low} {'<=' if closed_low else '<'} {value} {'<=' if closed_high else '<'} {high}")
    return found


def _word(bound: float | str, closed: bool, step: str) -> str:
    """A bound of an integer interval as Python text. An open bound becomes the closed bound next to it."""
    name = f"_{bound}" if isinstance(bound, str) else str(bound)
    return name if closed else f"({name} {step} 1)"


def check(op: str, rules: list[Rule], args: dict[str, Any], sizes: dict[str, Any]) -> None:
    """Raises ValueError where a rule does not hold. It names the op, the argument, what was expected and what came."""
    for rule in rules:
        value = args.get(rule.name, sizes.get(rule.name))
        if wrong := _objection(rule, value, args, sizes):
            expected, got = wrong
            raise ValueError(f"{op}: {rule.name} must {expected}, got {got}")


def _objection(rule: Rule, value: Any, args: dict[str, Any], sizes: dict[str, Any]) -> tuple[str, str] | None:
    """What was expected and what came, in words, or None where the rule holds."""
    if rule.kind == "choice":
        *first, last = map(repr, rule.choices)
        return None if value in rule.choices else (f"be {', '.join(first)} or {last}", repr(value))
    if rule.kind == "given":
        missing = value is None and args[rule.condition] > 0
        return (f"be given where {rule.condition} > 0", "None") if missing else None
    if rule.kind == "drawable":
        if drawable(value, args.get(rule.condition, 0) > 0):
            return None
        if value.isnan().any():
            return "not hold NaN", f"NaN at {_index(value.isnan())}"
        top = value.amax(-1)
        row = tuple((~top.isfinite()).nonzero()[0].tolist())
        return "have a finite greatest value in each row", f"{top[row].item()} in row {', '.join(map(str, row))}"
    low, high = (sizes[b] if isinstance(b, str) else b for b in (rule.low, rule.high))
    closed_low, closed_high = rule.closed
    if isinstance(value, Tensor) or rule.start is not None:
        return _outside_of_tensor(rule, value, low, high, args, sizes)
    if value is None or (
        (low <= value if closed_low else low < value) and (value <= high if closed_high else value < high)
    ):
        return None
    if high == math.inf:
        words = f"be {'at least' if closed_low else 'above'} {low}"
    else:
        words = f"lie in {_interval(rule, low, high)}"
    return words + (f" ({rule.hint})" if rule.hint else ""), f"{value:g}" if isinstance(value, float) else str(value)


def _outside_of_tensor(rule, value, low, high, args, sizes) -> tuple[str, str] | None:
    first, last = low + (not rule.closed[0]), high - (not rule.closed[1])
    words = f"lie in {_interval(rule, low, high)}"
    if value is None:
        start, count = args[rule.start], sizes[rule.count]
        fine = first <= start <= last - count + 1
        return None if fine else (words, f"{rule.start} = {start} and {rule.count} = {count}")
    also = args[rule.also] if isinstance(rule.also, str) else rule.also
    if lies_in(value, first, last, also):
        return None
    wrong = _outside(value, first, last, also)
    words += "" if also is None else f" or be {also}"
    return words, f"{value[tuple(wrong.nonzero()[0])].item()} at {_index(wrong)}"


def _index(wrong: Tensor) -> str:
    """The index of the first True, written as a tuple."""
    at = wrong.nonzero()[0].tolist()
    return f"({at[0]},)" if len(at) == 1 else f"({', '.join(map(str, at))})"


def _interval(rule: Rule, low: Any, high: Any) -> str:
    return f"{'[' if rule.closed[0] else '('}{low}, {high}{']' if rule.closed[1] else ')'}"


def within(op: str, name: str, tensor: Tensor | None, high: int, allowed: int | None = None) -> None:
    """Raises ValueError where a value of a CPU tensor lies outside [0, high) and is not ``allowed``.

    It is for code that must check an argument of an op before it calls the op.
    """
    if tensor is not None:
        rule = Rule(name, "interval", low=0, high=high, closed=(True, False), also=allowed)
        check(f"gpt2fast::{op}", [rule], {name: tensor}, {})
