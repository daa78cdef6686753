"""The report of a launch: its errors and its counters."""

import ctypes
import ctypes.util
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .occupancy import Resources, resources
from .toolchain import WHAT


@dataclass(frozen=True)
class Error:
    """One error. ``source`` is "file:line" by the compiler's line table, ``other_source`` a race's other access.

    ``count`` is how often it was found at these lines. The other fields describe the first time.
    """

    kind: str
    message: str
    line: int | None = None
    source: str | None = None
    other_source: str | None = None
    thread: Any = None
    block: Any = None
    instruction: str = ""
    buffer: str | None = None
    count: int = 1

    def __str__(self):
        where = self.source or (f"PTX line {self.line}" if self.line else "")
        both = f" and {self.other_source}" if self.other_source else ""
        who = f" block {self.block} thread {self.thread}:" if self.block is not None else ""
        what = f" [{self.instruction}]" if self.instruction else ""
        often = f" ({self.count} times)" if self.count > 1 else ""
        return f"{self.kind}{f' at {where}{both}' if where else ''}{often}:{who} {self.message}{what}"


class MachineError(RuntimeError):
    """The ``errors`` of a ``launch``. At the end of a machine: memory that was not written, with ``launch`` None."""

    def __init__(self, title: str, errors: Sequence[Error], launch: "Launch | None" = None, more: int = 0):
        lines = [f"{WHAT}: {title}", *(f"  {error}" for error in errors)]
        super().__init__("\n".join([*lines, f"  and {more} more"] if more else lines))
        self.errors, self.launch = list(errors), launch


@dataclass(eq=False)
class Launch:
    """The report of one launch. ``counters`` and the other dicts are exact and repeatable. They are not times."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int  # dynamic, bytes
    ptx: str = field(repr=False)
    errors: list[Error] = field(default_factory=list)
    error_count: int = 0
    notes: list[Error] = field(default_factory=list)  # not errors, and never raised
    counters: dict[str, int] = field(default_factory=dict, repr=False)
    per_source: dict[str, dict[str, int]] = field(default_factory=dict, repr=False)
    per_buffer: dict[str, dict[str, int]] = field(default_factory=dict, repr=False)
    printed: str = ""

    @property
    def name(self) -> str:
        """The kernel's name in the source: C++ names are decoded."""
        return readable(self.kernel)

    def resources(self, arch: str = "sm_80") -> Resources:
        """Registers, spills and shared memory of this kernel compiled for ``arch``."""
        return resources(self.ptx, arch)[self.kernel]

    def occupancy(self, arch: str = "sm_80") -> float:
        x, y, z = self.block
        return self.resources(arch).occupancy(x * y * z, self.shared)

    def inefficient(self) -> dict[str, str]:
        """The source lines that waste memory accesses, the most wasteful first, each with a description.

        Global accesses there move more sectors than their bytes need, or shared accesses take extra wavefronts.
        """
        found = []
        for source, counted in self.per_source.items():
            for kind in ("load", "store", "atomic"):
                moved, ideal = (counted.get(f"global_{kind}_{what}sectors", 0) for what in ("", "ideal_"))
                if moved > ideal:
                    requests = counted[f"global_{kind}_requests"]
                    text = f"global {kind}: {moved / requests:.2f} sectors a request, ideal {ideal / requests:.2f}"
                    found.append((moved - ideal, source, text))
            for kind in ("load", "store"):
                if extra := counted.get(f"shared_{kind}_bank_conflicts", 0):
                    each = counted[f"shared_{kind}_wavefronts"] / counted[f"shared_{kind}_requests"]
                    text = f"shared {kind}: {each:.2f} wavefronts a request, {extra} by bank conflicts"
                    found.append((extra, source, text))
        lines: dict[str, str] = {}
        for _, source, text in sorted(found, reverse=True):
            lines[source] = f"{lines[source]}; {text}" if source in lines else text
        return lines

    def raise_errors(self) -> None:
        if self.errors:
            count = max(self.error_count, len(self.errors))
            title = f"{self.name}: {count} error{'s' if count > 1 else ''}"
            raise MachineError(title, self.errors, self, count - sum(e.count for e in self.errors))


@functools.lru_cache(maxsize=1024)
def readable(kernel: str) -> str:
    """Decodes ``_Z5scalePfi`` to ``scale(float*, int)``. Other names stay as they are."""
    if not kernel.startswith("_Z"):
        return kernel
    try:
        library = ctypes.CDLL(ctypes.util.find_library("stdc++") or "libstdc++.so.6")
        decode, free = library.__cxa_demangle, ctypes.CDLL(None).free
    except (OSError, AttributeError):
        return kernel
    decode.restype, decode.argtypes = ctypes.c_void_p, [ctypes.c_char_p] + [ctypes.c_void_p] * 3
    free.argtypes = [ctypes.c_void_p]
    if not (found := decode(kernel.encode(), None, None, None)):
        return kernel
    text = ctypes.string_at(found).decode()
    free(found)
    return text
