"""Numbers for readers: three significant digits, an SI prefix, a space before the unit, and never an exponent."""

import math

NONE = "–"
SPACE = "\u00a0"  # a space that does not break: a number and its unit stay on one line
THIN = "\u202f"  # between thousands
PREFIXES = {-12: "p", -9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P"}
LEAST = 0.001


def rounded(value: float, significant: int = 3) -> float:
    return float(f"{value:.{significant - 1}e}")


def number(value: float | None, significant: int = 3) -> str:
    """``2.59``, ``15.9``, ``1 230``; ``<0.001`` for smaller numbers, a dash for None and what is not finite."""
    if value is None or not math.isfinite(value):
        return NONE
    if not value:
        return "0"
    value = rounded(value, significant)
    if 0 < abs(value) < LEAST:
        return f"<{LEAST}"
    size = math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, significant - 1 - size)}f}".replace(",", THIN)


def exponent(value: float) -> int:
    """The exponent, a multiple of 3, of the SI prefix with which ``value`` is at least 1 and below 1000."""
    if not value or not math.isfinite(value):
        return 0
    return min(max(3 * (math.floor(math.log10(abs(rounded(value)))) // 3), min(PREFIXES)), max(PREFIXES))


def quantity(value: float | None, unit: str) -> str:
    """``12.4 µs`` for 1.24e-5 and ``s``; ``38.0 GB/s`` for 3.8e10 and ``B/s``."""
    if value is None or not math.isfinite(value):
        return NONE
    power = exponent(value)
    return f"{number(value / 10**power)}{SPACE}{PREFIXES[power]}{unit}"


def interval(spread: dict, unit: str) -> str:
    """The 10 % and 90 % quantiles, both with the prefix of the median: ``12.1–13.0 µs``."""
    power = exponent(spread["median"])
    low, high = (number(spread[name] / 10**power) for name in ("q10", "q90"))
    return f"{low}–{high}{SPACE}{PREFIXES[power]}{unit}"


def ratio(value: float) -> str:
    """``2.59``, ``15.9``, ``0.09``: two decimals below 10."""
    return f"{value:.2f}" if 0.005 <= value < 9.995 else number(value)


def times(value: float) -> str:
    """A ratio with its sign: ``2.59 ×``."""
    return f"{ratio(value)}{SPACE}×"


def between(spread: dict) -> str:
    """The quantiles of a ratio: ``2.35–3.02``."""
    return f"{ratio(spread['q10'])}–{ratio(spread['q90'])}"


def percent(value: float) -> str:
    return f"{'<1' if 0 < value < 0.005 else f'{100 * value:.0f}'}{SPACE}%"


def count(value: int) -> str:
    return f"{value:,}".replace(",", THIN)
