"""Timing for comparisons: contenders alternate in one process, and ratios come from pairs of the same round."""

import ctypes
import gc
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence

LEAST_BLOCK = 2e-3  # seconds; shorter calls are timed in blocks of at least this length
WARM_UP = 2  # rounds that do not count; after them the allocator has all the memory that the contenders need


def keep_freed_memory() -> bool:
    """Tells glibc to reuse freed memory instead of handing it back, as caching allocators do. Without glibc: False.

    Every call still allocates its outputs, but no contender pays for page faults. Faults limit writing to about
    10 GB/s, far below the bandwidth of memory, and would hide the differences between kernels.
    """
    if not sys.platform.startswith("linux"):
        return False
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def alternate(
    contenders: dict[str, Sequence[Callable]],
    probes: dict[str, Callable] | None = None,
    seconds: float = 0.5,
    rounds: tuple[int, int] = (5, 40),
) -> dict[str, list[float]]:
    """The seconds of a call of every contender, round by round. A contender has a callable for each set of inputs; they
    are called in turn.

    As many outputs as inputs are kept alive, so that outputs rotate through memory as inputs do. ``probes`` return
    their own figure and run once in each round. Rounds go on for ``seconds``, within the bounds of ``rounds``.
    """
    found: dict[str, list[float]] = {name: [] for name in [*contenders, *(probes or {})]}
    calls = {}
    for name, callables in contenders.items():
        _time(callables, len(callables))
        block, calls[name] = 0.0, len(callables)
        while True:
            block = _time(callables, calls[name])
            if block >= LEAST_BLOCK:
                break
            calls[name] *= max(2, min(10, int(LEAST_BLOCK / max(block, 1e-6)) + 1))
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for turn in range(-WARM_UP, rounds[1]):
            if turn == 0:
                start = time.perf_counter()
            if turn >= rounds[0] and time.perf_counter() - start > seconds:
                break
            order = list(contenders) if turn % 2 else list(reversed(contenders))
            figures = {name: probe() for name, probe in (probes or {}).items()}
            figures |= {name: _time(contenders[name], calls[name]) / calls[name] for name in order}
            if turn >= 0:
                for name, figure in figures.items():
                    found[name].append(figure)
    finally:
        if collecting:
            gc.enable()
    return found


def _time(callables: Sequence[Callable], calls: int) -> float:
    kept, n = deque(maxlen=len(callables)), len(callables)
    start = time.perf_counter()
    for i in range(calls):
        kept.append(callables[i % n]())
    return time.perf_counter() - start


def summarise(values: Sequence[float]) -> dict[str, float]:
    """The median, and the quantiles q10 and q90, between which eight of ten rounds lie."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return dict(median=statistics.median(ordered), q10=ordered[round(0.1 * last)], q90=ordered[round(0.9 * last)])


def ratios(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times as fast ``fast`` is, from the pairs of each round."""
    return summarise([a / b for a, b in zip(slow, fast)])
