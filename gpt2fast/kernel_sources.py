"""The backends and the places of their kernels.

A kernel is given as functions, or as a module that is imported at the first use of the kernel. A kernel module has a
dict ``KERNELS`` from an op's name in ``OPS`` to ``(run, supports)`` or ``(run, supports, slower)``; for an example, see
``kernels/gelu.py``.
"""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .op import Op


@dataclass(frozen=True)
class Kernel:
    """One op on one backend. All functions take the op's arguments, which have passed the checks of the declaration.

    ``run`` allocates all outputs and computes them. On a GPU it launches kernels, but neither waits for them nor reads
    values back, because ``generate`` captures it in a CUDA graph. ``supports`` returns why the kernel does not cover a
    call, or None. It may look at dtypes and shapes only, because it is also asked about meta tensors. ``slower`` is
    optional. For a call that is covered, it returns why another implementation is the better choice, or None. It has no
    effect where the backend is asked for by name.
    """

    run: Callable
    supports: Callable[..., str | None]
    slower: Callable[..., str | None] | None = None


class Kernels(MutableMapping[str, Kernel]):
    """A backend's kernels by the op's name in ``OPS``.

    ``kernels[name] = kernel`` and ``add_module(name, module)`` add to them. ``package``, if given, has a dict
    ``MODULES`` from an op's name to a kernel module. These kernels are included from the start.
    """

    def __init__(self, package: str | None = None, functions: Mapping[str, Kernel] | None = None):
        self.package, self._functions = package, dict(functions or {})
        self._imported: dict[str, Kernel] = {}
        self.others = set(self._functions)  # names of ops whose kernels do not come from the package

    @functools.cached_property
    def modules(self) -> dict[str, str]:
        """The kernel module of each op. It is empty where the package is not installed."""
        if self.package is None or not is_installed(self.package):
            return {}
        listed = importlib.import_module(self.package).MODULES
        return {name: f"{self.package}.{module}" for name, module in listed.items()}

    def add_module(self, name: str, module: str) -> None:
        """Sets the kernel of op ``name`` to the one in ``module``, which is imported at the first use."""
        self._forget(name)
        self.others.add(name)
        self.modules[name] = module

    def __setitem__(self, name: str, kernel: Kernel) -> None:
        self._forget(name)
        self.others.add(name)
        self._functions[name] = kernel

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self._forget(name)

    def _forget(self, name: str) -> None:
        self.others.discard(name)
        for part in (self._functions, self._imported, self.modules):
            part.pop(name, None)

    def __getitem__(self, name: str) -> Kernel:
        if name in self._functions:
            return self._functions[name]
        if name not in self._imported:
            self._imported[name] = _import_kernel(name, self.modules[name])
        return self._imported[name]

    def __contains__(self, name: object) -> bool:  # MutableMapping's own would import the module
        return name in self._functions or name in self.modules

    def __iter__(self) -> Iterator[str]:
        return iter({**self.modules, **self._functions})

    def __len__(self) -> int:
        return len({**self.modules, **self._functions})


def _import_kernel(name: str, module: str) -> Kernel:
    """The kernel of op ``name`` in ``module``; ImportError or TypeError with the fix where there is none."""
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ImportError(f"{name}: its kernel module {module!r} does not import: {error}") from error
        raise ImportError(
            f"{name}: there is no module {error.name!r}, where kernels(backend, {module!r}) says that its kernel is; "
            "install it, put its folder on PYTHONPATH, or correct the name"
        ) from error
    kernels = getattr(found, "KERNELS", None)
    if not isinstance(kernels, Mapping):
        raise TypeError(
            f"{name}: module {module!r} must have a dict KERNELS = {{{name!r}: (run, supports)}}, "
            f"got {'none' if kernels is None else type(kernels).__name__}"
        )
    if name not in kernels:
        got = ", ".join(map(repr, kernels)) or "none"
        raise TypeError(f"{name}: KERNELS of module {module!r} must have the op's name {name!r} as a key, got {got}")
    functions = kernels[name]
    if not (isinstance(functions, tuple) and len(functions) in (2, 3) and all(map(callable, functions))):
        raise TypeError(
            f"{name}: KERNELS[{name!r}] of module {module!r} must be (run, supports) or (run, supports, slower), "
            f"functions that take the op's arguments, got {functions!r}"
        )
    return Kernel(*functions)


@dataclass(frozen=True)
class Backend:
    """A named set of kernels; ``gpt2fast.backends.register`` adds one of your own.

    Args:
        name: its name in ``use_backend`` and reports. As a target of tests it is called ``name``, or ``name:gpu`` on a
            GPU.
        devices: the types of torch devices whose tensors it runs on, ``("cpu",)`` or ``("cuda",)``.
        reason: function without arguments that returns why the backend cannot run here, and the fix, or None.
        kernels: dict from op names in ``OPS`` to ``Kernel``. ``declared.kernels(name, module)`` and
            ``declared.kernel(name, run, supports)`` add more.
        what: a description in a few words.
    """

    name: str
    devices: Sequence[str]
    reason: Callable[[], str | None]
    kernels: Mapping[str, Kernel] = field(default_factory=Kernels)
    what: str = ""

    def __post_init__(self):
        if isinstance(self.kernels, dict):
            object.__setattr__(self, "kernels", Kernels(functions=self.kernels))


BACKENDS: dict[str, Backend] = {}  # ours come from backends.py
BUILT_IN = {
    "fused": "PyTorch's own fastest way that keeps the parity rule",
    "reference": "plain PyTorch in float32, the oracle of the tests, on any device",
}
OURS = ("cpu", "triton", "cuda")


class register:  # noqa: N801
    """Adds a backend of your own, from now on or inside a ``with`` block.

    Where several backends run on one device, the one that was registered first and covers a call runs it. On CPU
    tensors, a kernel in C++ runs before all others. ``use_backend(name)`` runs your backend only,
    ``gpt2fast.testing.targets()`` includes it where it can run, and ``info`` shows its ``reason()``. Raises ValueError
    for a name that is taken or not valid, or for a device that torch does not know, and TypeError for an argument that
    is not a Backend.
    """

    def __init__(self, backend: Backend):
        if not isinstance(backend, Backend):
            raise TypeError(f"gpt2fast: register must be given a gpt2fast.backends.Backend, got {backend!r}")
        name = backend.name
        if name in ("auto", *BACKENDS, *BUILT_IN):
            raise ValueError(f"gpt2fast: there is a backend {name!r} already; give yours another name")
        if not (isinstance(name, str) and name.isidentifier()):
            raise ValueError(f"gpt2fast: a backend's name must be letters, digits and _, got {name!r}")
        if isinstance(backend.devices, str) or not backend.devices:
            raise ValueError(f"gpt2fast: devices of backend {name!r} must be like ('cpu',), got {backend.devices!r}")
        for device in backend.devices:
            try:
                known = torch.device(device).type == device
            except RuntimeError:
                known = False
            if not known:
                raise ValueError(
                    f"gpt2fast: devices of backend {name!r} must be types of torch devices, got {device!r}"
                )
        self.backend = BACKENDS[name] = backend

    def __enter__(self) -> Backend:
        return self.backend

    def __exit__(self, *exception):
        unregister(self.backend.name)


def unregister(name: str) -> None:
    """Removes a backend that ``register`` added.

    Raises ValueError for any other name, and RuntimeError for the backend in force.
    """
    from . import backends  # imported here, because backends.py imports this module

    others = [n for n in BACKENDS if n not in OURS]
    if name not in others:
        known = ", ".join(others) or "none now"
        raise ValueError(f"gpt2fast: unregister takes a backend of your own ({known}), got {name!r}")
    if backends.active() == name:
        raise RuntimeError(f"gpt2fast: backend {name!r} is in force; leave use_backend({name!r}) first")
    del BACKENDS[name]


def add_kernels(declared: "Op", backend: str, module: str) -> "Op":
    """Names the module that has the op's kernel for a backend: ``declared.kernels("triton", "my_package.kernels")``.

    The module is imported at the first use, and triton with it, so that a package with kernels can be imported without
    triton. The module has ``KERNELS = {"my::op": (run, supports)}`` by the op's name in ``OPS``. ``run`` and
    ``supports`` are those of ``Kernel`` and take the op's arguments. Several ops may share a module. An earlier kernel
    of the op on that backend, ours included, is replaced. Returns the op. Raises ValueError for an unknown backend or
    text that is not a module's name. The first use raises ImportError where there is no such module, and TypeError
    where KERNELS or its functions do not fit.
    """
    if not (isinstance(module, str) and all(part.isidentifier() for part in module.split("."))):
        raise ValueError(
            f"{declared.qualified}: module must be its full name, 'my_package.kernels', got {module!r}; "
            "kernel(backend, run, supports) takes functions"
        )
    _kernels_of(declared, backend).add_module(declared.key, module)
    return declared


def add_kernel(
    declared: "Op",
    backend: str,
    run: Callable,
    supports: Callable[..., str | None],
    slower: Callable[..., str | None] | None = None,
) -> "Op":
    """Gives the op a kernel for a backend as functions: ``declared.kernel("numba", run, supports)``.

    The functions are those of ``Kernel`` and take the op's arguments. An earlier kernel of the op on that backend is
    replaced. Returns the op. Raises ValueError for an unknown backend, and TypeError where a function does not take the
    op's arguments.
    """
    kernels, kernel = _kernels_of(declared, backend), Kernel(run, supports, slower)
    check_fits(backend, kernel, declared)
    kernels[declared.key] = kernel
    return declared


def _kernels_of(declared: "Op", backend: str) -> Kernels:
    if backend not in BACKENDS:
        raise ValueError(
            f"{declared.qualified}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}; "
            "gpt2fast.backends.register(Backend(...)) adds one"
        )
    kernels = BACKENDS[backend].kernels
    if not isinstance(kernels, Kernels):
        raise ValueError(
            f"{declared.qualified}: backend {backend!r} must be one whose kernels are called from Python; those of "
            f"{backend!r} are registered with torch's dispatcher. For functions in Python register a backend of your "
            "own, gpt2fast.backends.register(Backend(...))"
        )
    return kernels


_fitting: dict[tuple[str, str], tuple[Kernel, inspect.Signature]] = {}  # those that passed check_fits


def fitting_kernel(backend: str, kernels: Mapping[str, Kernel], declared: "Op") -> Kernel:
    """The backend's kernel. Raises TypeError with both signatures where a function does not take the op's arguments."""
    kernel, key = kernels[declared.key], (backend, declared.key)
    known, signature = _fitting.get(key, (None, None))
    if known is not kernel or signature is not declared.signature:
        check_fits(backend, kernel, declared)
        _fitting[key] = kernel, declared.signature
    return kernel


def check_fits(backend: str, kernel: Kernel, declared: "Op") -> None:
    """Raises TypeError where a function of the kernel does not take the op's arguments or lacks one of the defaults."""
    wanted = list(declared.signature.parameters)
    for name in ("run", "supports", *(["slower"] if kernel.slower else [])):
        function = getattr(kernel, name)
        if not callable(function):
            raise TypeError(f"{declared.qualified}: {name} of backend {backend!r} must be a function, got {function!r}")
        taken = inspect.signature(function).parameters
        got = list(taken)
        if got not in (wanted, ["args", "kwargs"]):
            raise TypeError(
                f"{declared.qualified}: {name} of backend {backend!r} must take the op's arguments "
                f"({', '.join(wanted)}), got ({', '.join(got)})"
            )
        for argument, expected in declared.signature.parameters.items():
            if got == wanted and expected.default is not expected.empty is taken[argument].default:
                raise TypeError(
                    f"{declared.qualified}: {name} of backend {backend!r} must have the op's default "
                    f"{argument}={expected.default!r}, got none"
                )


@functools.cache
def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
