"""An op is declared once: the decorated function's signature is the schema, its body the reference of every test.

``@op`` registers ``backends.choose`` under every device (and a second time as ``gpt2fast_fallback::name``, where native
kernels send what they do not cover) and the reference for meta tensors, ``@name.backward`` the derivative above every
backend, and the autocast rule above that.
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
    """A declared op. Calling it returns what users want; ``op.overload`` also returns what the backward pass needs."""

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
    differentiable: bool  # whether @name.backward is to follow
    has_derivative: bool = False
    required = inspect.Parameter.empty  # what defaults hold for an argument without one
    autograd_function: type[torch.autograd.Function] | None = None
    backward_ops: tuple["Op", ...] = ()
    kernels, kernel = kernel_sources.add_kernels, kernel_sources.add_kernel

    def __post_init__(self):
        self.overload = getattr(getattr(torch.ops, self.namespace), self.name).default
        self._entry = self.overload._op  # what the overload calls, without its frame
        self.names = tuple(self.signature.parameters)
        self.defaults = tuple(p.default for p in self.signature.parameters.values())
        self.tensors = tuple(n for n, p in self.signature.parameters.items() if _holds_tensor(p.annotation))
        self.optional = tuple(n for n in self.tensors if self.signature.parameters[n].default is None)
        self.outputs = self.returns + self.saves

    def __call__(self, *args, **kwargs):
        if is_dynamo_compiling():  # it knows overloads
            out = self.overload(*args, **kwargs)
        elif args and (backends.cpu_counts_as_cuda() or getattr(args[0], "is_cuda", False)):
            out = direct.run(self, args, kwargs)
            if out is NotImplemented:
                out = self.overload(*args, **kwargs)
        else:  # a tenth of a small op's time is saved by going below the overload
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
        """Arguments of the sizes named, by letter, and 64 elsewhere: to ask ``backends.choose``, not to compute with.

        A tensor takes the memory of one element, whatever its shape.
        """
        values = {n: 64 if p.default is p.empty else p.default for n, p in self.signature.parameters.items()}
        for name in self.tensors:
            if name not in self.optional:
                spec = _shapes.resolve(self.shapes[name], values)
                values[name] = _shapes.example(spec, sizes, dtype, device)
        return values

    def choose_and_run(self, *args, **kwargs):
        """What the dispatcher calls where no native kernel is."""
        return backends.run(self, args, kwargs)

    @property
    def lack(self) -> str:
        """Of an op without a derivative what a backward pass through it raises."""
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
        """Raises ValueError or TypeError, naming op, argument, expected and got; returns the sizes by letter."""
        return _shapes.check(self.qualified, self.shapes, args)

    def check_values(self, **values: Any) -> None:
        """Raises ValueError where one of these arguments, each judged alone, is not what the declaration wants."""
        _values.check(self.qualified, [rule for rule in self.rules if rule.name in values], values, {})

    def bind(self, args: Sequence, kwargs: dict) -> dict[str, Any]:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def backward(self, saves: str = "", through: Sequence["Op"] = ()):
        """Registers the derivative, once, above every backend.

        ``saves`` names the inputs and outputs to keep. The function gets them (and every non-tensor argument) as
        attributes of ``saved`` and the gradients of the outputs as attributes of ``grad`` (None where not needed),
        with ``saved.needs`` the set of inputs that want one, and returns a dict from input to gradient.
        ``through`` names the ops that it calls, for reports.
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
    fused_unless: Callable[..., str | None] | None = None,
    fused_is_differentiable: Callable[..., bool] | None = None,
    fused_calls: Sequence[Op] = (),
    baseline: Callable | None = None,
    naive: Callable | None = None,
    namespace: str = NAMESPACE,
) -> Callable[[Callable], Op]:
    """Declares an op by its PyTorch reference; the same name once more, as in a notebook, replaces that op.

    Args:
        shapes: per tensor argument its dimensions by letter, ``"B T C"``; ``...`` for any leading ones, ``C|1`` for a
            broadcast one, a digit for itself, ``: int64`` for a dtype other than that of the first floating tensor;
            ``"each"`` for a list of tensors of any shapes, the same ones in every such list;
            ``"N K if transposed else K N"`` by an argument, or a function from the arguments to such a text, which
            no kernel in C++ can obey.
        values: per argument what its values must be, ``"[0, V)"`` or ``"tanh | none"``; gpt2fast/values.py has it all.
        cases: sizes by letter, plus non-tensor arguments by name and ``name=True`` for optional tensors to include.
        returns, saves: names of the outputs that a call returns, and of those kept for the backward pass.
        make: per argument a function ``(shape, case, generator) -> tensor`` where random normals are wrong.
        flops: function from a case to floating-point operations.
        autocast: ``"lower"`` (to the autocast dtype), ``"float32"`` or ``"widest"`` (of the arguments).
        mutates: arguments that the op changes in place; such an op returns nothing and has no derivative.
        dtypes: of the floating arguments, tested and benchmarked.
        derivative: whether ``@name.backward`` will follow; if not, a backward pass through it raises.
        derivative_of: the op whose gradients this one computes; it has no derivative itself. Its outputs are named
            ``d`` and the input's name, its arguments ``d`` and the output's name for gradients, the rest as there.
        fused: PyTorch's own fastest way to all outputs that keeps the parity rule; it runs what no kernel covers.
            Without it the reference does.
        fused_unless: why ``fused`` does not compute a call, or None; the reference runs the call then.
        fused_is_differentiable: whether PyTorch's autograd through ``fused`` does what the derivative's own fused ways
            do for a call; on a GPU it is then left to it, which takes less time on the host.
        fused_calls: the ops that ``fused`` is made of. Each chooses for itself, so that a backend named by
            ``use_backend`` that has no kernel of this op runs it too, and raises only where it lacks one of those.
        baseline: PyTorch's fastest way to what a call returns, for benchmarks, where ``fused`` computes more than that.
        naive: the plain composition, for benchmarks. All of these take the op's arguments.
    """
    if autocast not in ("lower", "float32", "widest"):
        raise ValueError(f"autocast must be 'lower', 'float32' or 'widest', got {autocast!r}")

    def declare(function: Callable) -> Op:
        name, signature = function.__name__, inspect.signature(function)
        schema = _schema_of(f"{namespace}::{name}", function, signature, mutates)
        outputs = () if mutates else (*returns.split(), *saves.split())
        _check_declaration(f"{namespace}::{name}", signature, schema, outputs, shapes, mutates)
        rules = _values.parse(f"{namespace}::{name}", values or {}, tuple(signature.parameters))
        functions = dict(fused=fused, fused_unless=fused_unless, baseline=baseline, naive=naive)
        functions |= dict(fused_is_differentiable=fused_is_differentiable)
        _check_functions(f"{namespace}::{name}", signature, **functions)
        check_call = _shapes.compile_check(f"{namespace}::{name}", signature, shapes, rules)

        @functools.wraps(function)
        def reference(*args, **kwargs):
            check_call(*args, **kwargs)
            return function(*args, **kwargs)

        libraries = registration.define(namespace, name, schema)
        declared = libraries.declared = libraries.declared or Op.__new__(Op)  # declared again, an op is the same object
        vars(declared).clear()
        declared.__init__(
            name, namespace, reference, signature, schema, shapes, rules, list(cases), tuple(returns.split()),
            tuple(saves.split()), make or {}, flops, autocast, tuple(mutates), tuple(dtypes), fused,
            fused_unless, baseline, naive, derivative_of, check_call, fused_is_differentiable,
            tuple(fused_calls), derivative and not mutates and derivative_of is None,
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
    """By torch, from the annotations; ValueError with torch's reason where they do not say enough."""
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
    """Raises ValueError where the words of ``@op`` do not fit the function below it."""
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
    """Raises ValueError where a function of ``@op`` that takes the op's arguments has others."""
    wanted = list(signature.parameters)
    for option, function in functions.items():
        if function is not None and (got := list(inspect.signature(function).parameters)) != wanted:
            raise ValueError(
                f"{op}: {option}= must take the op's arguments ({', '.join(wanted)}), got ({', '.join(got)})"
            )
