"""The promises about how an op behaves in PyTorch and in memory. Numbers and derivatives have files of their own."""

import contextlib
import gc
import uuid
from typing import Any

import torch
from torch import Tensor

from .. import backends, shapes
from ..op import Op
from .inputs import LAYOUTS, build, call, cast, every, flops, names_of_outputs, outputs_of, tensors_of
from .isa import cpu_isa
from .parity import assert_close_to_truth
from .promise import MODERATE, assert_same, dtypes_of, first_case, floating, floating_outputs, promise


@promise
def passes_opcheck(op: Op, case: dict[str, Any]) -> None:
    """The op passes ``torch.library.opcheck``: schema, fake tensors, autograd and AOT dispatch."""
    for layout in LAYOUTS[:2]:
        args = build(op, case, layout=layout)
        if op.has_derivative:
            args = {n: v.requires_grad_() if n in floating(args) else v for n, v in args.items()}
        torch.library.opcheck(op.overload, (), args)


@promise
def compiles_whole(op: Op) -> None:
    """``torch.compile(fullgraph=True)`` gives what the op gives, in the backward pass too if there is one."""
    case = first_case(op, MODERATE, lambda c: not op.has_derivative or c.get("B", c.get("R", 2)) > 1)
    with _compiling_anew():
        _compiles_whole(op, case)


@contextlib.contextmanager
def _compiling_anew():
    """Inside, torch.compile does not use its cache, which knows ops by name only and not what they compute."""
    torch._dynamo.reset()
    with torch.compiler.config.patch(cache_key_tag=uuid.uuid4().hex):
        yield


def _compiles_whole(op: Op, case: dict[str, Any]) -> None:
    args = build(op, case)
    if not op.has_derivative:
        compiled = outputs_of(op, torch.compile(lambda **kw: op.overload(**kw), fullgraph=True), args)
        for name, a, b in zip(names_of_outputs(op, args), compiled, call(op, args), strict=True):
            assert_same(a, b, f"{op.qualified}: {name}, compiled, for {case}")
        return
    names = floating(args)

    def run(compiled: bool, args: dict[str, Any]) -> list[Tensor]:
        def function(*tensors):
            outs = floating_outputs(op(**(args | dict(zip(names, tensors)))))
            return sum((o.square() / 2).sum() for o in outs)

        leaves = [args[n].clone().requires_grad_() for n in names]
        (torch.compile(function, fullgraph=True) if compiled else function)(*leaves).backward()
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]

    actual = run(True, args)
    with backends.use_backend("reference"):
        plain, truth = run(False, args), run(False, cast(args, torch.float64))
    for name, *tensors in zip(names, actual, plain, truth):
        assert_close_to_truth(*tensors, f"{op.qualified}: d{name}, compiled, for {case}")


@promise
def autocast_casts_as_declared(op: Op) -> None:
    """Under autocast, the op gives the same bits as a call with arguments cast as ``autocast=`` says.

    Gradients have the dtype of the inputs, also where the backward pass is under autocast. Mixed dtypes are cast.
    """
    case = first_case(op, MODERATE)
    for dtype in dtypes_of(op, torch.float32, torch.bfloat16):
        args = build(op, case, dtype)
        target = {"lower": torch.bfloat16, "float32": torch.float32, "widest": dtype}[op.autocast]
        data = [n for n in floating(args) if shapes.parse(shapes.resolve(op.shapes[n], args))[1] is None]
        expected = call(op, args | {n: args[n].to(target) for n in data})
        with torch.autocast("cpu", torch.bfloat16):
            found = call(op, args)
        for name, a, b in zip(names_of_outputs(op, args), found, expected, strict=True):
            assert_same(a, b, f"{op.qualified}: {name} of {dtype} under autocast for {case}")
    if not op.has_derivative:
        return
    args = build(op, case)
    leaves = {n: v.requires_grad_() for n, v in args.items() if n in floating(args)}
    outs = floating_outputs(op(**args))
    reached = torch.autograd.grad(sum(o.sum() for o in outs), list(leaves.values()), allow_unused=True)
    with torch.autocast("cpu", torch.bfloat16):
        outs = floating_outputs(op(**args))
        sum(o.float().sum() for o in outs).backward()  # the *_backward op is under autocast too
    for (name, leaf), gradient in zip(leaves.items(), reached):
        if gradient is not None:
            got = None if leaf.grad is None else leaf.grad.dtype
            assert got == leaf.dtype, f"{op.qualified}: d{name} under autocast must be {leaf.dtype}, got {got}"
    mixed = {n: v.detach().bfloat16() if i == 0 else v for i, (n, v) in enumerate(leaves.items())}
    with torch.autocast("cpu", torch.bfloat16):  # mixed dtypes raise no error
        op(**(args | mixed))


@promise
def repeats_bit_for_bit(op: Op, case: dict[str, Any]) -> None:
    """Two calls with the same arguments give the same bits."""
    args = build(op, case)
    for name, a, b in zip(names_of_outputs(op, args), call(op, args), call(op, args)):
        assert_same(b, a, f"{op.qualified}: {name} of a second call for {case}")


@promise
def thread_count_changes_no_bit(op: Op) -> None:
    """One thread and two give the same bits, for the largest case that does not take long."""
    case = max((c for c in op.cases if flops(op, c) < 3e9), key=lambda c: flops(op, c), default=None)
    case = first_case(op, MODERATE) if case is None else case
    before = torch.get_num_threads()
    try:
        for dtype in op.dtypes:
            args = build(op, case, dtype)
            torch.set_num_threads(2)
            two = call(op, args)
            torch.set_num_threads(1)
            for name, a, b in zip(names_of_outputs(op, args), call(op, args), two):
                assert_same(a, b, f"{op.qualified}: {name} of {dtype} on one thread after two for {case}")
    finally:
        torch.set_num_threads(before)


@promise
def stays_inside_its_buffers(op: Op, isa: str) -> None:
    """The native CPU kernel writes only into its outputs: guard bytes around every CPU tensor stay as they are.

    ``isa`` is the instruction set that runs. The check needs the compiled extension.
    """
    runs = [(case, dtype) for case in op.cases if flops(op, case) < 5_000_000 for dtype in op.dtypes]
    runs = runs or [(first_case(op, MODERATE), dtype) for dtype in op.dtypes]
    if not _damaged(op, isa, runs):
        return
    guilty = next((run for run in runs if _damaged(op, isa, [run])), None)
    where = f"{guilty[0]} in {guilty[1]}" if guilty else "several cases one after the other"
    raise AssertionError(f"{op.qualified}: the CPU kernel for {isa} writes outside its buffers for {where}")


def _damaged(op: Op, isa: str, runs: list[tuple[dict, torch.dtype]]) -> int:
    """The number of tensors whose guard bytes these calls changed."""
    before = backends._C.guard_memory(True)
    try:
        with cpu_isa(isa):
            for case, dtype in runs:
                call(op, build(op, case, dtype))
        gc.collect()
    finally:
        after = backends._C.guard_memory(False)
    return after - before


def _ways(op: Op):
    """Yields (name, function, context) for every way to compute the op on this CPU that a user may get."""
    yield "the op", op.overload, contextlib.nullcontext
    if op.fused is not None:
        yield "fused=", op.overload, lambda: backends.use_backend("fused")
    yield "the reference", op.reference, contextlib.nullcontext


@promise
def returns_new_tensors(op: Op, case: dict[str, Any]) -> None:
    """No output is an input, a view of an input or a view of another output. An op with ``mutates=`` has no outputs."""
    if op.mutates:
        return
    for dtype in op.dtypes:
        for layout in LAYOUTS[:2]:
            args = build(op, case, dtype, layout)
            for where, function, context in _ways(op):
                with context():
                    out = function(**args)
                _assert_new(op, args, out if isinstance(out, tuple) else (out,), f"{where} in {dtype} for {case}")


def _assert_new(op: Op, args: dict[str, Any], outs: tuple[Tensor, ...], where: str) -> None:
    earlier = [
        (f"input {name}", tensor)
        for name, value in args.items()
        for tensor in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(tensor, Tensor)
    ]
    for name, out in zip(op.outputs, outs, strict=True):
        for other, tensor in earlier:
            if out.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
                how = "is" if out is tensor else "shares the memory of"
                raise AssertionError(
                    f"{op.qualified}: output {name} of {where} {how} {other}; it must be a new tensor, as of .clone()"
                )
        earlier.append((f"output {name}", out))


@promise
def leaves_its_inputs_alone(op: Op, case: dict[str, Any]) -> None:
    """Inputs, and the memory between their rows, do not change, except for the inputs that ``mutates=`` names."""
    for dtype in op.dtypes:
        for layout in LAYOUTS[:2]:
            for where, function, context in _ways(op):
                args = build(op, case, dtype, layout)
                before = {n: every(torch.clone, v) for n, v in args.items()}
                memory = {n: [_memory(t) for t in tensors_of({n: v})] for n, v in args.items() if n not in op.mutates}
                copies = {n: [m.clone() for m in members] for n, members in memory.items()}
                with context():
                    function(**args)
                for name in memory:
                    what = f"{op.qualified}: input {name} after {where} in {dtype} for {case}, not named in mutates="
                    for a, b in zip(tensors_of({name: args[name]}), tensors_of({name: before[name]})):
                        assert_same(a, b, what)
                    for a, b in zip(memory[name], copies[name]):
                        assert torch.equal(a, b), f"{what}: memory between its rows is changed"


def _memory(tensor: Tensor) -> Tensor:
    """All bytes of the storage of a tensor, as a view."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
