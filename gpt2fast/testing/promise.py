"""What the promises of the contract share: error messages, memory filled with NaN, and the choice of cases.

A promise is a function of an op and, where needed, of a case, a dtype or an instruction set. It returns None, or raises
AssertionError with a text that begins with the op's name.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..op import NAMESPACE, OPS, Op
from .inputs import flops, has_elements, work

TINY = 4000  # operations: for float64 finite differences and second derivatives
QUICK = 100_000
MODERATE = 3_000_000


def op_named(op: Op | str) -> Op:
    """The op with this name in ``OPS``, or the given op. Raises ValueError with the choices for an unknown name."""
    if isinstance(op, Op):
        return op
    from .. import ops  # noqa: F401  declares ours

    name = str(op).removeprefix(f"{NAMESPACE}::")
    if name not in OPS:
        raise ValueError(f"gpt2fast: op must be one of {', '.join(OPS)}, got {op!r}")
    return OPS[name]


def promise(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator of a promise. The op may be given by name, and uninitialised memory is NaN.

    Every error becomes an AssertionError that names the op.
    """

    @functools.wraps(function)
    def held(op: Op | str, *args: Any, **kwargs: Any) -> None:
        op = op_named(op)
        try:
            with poisoned_memory():
                function(op, *args, **kwargs)
        except Exception as error:
            text = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            if text.startswith(op.qualified):
                raise
            raise AssertionError(f"{op.qualified}: {function.__name__}: {text}") from error

    return held


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, torch.empty gives NaN, so that an output that was never written cannot look right."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have a deterministic implementation")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fills


def smallest_case(op: Op) -> dict[str, Any]:
    """The cheapest case that has elements. Raises ValueError where the declaration has none."""
    filled = [case for case in op.cases if has_elements(op, case)]
    if not filled:
        raise ValueError(f"{op.qualified}: cases= must name at least one case that has elements, got {op.cases}")
    return min(filled, key=lambda case: work(op, case))


def cases_below(op: Op, limit: int) -> list[dict[str, Any]]:
    """The cases of at most ``limit`` operations, empty ones included; and the cheapest if none of them has elements."""
    found = [case for case in op.cases if work(op, case) <= limit]
    return found if any(has_elements(op, case) for case in found) else [*found, smallest_case(op)]


def first_case(op: Op, limit: int, fits: Callable[[dict], bool] = lambda case: True) -> dict[str, Any]:
    """The first case with elements, at most ``limit`` FLOPs and ``fits``; the cheapest case if there is none."""
    return next(
        (c for c in op.cases if has_elements(op, c) and flops(op, c) <= limit and fits(c)), None
    ) or smallest_case(op)


def dtypes_of(op: Op, *wanted: torch.dtype) -> tuple[torch.dtype, ...]:
    """Those of ``wanted`` that the op declares, or else the first that it declares."""
    return tuple(dtype for dtype in wanted if dtype in op.dtypes) or op.dtypes[:1]


def floating(args: dict[str, Any]) -> list[str]:
    """The names of the floating-point tensors among the arguments."""
    return [n for n, v in args.items() if isinstance(v, Tensor) and v.is_floating_point()]


def floating_outputs(out: Any) -> tuple[Tensor, ...]:
    """The floating-point tensors among the outputs of an op, as a tuple."""
    return tuple(o for o in (out if isinstance(out, tuple) else (out,)) if o.is_floating_point())


def assert_same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Raises AssertionError where two tensors differ in dtype, shape or a bit, with the element that differs most."""
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    a, b = actual.detach().reshape(-1).contiguous(), expected.detach().reshape(-1).contiguous()
    same = (a.view(torch.uint8) == b.view(torch.uint8)).view(len(a), -1).all(1)
    if same.all():
        return
    distance = torch.nan_to_num((a.double() - b.double()).abs(), nan=torch.inf).masked_fill(same, -1)
    worst = int(distance.argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), actual.shape)) if actual.dim() else ()
    raise AssertionError(
        f"{what}: {int((~same).sum())} of {len(a)} elements differ, worst at {at}: "
        f"got {a[worst].item():.9g}, expected {b[worst].item():.9g}"
    )
