"""The promise about bad input: where an argument has a wrong size, rank, dtype, kind or device, the error names it."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import shapes
from ..op import Op
from .inputs import build
from .promise import QUICK, first_case, promise


@promise
def bad_input_is_named(op: Op) -> None:
    """A call that does not fit ``shapes=`` raises ValueError or TypeError naming op, argument, expected and got."""
    case = first_case(op, QUICK)
    refused = set()
    for name, change, args in _wrong_inputs(op, build(op, case | dict.fromkeys(op.optional, True))):
        what = f"{op.qualified}: {name} with another {change}"
        try:
            shapes.check(op.qualified, op.shapes, args)
        except (ValueError, TypeError) as error:
            expected = error
        else:  # the change fits, e.g. for a letter that no other tensor has
            assert not _must_raise(op, args, name, change), f"{what} fits shapes=, and should not"
            continue
        for function, where in ((op.overload, "the op"), (op.check_call, "check_call")):
            _assert_raises(what, where, function, args, expected)
        said = re.match(rf"{re.escape(op.qualified)}: (\w+)(?:\[\d+\])? must .+, got .+", str(expected))
        assert said, f"{what}: the error must say which argument must be what, and what it got: {expected}"
        assert said[1] == name or not _must_raise(op, args, name, change), f"{what} is laid at {said[1]}: {expected}"
        refused.add(name)
    never = [name for name in op.tensors if name not in refused]
    assert not never, f"{op.qualified}: no change of {never[0]} is refused; shapes= must say more about it"


def _assert_raises(what: str, where: str, function, args: dict[str, Any], expected: Exception) -> None:
    wanted = f"{type(expected).__name__} {str(expected)!r}"
    try:
        function(**args)
    except Exception as error:
        got = str(error).split("\n")[0]
        assert isinstance(error, type(expected)) and got == str(expected), (
            f"{what}: {where} must raise {wanted}, got {type(error).__name__} {got!r}"
        )
    else:
        raise AssertionError(
            f"{what}: {where} must raise {wanted}, got no error; a kernel at the dispatcher's CPU key must call the "
            f"op's check_call first"
        )


def _wrong_inputs(op: Op, args: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields (argument, change, arguments), with one size, rank, dtype, kind or device changed at a time."""
    for name in op.tensors:
        good = args[name]
        if isinstance(good, list):
            yield name, "length", args | {name: [*good, good[0]]}
            for _, change, changed in _wrong_tensors(name, good[0], args):
                yield name, change, args | {name: [changed[name], *good[1:]]}
        else:
            yield from _wrong_tensors(name, good, args)


def _wrong_tensors(name: str, good: Tensor, args: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for axis in range(good.dim()):
        if good.shape[axis]:
            yield name, f"axis {axis}", args | {name: torch.cat([good, good.narrow(axis, 0, 1)], axis)}
    yield name, "rank", args | {name: good[None]}
    yield name, "dtype", args | {name: good.to(torch.float64 if good.is_floating_point() else torch.int32)}
    yield name, "kind", args | {name: good.long() if good.is_floating_point() else good.float()}
    yield name, "device", args | {name: good.to("meta")}


def _must_raise(op: Op, args: dict[str, Any], name: str, change: str) -> bool:
    """Whether the error for a change must name ``name``.

    It need not for the first tensors: others are compared with them, so that the error may name another.
    """
    specs = {n: shapes.parse(shapes.resolve(op.shapes[n], args)) for n in op.tensors}
    if name == op.tensors[0] or name == next((n for n, (_, dtype) in specs.items() if dtype is None), None):
        return False
    if not change.startswith("axis"):
        return True
    dims = specs[name][0]
    if dims == shapes.EACH:
        return True
    letter = dims[max(int(change[5:]) - args[name].dim() + len(dims), 0)].split("|")[0]
    before = op.tensors[: op.tensors.index(name)]
    return letter.isdigit() or any(letter in (d.split("|")[0] for d in specs[n][0]) for n in before)
