"""Runs a test with the CPU kernels of one instruction set."""

import contextlib

from .. import backends


def runnable_isas() -> list[str]:
    """The instruction sets of the extension that this CPU has, best first. Empty without the extension."""
    return [] if backends._C is None else backends._C.runnable_isas()


@contextlib.contextmanager
def cpu_isa(name: str | None):
    """Inside, the CPU kernels are those of ``name`` (None: as outside). Raises ValueError where it cannot run."""
    if name is None:
        yield
        return
    before = backends._C.cpu_isa()
    backends._C.set_cpu_isa(name)
    try:
        yield
    finally:
        backends._C.set_cpu_isa(before)
