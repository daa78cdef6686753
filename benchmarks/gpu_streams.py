"""Checks that kernels run on the current stream and on the device of their arguments, and that graphs can capture them.

This is a stage of ``make gpu``. A rehearsal has one stream and one device, and makes a second call instead of a replay.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CYCLES = 30_000_000  # keeps the device busy for some 20 ms; a kernel on another stream would be done by then


def rows_of(where) -> Iterator[dict]:
    """A row for each op and each of our backends, with what was compared, or with the error."""
    from gpt2fast.backends import BACKENDS
    from gpt2fast.testing import find_ops

    from . import cases, gpu_stages

    for backend in ("triton", "cuda"):
        if not where.rehearse and (why := BACKENDS[backend].reason()):
            yield dict(target=backend, what="left out", left_out=why)
            continue
        for op in find_ops([]):
            if op.key in BACKENDS[backend].kernels:
                case = gpu_stages.smallest(op)
                row = dict(op=op.name, target=backend, case=cases.describe(case))
                yield gpu_stages.attempt(row, functools.partial(compare, where, op, backend, case))


def compare(where, op, backend: str, case: dict) -> dict:
    """Raises AssertionError if results on a side stream, on a second device or in a graph have different bits."""
    from gpt2fast.backends import use_backend
    from gpt2fast.testing.inputs import build

    first, second = (build(op, case, torch.float32, seed=seed) for seed in (0, 1))
    compared = []
    with where.machine(), use_backend(backend):
        expected = [results(op, on(args, where.device)) for args in (first, second)]
        where.synchronize()
        same(on_a_side_stream(where, op, first), expected[0], "on a side stream")
        compared.append("side stream")
        if not where.rehearse and torch.cuda.device_count() > 1:
            # The current device stays the first one.
            other = [x.to(where.device) for x in results(op, on(first, "cuda:1"))]
            same(other, expected[0], "on the second device")
            compared.append("second device")
        same(in_a_graph(where, op, first, second), expected[1], "in a graph")
        compared.append("graph")
    return dict(what=", ".join(compared))


def on_a_side_stream(where, op, args: dict) -> list[Tensor]:
    """The results of a call on another stream, on which the arguments are written late. A kernel on a wrong stream
    would read them too early."""
    source, late = (on(args, where.device) for _ in range(2))  # a copy between them does not block the host
    empty(late)
    where.synchronize()
    stream = contextlib.nullcontext() if where.rehearse else torch.cuda.stream(torch.cuda.Stream())
    with stream:
        if not where.rehearse:
            torch.cuda._sleep(CYCLES)
        copy(source, late)
        found = results(op, late)
    where.synchronize()
    return found


def in_a_graph(where, op, first: dict, second: dict) -> list[Tensor]:
    """The results of a graph that is captured with ``first`` and replayed after its arguments became ``second``."""
    args = on(first, where.device)
    call = functools.partial(results, op, args, copied=False)
    if where.rehearse:
        call()
        copy(second, args)
        return call()
    with torch.cuda.stream(torch.cuda.Stream()):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    copy(second, args)
    graph.replay()
    torch.cuda.synchronize()
    return found


def results(op, args: dict, copied: bool = True) -> list[Tensor]:
    """The outputs of a call. If the op changes arguments, these are its outputs; ``copied`` returns copies of them."""
    from gpt2fast.testing.inputs import tensors_of

    out = op.overload(**args)
    if op.mutates:
        changed = tensors_of({name: args[name] for name in op.mutates})
        return [t.clone() for t in changed] if copied else list(changed)
    return list(out) if isinstance(out, tuple) else [out]


def same(found: list[Tensor], expected: list[Tensor], where: str) -> None:
    from gpt2fast.testing.promise import assert_same

    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_same(a, b, f"output {i} {where}, beside the default stream's")


def on(args: dict, device: str) -> dict:
    """A copy of the arguments on a device."""
    return _each(lambda t: t.detach().to(device, copy=True), args)


def empty(args: dict) -> None:
    """Fills floating-point tensors with NaN. Other tensors stay as they are, since indices must be in range."""
    _each(lambda t: t.fill_(float("nan")) if t.is_floating_point() else t, args)


def copy(source: dict, into: dict) -> None:
    """Copies the tensors of ``source`` into those of ``into``, in place."""
    from gpt2fast.testing.inputs import tensors_of

    for a, b in zip(tensors_of(source), tensors_of(into), strict=True):
        b.copy_(a)


def _each(function: Callable[[Tensor], Tensor], args: dict) -> dict:
    from gpt2fast.testing.inputs import every

    return {name: every(function, value) for name, value in args.items()}
