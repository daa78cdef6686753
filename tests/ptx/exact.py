"""Floating-point operations in exact rational arithmetic, rounded once, on the bits of any format."""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

NAN = -1  # any NaN; each test says which one it expects
MODES = ["rn", "rz", "rm", "rp"]


@dataclass(frozen=True)
class Format:
    exponent: int
    mantissa: int

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def infinity(self) -> int:
        return (1 << self.exponent) - 1 << self.mantissa

    @property
    def least(self) -> int:
        """The exponent of the least normal number."""
        return 2 - (1 << self.exponent - 1)

    @property
    def one(self) -> int:
        return (1 << self.exponent - 1) - 1 << self.mantissa

    def negative(self, bits: int) -> bool:
        return bool(bits >> self.bits - 1)

    def magnitude(self, bits: int) -> int:
        return bits & (1 << self.bits - 1) - 1

    def is_nan(self, bits: int) -> bool:
        return self.magnitude(bits) > self.infinity

    def value(self, bits: int) -> Fraction | float:
        """The value of the bits: a fraction, an infinity or NaN."""
        m, sign = self.magnitude(bits), -1 if self.negative(bits) else 1
        if m >= self.infinity:
            return math.nan if m > self.infinity else sign * math.inf
        e, fraction = m >> self.mantissa, m & (1 << self.mantissa) - 1
        whole = fraction | (1 << self.mantissa if e else 0)
        return sign * whole * Fraction(2) ** (max(e, 1) - 1 + self.least - self.mantissa)

    def encode(self, x: Fraction | float, mode: str = "rn", negative_zero: bool = False) -> int:
        if isinstance(x, float):
            if math.isnan(x):
                return NAN
            return self.infinity | (x < 0) << self.bits - 1
        negative = x < 0 or (x == 0 and negative_zero)
        sign = int(negative) << self.bits - 1
        if x == 0:
            return sign
        e = self.least
        magnitude = abs(x)
        top = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
        e = max(e, top if magnitude >= Fraction(2) ** top else top - 1)
        units = magnitude / Fraction(2) ** (e - self.mantissa)
        whole = math.floor(units)
        rest = units - whole
        up = {
            "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole & 1),
            "rna": rest >= Fraction(1, 2),
            "rz": False,
            "rm": rest > 0 and negative,
            "rp": rest > 0 and not negative,
        }[mode]
        bits = (e - self.least << self.mantissa) + whole + bool(up)
        if bits >= self.infinity:
            to_infinity = mode in ("rn", "rna") or (mode == "rm" and negative) or (mode == "rp" and not negative)
            bits = self.infinity - (not to_infinity)
        return sign | bits

    def flushed(self, bits: int) -> int:
        return bits if bits == NAN or self.magnitude(bits) >> self.mantissa else bits & 1 << self.bits - 1


F16, BF16, TF32, F32, F64 = Format(5, 10), Format(8, 7), Format(8, 10), Format(8, 23), Format(11, 52)


def add(f: Format, mode: str, a: int, b: int) -> int:
    x, y = f.value(a), f.value(b)
    if isinstance(x, float) or isinstance(y, float):
        return f.encode(special(x) + special(y))
    both = f.negative(a) and f.negative(b)
    alike = f.negative(a) == f.negative(b) and x == 0 and y == 0
    return f.encode(x + y, mode, both if alike else mode == "rm")


def multiply(f: Format, mode: str, a: int, b: int) -> int:
    x, y = f.value(a), f.value(b)
    if isinstance(x, float) or isinstance(y, float):
        return f.encode(special(x) * special(y))
    return f.encode(x * y, mode, f.negative(a) != f.negative(b))


def divide(f: Format, mode: str, a: int, b: int) -> int:
    x, y = f.value(a), f.value(b)
    sign = f.negative(a) != f.negative(b)
    if isinstance(x, float) or isinstance(y, float):
        if isinstance(x, float) and isinstance(y, float):
            return NAN
        if isinstance(x, float):
            return NAN if math.isnan(x) else f.infinity | sign << f.bits - 1
        return NAN if math.isnan(y) else sign << f.bits - 1
    if y == 0:
        return NAN if x == 0 else f.infinity | sign << f.bits - 1
    return f.encode(x / y, mode, sign)


def fma(f: Format, mode: str, a: int, b: int, c: int) -> int:
    x, y, z = f.value(a), f.value(b), f.value(c)
    if any(isinstance(v, float) for v in (x, y, z)):
        return f.encode(special(x) * special(y) + special(z))
    negative_product = f.negative(a) != f.negative(b)
    alike = x * y == 0 and z == 0 and negative_product == f.negative(c)
    return f.encode(x * y + z, mode, negative_product if alike else mode == "rm")


def root(f: Format, mode: str, a: int) -> int:
    x = f.value(a)
    if isinstance(x, float):
        return NAN if math.isnan(x) or x < 0 else f.infinity
    if x <= 0:
        return NAN if x < 0 else a
    # Far more bits than the format has, and a last bit that says whether anything is left out.
    shift = 700
    scaled = x.numerator * (1 << 2 * shift) // x.denominator
    r = math.isqrt(scaled)
    sticky = r * r != scaled or scaled * x.denominator != x.numerator << 2 * shift
    return f.encode(Fraction(2 * r + sticky, 1 << shift + 1), mode)


def special(x: Fraction | float) -> float:
    """A float with the same sign, finite if the number is. Its size does not matter beside an infinity or NaN."""
    return x if isinstance(x, float) else float((x > 0) - (x < 0))


def samples(f: Format, random: int = 10) -> np.ndarray:
    """Numbers of both signs: zeros, ends of the ranges, halfway cases, infinities, NaN and random numbers."""
    one = f.one
    chosen = [0, 1, 2, 3, (1 << f.mantissa) - 1, 1 << f.mantissa, (1 << f.mantissa) + 1, one, one + 1, one - 1]
    chosen += [one + (1 << f.mantissa - 1), one + (f.mantissa + 1 << f.mantissa), one - (f.mantissa + 1 << f.mantissa)]
    chosen += [f.infinity - 1, f.infinity, f.infinity + (1 << f.mantissa - 1)]
    generator = np.random.default_rng(f.bits)
    near = generator.integers(one - (8 << f.mantissa), one + (8 << f.mantissa), random).tolist()
    chosen += near + [near[0] + 1, near[1] ^ 1] + generator.integers(0, f.infinity, random // 2).tolist()
    both = chosen + [x | 1 << f.bits - 1 for x in chosen]
    return np.array(both, f"u{max(16, f.bits) // 8}")
