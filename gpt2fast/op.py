"""The decorator ``@op``, which declares an op from its PyTorch reference.

The signature of the decorated function becomes the op's schema. Its body is the reference of every test.

``@op`` registers with torch's dispatcher:

- ``backends.choose`` for every device, and once more as ``gpt2fast_fallback::name``. Native kernels send the calls that
  they do not cover to the latter.
- the reference, for meta tensors.
- the autocast rule, which runs before the derivative.

``@name.backward`` registers the derivative, which runs before any backend.
"""

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from . import backends, direct, kernel_sources, registration, second
from . import flops as counting
from . import shapes as _shapes
from . import values as _values

NAMESPACE = "gpt2fast"
OPS: dict[str, "Op"] = {}


@dataclass(eq=False)
class Op:
    """A declared op. A call returns the outputs in ``returns``; ``op.overload`` also returns those in ``saves``."""

    name: str
    namespace: str
    reference: Callable
    signature: inspect.Signature
    schema: str
    shapes: dict[str, Any]
    rules: list[_values.Rule]
    cases: list[dict]
    returns: tuple[str, ...]
    saves: tuple[str, ...]
    make: dict[str, Callable]
    flops: Callable | None
    autocast: str
    mutates: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    fused: Callable | None
    fused_unless: Callable[..., str | None] | None
    baseline: Callable | None
    naive: Callable | None
    derivative_of: "Op | None"
    check_call: Callable[..., None]
    fused_is_differentiable: Callable[..., bool] | None
    fused_calls: tuple["Op", ...]
    fused_returns: Callable[..., Any] | None
    differentiable: bool  # whether @name.backward is to follow
    has_derivative: bool = False
    required = inspect.Parameter.empty  # stands in ``defaults`` for an argument that has no default
    autograd_function: type[torch.autograd.Function] | None = None
    backward_ops: tuple["Op", ...] = ()
    kernels, kernel = kernel_sources.add_kernels, kernel_sources.add_kernel

    def __post_init__(self):
        self.overload = getattr(getattr(torch.ops, self.namespace), self.name).default
        self._entry = self.overload._op  # the function that the overload's Python wrapper calls
        self.names = tuple(self.signature.parameters)
        self.defaults = tuple(p.default for p in self.signature.parameters.values())
        self.tensors = tuple(n for n, p in self.signature.parameters.items() if _holds_tensor(p.annotation))
        self.tensor_places = tuple(self.names.index(n) for n in self.tensors)
        self.optional = tuple(n for n in self.tensors if self.signature.parameters[n].default is None)
        self.outputs = self.returns + self.saves

    def __call__(self, *args, **kwargs):
        if is_dynamo_compiling():  # dynamo can trace an overload, but not ``_entry``
            out = self.overload(*args, **kwargs)
        elif args and (backends.hides_native_kernels() or getattr(args[0], "is_cuda", False)):
            out = direct.run(self, args, kwargs)
            if out is NotImplemented:
                out = self.overload(*args, **kwargs)
        else:  # calling ``_entry`` instead of the overload saves a tenth of a small op's time
            out = self._entry(*args, **kwargs)
        if not self.saves:
            return out
        return out[0] if len(self.returns) == 1 else out[: len(self.returns)]

    def __repr__(self):
        return f"<op {self.namespace}::{self.name}{self.schema}>"

    @property
    def qualified(self) -> str:
        return f"{self.namespace}::{self.name}"

    @property
    def key(self) -> str:
        """The op's name in ``OPS``: with its namespace where that is not ours."""
        return self.name if self.namespace == NAMESPACE else self.qualified

    def example(
        self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", **sizes: int
    ) -> dict[str, Any]:
        """Example arguments to ask ``backends.choose`` with; they are not meant to be computed with.

        ``sizes`` gives sizes by letter; every other size is 64. A tensor takes the memory of one element, whatever its
        shape.
        """
        values = {n: 64 if p.default is p.empty else p.default for n, p in self.signature.parameters.items()}
        for name in self.tensors:
            if name not in self.optional:
                spec = _shapes.resolve(self.shapes[name], values)
                values[name] = _shapes.example(spec, sizes, dtype, device)
        return values

    def choose_and_run(self, *args, **kwargs):
        """The dispatcher calls this where there is no native kernel."""
        return backends.run(self, args, kwargs)

    @property
    def lack(self) -> str:
        """The text of the error that a backward pass through an op without a derivative raises."""
        if not self.differentiable:
            return f"{self.qualified} has no derivative"
        return (
            f"{self.qualified} has no derivative yet: register one by @{self.name}.backward(...), or declare the op "
            "with derivative=False"
        )

    @property
    def summary(self) -> str:
        return (self.reference.__doc__ or "").strip().split("\n")[0]

    def check(self, args: dict[str, Any]) -> dict[str, Any]:
        """Checks shapes, dtypes and devices, and returns the sizes by letter.

        Raises ValueError or TypeError that names the op, the argument, what was expected and what came.
        """
        return _shapes.check(self.qualified, self.shapes, args)

    def check_values(self, **values: Any) -> None:
        """Checks these arguments, without the others, by the rules of ``values=``; raises ValueError."""
        _values.check(self.qualified, [rule for rule in self.rules if rule.name in values], values, {})

    def bind(self, args: Sequence, kwargs: dict) -> dict[str, Any]:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def backward(self, saves: str = "", through: Sequence["Op"] = ()):
        """Registers the decorated function as the op's derivative, for all backends.

        ``saves`` names the inputs and outputs to keep for the backward pass. The function is called with two
        namespaces. ``saved`` has what was kept, every non-tensor argument, and ``saved.needs``, the set of inputs that
        need a gradient. ``grad`` has the gradients of the outputs (None where not needed). The function returns a dict
        from input to gradient. ``through`` lists the ops that it calls, for reports.
        """
        kept = saves.split()

        def register(function):
            def setup(ctx, inputs, output):
                values = dict(zip(self.signature.parameters, inputs))
                outputs = output if isinstance(output, tuple) else (output,)
                found = values | dict(zip(self.outputs, outputs))
                ctx.save_for_backward(*(found[name] for name in kept))
                ctx.rest = {n: v for n, v in values.items() if n not in self.tensors}
                ctx.mark_non_differentiable(
                    *(t for n, t in zip(self.outputs, outputs) if n in self.saves or not t.is_floating_point())
                )

            def derivative(ctx, *grads):
                needs = {n for n, wanted in zip(self.signature.parameters, ctx.needs_input_grad) if wanted}
                saved = SimpleNamespace(**ctx.rest, **dict(zip(kept, ctx.saved_tensors)), needs=needs)
                found = function(saved, SimpleNamespace(**dict(zip(self.outputs, grads))))
                return tuple(found.get(n) if n in needs else None for n in self.signature.parameters)

            registration.register_autograd(self, derivative, setup)
            self.autograd_function = direct.autograd_function(self, setup, derivative)
            self.has_derivative, self.backward_ops = True, tuple(through)
            return self

        return register


def op(
    *,
    shapes: dict[str, Any],
    cases: list[dict],
    returns: str = "y",
    saves: str = "",
    values: dict[str, str] | None = None,
    make: dict[str, Callable] | None = None,
    flops: Callable | None = None,
    autocast: str = "widest",
    mutates: Sequence[str] = (),
    dtypes: Sequence[torch.dtype] = registration.FLOATING,
    derivative: bool = True,
    derivative_of: Op | None = None,
    fused: Callable | None = None,
    fused_returns: Callable | None = None,
    fused_unless: Callable[..., str | None] | None = None,
    fused_is_differentiable: Callable[..., bool] | None = None,
    fused_calls: Sequence[Op] = (),
    baseline: Callable | None = None,
    naive: Callable | None = None,
    namespace: str = NAMESPACE,
) -> Callable[[Callable], Op]:
    """Declares an op from its PyTorch reference. To declare the same name again, as in a notebook, replaces the op.

    Args:
        shapes: the dimensions of each tensor argument, by letter: ``"B T C"``. ``...`` stands for any leading
            dimensions, ``C|1`` for C or a broadcast 1, a digit for itself, and ``: int64`` for a dtype other than that
            of the first floating tensor. ``"each"`` is a list of tensors of any shapes; all such lists of a call have
            the same shapes. A shape may depend on an argument, ``"N K if transposed else K N"``, or be a function from
            the arguments to such a text. Kernels in C++ cannot use a function.
        values: the values that an argument may have, ``"[0, V)"`` or ``"tanh | none"``; see gpt2fast/values.py.
        cases: test cases: sizes by letter, non-tensor arguments by name, ``name=True`` to include an optional tensor.
        returns, saves: names of the outputs that a call returns, and of those kept for the backward pass.
        make: functions ``(shape, case, generator) -> tensor`` for the arguments that must not be random normals.
        flops: function from a case to its number of floating-point operations.
        autocast: ``"lower"`` (to the autocast dtype), ``"float32"`` or ``"widest"`` (of the arguments).
        mutates: arguments that the op changes in place. Such an op returns nothing and has no derivative.
        dtypes: the dtypes of the floating arguments that are tested and benchmarked.
        derivative: whether ``@name.backward`` will follow. If not, a backward pass through the op raises.
        derivative_of: the op whose gradients this op computes. Its outputs are called ``d`` plus the name of the input.
            An argument that is a gradient is called ``d`` plus the name of the output. The other arguments have the
            names that they have in that op.
        fused: PyTorch's own fastest way to compute all outputs within the parity rule. It runs the calls that no kernel
            covers. Without it, the reference runs them.
        fused_returns: the same for the outputs in ``returns`` alone, where that takes less time. It runs in place of
            ``fused`` where autograd does not record the call and the call does not go through torch's dispatcher. It
            needs ``saves``.
        fused_unless: function that returns why ``fused`` must not run a call, or None. The reference runs it instead.
        fused_is_differentiable: function that tells whether PyTorch's autograd through ``fused`` does the same for a
            call as the fused backward. On a GPU, PyTorch's autograd is then used, which takes less time on the host.
        fused_calls: the ops that ``fused`` calls. Each of them chooses its own backend. A backend named by
            ``use_backend`` that has no kernel of this op can therefore run it too, if it covers those ops.
        baseline: PyTorch's fastest way to what a call returns, for benchmarks, where ``fused`` computes more than that.
        naive: the plain composition of PyTorch operations, for benchmarks.

    All of the functions but those of ``make``, ``flops`` and ``shapes`` take the op's arguments.
    """
    if autocast not in ("lower", "float32", "widest"):
        raise ValueError(f"autocast must be 'lower', 'float32' or 'widest', got {autocast!r}")

    def declare(function: Callable) -> Op:
        name, signature = function.__name__, inspect.signature(function)
        schema = _schema_of(f"{namespace}::{name}", function, signature, mutates)
        outputs = () if mutates else (*returns.split(), *saves.split())
        _check_declaration(f"{namespace}::{name}", signature, schema, outputs, shapes, mutates)
        rules = _values.parse(f"{namespace}::{name}", values or {}, tuple(signature.parameters))
        functions = dict(fused=fused, fused_returns=fused_returns, fused_unless=fused_unless)
        functions |= dict(baseline=baseline, naive=naive, fused_is_differentiable=fused_is_differentiable)
        _check_functions(f"{namespace}::{name}", signature, **functions)
        if fused_returns is not None and (fused is None or not saves):
            raise ValueError(f"{namespace}::{name}: fused_returns= must come with fused= and saves=, got it alone")
        check_call = _shapes.compile_check(f"{namespace}::{name}", signature, shapes, rules)

        @functools.wraps(function)
        def reference(*args, **kwargs):
            check_call(*args, **kwargs)
            return function(*args, **kwargs)

        libraries = registration.define(namespace, name, schema)
        declared = libraries.declared = libraries.declared or Op.__new__(Op)  # declared again: the same object
        vars(declared).clear()
        declared.__init__(
            name, namespace, reference, signature, schema, shapes, rules, list(cases), tuple(returns.split()),
            tuple(saves.split()), make or {}, flops, autocast, tuple(mutates), tuple(dtypes), fused,
            fused_unless, baseline, naive, derivative_of, check_call, fused_is_differentiable,
            tuple(fused_calls), fused_returns, derivative and not mutates and derivative_of is None,
        )  # fmt: skip
        libraries.op.impl(name, reference, "Meta")
        for library in (libraries.op, libraries.fallback):
            library.impl(name, declared.choose_and_run, "CompositeExplicitAutograd")
        if mutates:
            registration.bump_versions(declared, libraries.op)
        elif derivative_of is not None:
            registration.register_autograd(declared, second.derivative(declared), second.setup(declared))
        else:  # until @name.backward registers one
            registration.refuse_backward(declared)
        registration.register_autocast(declared, libraries.op)
        functools.update_wrapper(declared, function)
        OPS[declared.key] = declared
        backends.declare(declared)
        backends.hide_native_kernel(declared)
        if flops is not None:
            counting.register(declared)
        return declared

    return declare


def _holds_tensor(annotation: Any) -> bool:
    return bool(re.search(r"\bTensor\b", str(annotation)))


def _schema_of(op: str, function: Callable, signature: inspect.Signature, mutates: Sequence[str]) -> str:
    """The schema that torch infers from the annotations; ValueError with torch's reason where it cannot."""
    try:
        return torch.library.infer_schema(function, mutates_args=tuple(mutates))
    except ValueError as error:
        reason = str(error).removeprefix("infer_schema(func): ").split(" Got func")[0].split(" The valid types")[0]
        raise ValueError(
            f"{op}: no schema can be inferred from {function.__name__}{signature}: {reason} Arguments must be Tensor, "
            "int, float, bool, str, Tensor | None or list[Tensor], each annotated and by name, and what is returned "
            "must be Tensor, a tuple of Tensor, or None with mutates="
        ) from None


def _check_declaration(op: str, signature, schema: str, outputs: Sequence[str], shapes, mutates) -> None:
    """Raises ValueError where the arguments of ``@op`` do not fit the decorated function."""
    parameters = signature.parameters
    for option, names in (("shapes", shapes), ("mutates", mutates)):
        if unknown := [name for name in names if name not in parameters]:
            raise ValueError(f"{op}: {option}= must name arguments, {', '.join(parameters)}, got {unknown[0]!r}")
    if missing := [n for n, p in parameters.items() if _holds_tensor(p.annotation) and n not in shapes]:
        raise ValueError(f"{op}: shapes= must say the shape of every tensor, got none for {missing[0]!r}")
    count = len(torch._C.parse_schema(op + schema).returns)
    if count != len(outputs):
        named = ", ".join(outputs) or "none"
        raise ValueError(f"{op}: returns= and saves= must name its {count} outputs, got {len(outputs)} ({named})")


def _check_functions(op: str, signature, **functions: Callable | None) -> None:
    """Raises ValueError where one of these functions, given to ``@op``, does not take the op's arguments."""
    wanted = list(signature.parameters)
    for option, function in functions.items():
        if function is not None and (got := list(inspect.signature(function).parameters)) != wanted:
            raise ValueError(
                f"{op}: {option}= must take the op's arguments ({', '.join(wanted)}), got ({', '.join(got)})"
            )
