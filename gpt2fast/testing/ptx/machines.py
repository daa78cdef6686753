"""``with ptx.machine() as m``: kernels that are launched inside run as PTX on the CPU, are checked and counted."""

import functools
import threading
from collections.abc import Sequence

from torch import Tensor

from ... import backends
from . import core
from .arguments import lay_out, on_cpu, pack, words
from .launches import Error, Launch, MachineError
from .memory import Buffer, Memory
from .toolchain import WHAT

_lock = threading.Lock()
_active: "Machine | None" = None


@functools.lru_cache(maxsize=256)
def parse(ptx: str):
    """The parsed module. Raises ValueError where the text is not PTX.

    An unknown instruction is reported only when a kernel that has it is launched.
    """
    return core.load().Module(ptx)


class Machine:
    """Made by ``machine()``. ``launches`` has a report of each launch, in order."""

    def __init__(self, raise_errors: bool, budget: int, memcheck: bool, racecheck: bool, same_value_races: bool):
        self.launches: list[Launch] = []
        self.memory = Memory()
        self.pending: BaseException | None = None  # raised in a callback of C code
        self._raise, self._budget, self._checks = raise_errors, budget, (memcheck, racecheck, same_value_races)
        self._may_stay: set[int] = set()

    def __enter__(self) -> "Machine":
        global _active
        core.load()
        with _lock:
            if _active is not None:
                raise RuntimeError(f"{WHAT}: a machine is running already; machines do not nest")
            _active = self
        try:
            self._driver = _set_triton_driver()
        except BaseException:
            _active = None
            raise
        self.memory.watch()
        backends.cpu_stands_for_cuda(True)
        return self

    def __exit__(self, kind, value, traceback) -> None:
        global _active
        _active = None
        backends.cpu_stands_for_cuda(False)
        self.memory.unwatch()
        if self._driver is not None:
            self._driver.restore()
        if kind is None:
            if self.pending is not None:
                raise self.pending
            if errors := self.unwritten():
                if self._raise:
                    raise MachineError("memory that kernels were given was left unwritten", errors)

    def register(self, *tensors: Tensor, **named: Tensor) -> None:
        """Makes tensors known that kernels reach by a pointer in memory, such as one in a table of pointers."""
        for name, tensor in (*((f"tensor {i}", t) for i, t in enumerate(tensors)), *named.items()):
            self.memory.note(on_cpu(tensor, name), name)

    def may_stay_unwritten(self, *tensors: Tensor) -> None:
        """Exempts new tensors from the check at the end, for example padding or a workspace of the largest size."""
        self._may_stay.update(t.untyped_storage().data_ptr() for t in tensors)

    def unwritten(self) -> list[Error]:
        """An error for each fresh buffer that a launch was given, that still exists, and that is not fully written."""
        found = []
        for buffer in self.memory.alive():
            if not buffer.launched or buffer.address in self._may_stay:
                continue
            buffer.look_for_writes(None)
            if holes := buffer.unwritten():
                text = (
                    f"{holes[0]} of {buffer.bytes} bytes of {buffer.name} were never written, the first at {holes[1]}"
                )
                found.append(Error("unwritten", text, buffer=buffer.name))
        return found

    def launch(
        self, ptx: str, kernel: str, grid: Sequence[int], block: Sequence[int], *args: Tensor | float, shared: int = 0
    ) -> Launch:
        """Runs a kernel of a PTX text. ``args`` are tensors for pointers, and numbers, in the order of the parameters.

        Raises TypeError or ValueError where number, kind or size of the arguments do not fit the kernel.
        """
        module = parse(ptx)
        if kernel not in module.kernels:
            raise ValueError(f"{WHAT}: kernel must be one of {', '.join(module.kernels)}, got {kernel!r}")
        wanted = module.params(kernel)
        if len(args) != len(wanted):
            names = ", ".join(f"{p['name']}: {p['type']}" for p in wanted)
            raise TypeError(f"{WHAT}: {kernel} takes {len(wanted)} arguments ({names}), got {len(args)}")
        tensors = {p["name"]: a for p, a in zip(wanted, args) if isinstance(a, Tensor)}
        values = [pack(kernel, p, a) for p, a in zip(wanted, args)]
        return self.run(ptx, kernel, grid, block, shared, values, tensors)

    def run(
        self,
        ptx: str,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        shared: int,
        values: Sequence[bytes],
        tensors: dict[str, Tensor],
    ) -> Launch:
        """Runs a kernel. Every launch comes here.

        ``values`` are the bytes of the arguments, in the order of the parameters. ``tensors`` are those that they point
        into.
        """
        module = parse(ptx)
        params = lay_out(kernel, module.params(kernel), values)
        passed: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if (buffer := self.memory.note(on_cpu(tensor, name))) is not None:
                both = f"{passed[buffer.address][0]}, {name}" if buffer.address in passed else name
                passed[buffer.address] = both, tensor
        for address, (name, tensor) in passed.items():
            buffer = self.memory.at(address)
            buffer.name, buffer.launched = name, True
            buffer.look_for_writes(tensor)
        for word in words(params):
            if (freed := self.memory.at(word, alive=False)) and not self.memory.at(word):
                raise ValueError(f"{WHAT}: {kernel} was given a pointer into {freed.name}, which was freed before")
        grid, block = (tuple([*map(int, g), 1, 1][:3]) for g in (grid, block))
        buffers = self.memory.alive()
        for buffer in buffers:
            buffer.look_for_writes(None)
        given = [(b.address, b.bytes, b.name, True if b.written is None else b.written) for b in buffers]
        found = module.launch(kernel, grid, block, shared, params, given, self._budget, *self._checks)
        launch = Launch(kernel, grid, block, shared, ptx)
        launch.errors = [self._error(e, buffers) for e in found["errors"]]
        launch.notes = [self._error(e, buffers) for e in found.get("notes", [])]
        launch.error_count = found.get("error_count", len(launch.errors))
        for name in ("counters", "per_source", "per_buffer", "printed"):
            setattr(launch, name, found.get(name, getattr(launch, name)))
        self.launches.append(launch)
        if self._raise:
            launch.raise_errors()
        return launch

    def _error(self, found: dict, buffers: list[Buffer]) -> Error:
        known = {k: v for k, v in found.items() if k in Error.__dataclass_fields__}
        if "address" in found and (freed := self.memory.at(found["address"], alive=False)):
            known["message"] += f"; {freed.name} was there and was freed before the launch"
        return Error(**known)

    def report(self) -> str:
        from .report import text

        return text(self)


def machine(
    *,
    raise_errors: bool = True,
    budget: int = 2_000_000_000,
    memcheck: bool = True,
    racecheck: bool = True,
    same_value_races: bool = False,
) -> Machine:
    """Runs GPU kernels on CPU tensors: a context manager that yields a ``Machine``.

    Inside, Triton's ``kernel[grid](...)`` and the launches of ``load_cuda`` run as compiled PTX on the CPU. The errors
    of a launch are raised as a ``MachineError`` when it ends, or only collected with ``raise_errors=False``. A launch
    is stopped after ``budget`` warp instructions. A kernel under ``triton.autotune`` runs its first configuration,
    because the machine does not measure time. Where the machine was not built, the first one compiles it, as
    ``python -m gpt2fast.testing.ptx`` does. ``racecheck`` looks for races in shared and in global memory. With
    ``same_value_races``, it is also a race where two blocks or warps store the same value in one place.
    """
    return Machine(raise_errors, budget, memcheck, racecheck, same_value_races)


def active() -> Machine | None:
    """The machine that runs now, or None."""
    return _active


def _set_triton_driver():
    import importlib.util

    if importlib.util.find_spec("triton") is None:  # CUDA only
        return None
    from .triton_driver import Installed

    return Installed()
