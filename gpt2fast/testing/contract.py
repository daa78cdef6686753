"""``checks_of(op)``: everything that an op promises, as a list of checks. The op may be ours or a user's.

A test file of a user's package needs only a loop over it:

    @pytest.mark.parametrize("check", checks_of("mine::scale"), ids=str)
    def test_op(check): check()
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .. import backends
from ..dtypes import dtype_name
from ..op import Op
from . import bad_inputs, behaviour, gradients
from .check import runs
from .inputs import has_elements
from .isa import runnable_isas
from .parity import assert_parity
from .promise import MODERATE, QUICK, TINY, cases_below, dtypes_of, op_named, poisoned_memory
from .targets import on


@dataclass(frozen=True, eq=False)
class Check:
    """One promise of one op, for one case if it has cases. A call returns None or raises AssertionError.

    ``str(check)`` is its name: that of the op, that of the promise, and what the promise is checked for.
    """

    op: Op
    promise: str
    what: str
    run: Callable[[], None]

    def __call__(self) -> None:
        self.run()

    def __str__(self) -> str:
        return "-".join(filter(None, (self.op.name, self.promise, self.what)))

    __repr__ = __str__


def name_of(case: dict[str, Any]) -> str:
    """A case as one word, for the name of a test."""
    return "-".join(f"{k}{'' if v is True else v}" for k, v in case.items())


def keeps_the_parity_rule(op: Op, case: dict[str, Any], dtype: torch.dtype, target: str, layout: str) -> None:
    """The outputs on a target (see ``targets``) are about as exact as those of plain PyTorch."""
    with poisoned_memory(), on(target) as device:
        assert_parity(op, case, dtype, layout, f"{dtype} {target} {layout}", device)


Checks = Iterator[tuple[str, Callable[[], None]]]


def _parity(op: Op) -> Checks:
    for run in runs(op):
        dtype = dtype_name(run["dtype"])
        yield f"{name_of(run['case'])}-{dtype}-{run['target']}-{run['layout']}", partial(keeps_the_parity_rule, **run)


def _by_case(function: Callable[..., None], limit: int) -> Callable[[Op], Checks]:
    def checks(op: Op) -> Checks:
        for case in cases_below(op, limit):
            yield name_of(case), partial(function, case=case)

    return checks


def _with_elements(function: Callable[..., None]) -> Callable[[Op], Checks]:
    def checks(op: Op) -> Checks:
        for case in cases_below(op, TINY):
            if has_elements(op, case):
                yield name_of(case), partial(function, case=case)

    return checks


def _once(function: Callable[..., None]) -> Callable[[Op], Checks]:
    return lambda op: iter([("", function)])


def _gradients(op: Op) -> Checks:
    for case in cases_below(op, MODERATE):
        for dtype in dtypes_of(op, torch.float32, torch.bfloat16):
            for backend in ("auto", "fused"):
                what = f"{name_of(case)}-{str(dtype).removeprefix('torch.')}-{backend}"
                function = gradients.gradients_keep_the_parity_rule
                yield what, partial(function, case=case, dtype=dtype, backend=backend)


def _buffers(op: Op) -> Checks:
    """One check for each instruction set, because a kernel may be compiled for each of them."""
    for isa in runnable_isas():
        yield isa, partial(behaviour.stays_inside_its_buffers, isa=isa)


def _differentiable(op: Op) -> bool:
    return op.has_derivative


def _has_none(op: Op) -> bool:
    return not (op.has_derivative or op.mutates or op.derivative_of)


def _guarded(op: Op) -> bool:
    return backends.is_native(op) and backends._C is not None


def _always(op: Op) -> bool:
    return True


# For each promise: a function that tells whether it applies to an op, and a function that makes its checks.
PROMISES: dict[str, tuple[Callable[[Op], bool], Callable[[Op], Checks]]] = {
    "parity": (_always, _parity),
    "opcheck": (_always, _by_case(behaviour.passes_opcheck, 10_000)),
    "finite_differences": (_differentiable, _by_case(gradients.gradients_match_finite_differences, TINY)),
    "gradients": (_differentiable, _gradients),
    "second_derivatives": (_differentiable, _with_elements(gradients.second_derivatives_keep_the_parity_rule)),
    "no_derivative": (_has_none, _once(gradients.no_derivative_raises)),
    "compile": (_always, _once(behaviour.compiles_whole)),
    "autocast": (_always, _once(behaviour.autocast_casts_as_declared)),
    "bad_input": (_always, _once(bad_inputs.bad_input_is_named)),
    "repeats": (_always, _by_case(behaviour.repeats_bit_for_bit, 5_000_000)),
    "threads": (backends.is_native, _once(behaviour.thread_count_changes_no_bit)),
    "buffers": (_guarded, _buffers),
    "new_outputs": (lambda op: not op.mutates, _by_case(behaviour.returns_new_tensors, QUICK)),
    "same_inputs": (_always, _by_case(behaviour.leaves_its_inputs_alone, QUICK)),
}


def checks_of(op: Op | str, *promises: str) -> list[Check]:
    """All checks of ``op``, an op or its name, on this machine: every promise and every run of the parity rule.

    ``promises``, names in ``PROMISES``, select some of them. Nothing is computed before a check is called. Raises
    ValueError for an unknown op or promise, and where the declaration has no case with elements.
    """
    op = op_named(op)
    for name in promises:
        if name not in PROMISES:
            raise ValueError(f"gpt2fast: promise must be one of {', '.join(PROMISES)}, got {name!r}")
    found = []
    for name in promises or PROMISES:
        applies, checks = PROMISES[name]
        if applies(op):
            found += [Check(op, name, what, partial(function, op)) for what, function in checks(op)]
    return found
