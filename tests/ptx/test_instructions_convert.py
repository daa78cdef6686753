"""cvt between all types, with all roundings, .sat, .ftz and .relu, against exact rational arithmetic."""

import math
from fractions import Fraction

import exact
import numpy as np
import pytest
from elementwise import apply, integers
from exact import BF16, F16, F32, F64, MODES, NAN, TF32, Format

INTEGERS = {"u16": "u2", "s16": "i2", "u32": "u4", "s32": "i4", "u64": "u8", "s64": "i8"}
FLOATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}
TO_INTEGRAL = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


def bits_of(kind: str) -> int:
    return int(kind.lstrip("bfusx"))


def limits(kind: str) -> tuple[int, int]:
    bits = bits_of(kind)
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)


def clamped(kind: str, x: int) -> int:
    least, most = limits(kind)
    return max(least, min(most, x))


def unsigned(kind: str, x: int) -> int:
    return x & (1 << bits_of(kind)) - 1


def view(f: Format, x: np.ndarray) -> np.ndarray:
    return x.view(f"f{f.bits // 8}") if f.bits > 16 else x


def convert(code: str, kind: str, x: np.ndarray) -> list[int]:
    """The result's bits."""
    dtype = np.dtype(f"f{bits_of(kind) // 8}") if kind in ("f32", "f64") else np.dtype(f"u{bits_of(kind) // 8}")
    return apply(f"{code} {{d}}, {{a}};", dtype, x).view(f"u{dtype.itemsize}").tolist()


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("to", INTEGERS)
def test_integers(to: str, source: str) -> None:
    """Integers are extended by the source's sign, cut off, or clamped with .sat."""
    x = integers(INTEGERS[source])
    assert convert(f"cvt.{to}.{source}", to, x) == [unsigned(to, v) for v in x.tolist()]
    assert convert(f"cvt.sat.{to}.{source}", to, x) == [unsigned(to, clamped(to, v)) for v in x.tolist()]


@pytest.mark.parametrize("sign", ["u", "s"])
@pytest.mark.parametrize("register", ["u2", "u4", "u8"])
def test_bytes(register: str, sign: str) -> None:
    """Registers may be wider: their upper bits are ignored, and those of the result are set by its sign."""
    x = integers(register, 20)
    size = 8 * x.itemsize
    low = [v & 255 for v in x.tolist()]
    values = [v - 256 if sign == "s" and v > 127 else v for v in low]
    assert convert(f"cvt.u32.{sign}8", "u32", x) == [v & 2**32 - 1 for v in values]
    assert convert(f"cvt.{sign}8.u{size}", "u32", x) == [v & 2**32 - 1 for v in values]
    wide = x.view(f"i{x.itemsize}").tolist()
    expected = [clamped(f"{sign}8", v) & 2**32 - 1 for v in wide]
    assert convert(f"cvt.sat.{sign}8.s{size}", "u32", x.view(f"i{x.itemsize}")) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("source", INTEGERS)
def test_integers_to_floats(source: str, to: str, mode: str) -> None:
    f = FLOATS[to]
    x = integers(INTEGERS[source], 40)
    expected = [f.encode(Fraction(v), mode) for v in x.tolist()]
    assert convert(f"cvt.{mode}.{to}.{source}", to, x) == expected
    if to == "f32":
        expected = [f.encode(Fraction(max(0, min(1, v)))) for v in x.tolist()]
        assert convert(f"cvt.{mode}.sat.f32.{source}", to, x) == expected


def integral(x: Fraction | float, kind: str, source: str, mode: str) -> int:
    """A number out of range gives the nearest end. NaN gives 0, or only the upper bit with .f64 or 64-bit integers."""
    least, most = limits(kind)
    if isinstance(x, float):
        if math.isnan(x):
            return 0 if source != "f64" and bits_of(kind) != 64 else 1 << bits_of(kind) - 1
        return unsigned(kind, most if x > 0 else least)
    return unsigned(kind, clamped(kind, TO_INTEGRAL[mode](x)))


def samples(f: Format) -> np.ndarray:
    """The samples and also numbers near the ends of the integer types, and halves."""
    near = [Fraction(1 << b) + d for b in (7, 8, 15, 16, 31, 32, 63, 64) for d in (-1, 0, 1)]
    near += [Fraction(n, 2) for n in range(12)] + [Fraction(1, 4), Fraction(3, 4)]
    bits = [f.encode(sign * v, "rz") for v in near for sign in (1, -1)]
    return np.concatenate([exact.samples(f, 40), np.array(bits, f"u{f.bits // 8}")])


@pytest.mark.parametrize("mode", TO_INTEGRAL)
@pytest.mark.parametrize("to", INTEGERS)
@pytest.mark.parametrize("source", FLOATS)
def test_floats_to_integers(source: str, to: str, mode: str) -> None:
    f = FLOATS[source]
    x = samples(f)
    expected = [integral(f.value(b), to, source, mode) for b in x.tolist()]
    assert convert(f"cvt.{mode}.{to}.{source}", to, view(f, x)) == expected
    if source == "f32":
        expected = [integral(f.value(f.flushed(b)), to, source, mode) for b in x.tolist()]
        assert convert(f"cvt.{mode}.ftz.{to}.f32", to, view(f, x)) == expected


def canonical(kind: str, bits: int) -> int:
    return bits if bits != NAN else {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": NAN}[kind]


def without_nan(f: Format, out: list[int]) -> list[int]:
    return [NAN if f is F64 and f.is_nan(v) else v for v in out]


def changed(f: Format, x: np.ndarray, to: Format, mode: str) -> list[int]:
    return [to.encode(f.value(b), mode, f.negative(b)) for b in x.tolist()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("source", "to"),
    [
        ("f64", "f32"),
        ("f64", "f16"),
        ("f64", "bf16"),
        ("f32", "f16"),
        ("f32", "bf16"),
        ("f16", "bf16"),
        ("bf16", "f16"),
    ],
)
def test_narrower_floats(source: str, to: str, mode: str) -> None:
    f, g = FLOATS[source], FLOATS[to]
    x = samples(f)
    expected = changed(f, x, g, mode)
    assert convert(f"cvt.{mode}.{to}.{source}", to, view(f, x)) == [canonical(to, b) for b in expected]
    relu = [b if b == NAN else 0 if g.negative(b) else b for b in expected]
    if source == "f32":
        assert convert(f"cvt.{mode}.relu.{to}.f32", to, view(f, x)) == [canonical(to, b) for b in relu]
    if to == "f32":
        flushed = [g.flushed(b) for b in expected]
        assert convert(f"cvt.{mode}.ftz.f32.f64", to, view(f, x)) == [canonical(to, b) for b in flushed]


@pytest.mark.parametrize(
    ("source", "to"), [("f16", "f32"), ("bf16", "f32"), ("f16", "f64"), ("bf16", "f64"), ("f32", "f64")]
)
def test_wider_floats(source: str, to: str) -> None:
    f, g = FLOATS[source], FLOATS[to]
    x = np.arange(65536, dtype=np.uint16) if f.bits == 16 else samples(f)
    x = x[:: 7 if f.bits == 16 else 1]
    out = without_nan(g, convert(f"cvt.{to}.{source}", to, view(f, x)))
    assert out == [canonical(to, b) for b in changed(f, x, g, "rn")]


@pytest.mark.parametrize("kind", ["f32", "f64", "f16"])
@pytest.mark.parametrize("mode", TO_INTEGRAL)
def test_to_integral_floats(kind: str, mode: str) -> None:
    f = FLOATS[kind]
    x = samples(f)
    values = [f.value(b) for b in x.tolist()]
    expected = [
        f.encode(v if isinstance(v, float) else Fraction(TO_INTEGRAL[mode](v)), "rn", f.negative(b))
        for v, b in zip(values, x.tolist(), strict=True)
    ]
    out = without_nan(f, convert(f"cvt.{mode}.{kind}.{kind}", kind, view(f, x)))
    assert out == [canonical(kind, b) for b in expected]


def test_saturated_floats() -> None:
    x = samples(F32)
    expected = [0 if b == NAN or F32.negative(b) else min(b, F32.one) for b in changed(F32, x, F32, "rn")]
    assert convert("cvt.sat.f32.f32", "f32", view(F32, x)) == expected
    x = samples(F64)
    expected = [0 if b == NAN or F32.negative(b) else min(b, F32.one) for b in changed(F64, x, F32, "rn")]
    assert convert("cvt.rn.sat.f32.f64", "f32", view(F64, x)) == expected


@pytest.mark.parametrize("mode", ["rna", "rn", "rz"])
def test_tf32(mode: str) -> None:
    """The lower 13 bits of the register become 0."""
    x = samples(F32)
    expected = [0x7FFFFFFF if b == NAN else b << 13 for b in changed(F32, x, TF32, mode)]
    assert convert(f"cvt.{mode}.tf32.f32", "b32", view(F32, x)) == expected


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_pairs(kind: str, mode: str) -> None:
    """The first operand goes into the upper half."""
    f = FLOATS[kind]
    a = samples(F32)
    b = np.roll(a, 5)
    for relu in "", ".relu":
        high, low = ([canonical(kind, v) for v in changed(F32, x, f, mode)] for x in (a, b))
        if relu:
            high, low = ([0 if f.negative(v) else v for v in half] for half in (high, low))
        code = f"cvt.{mode}{relu}.{kind}x2.f32 {{d}}, {{a}}, {{b}};"
        out = apply(code, np.uint32, view(F32, a), view(F32, b)).tolist()
        assert out == [h << 16 | v for h, v in zip(high, low, strict=True)]


@pytest.mark.parametrize("code", ["cvt.f16.f32", "cvt.s32.f32", "cvt.f32.s32", "cvt.f32.f64", "cvt.rn.tf32.f64"])
def test_a_rounding_that_is_missing_or_a_pair_that_does_not_exist_is_an_error(code: str) -> None:
    with pytest.raises(ValueError, match=rf"PTX line \d+: {code}"):
        apply(f"{code} {{d}}, {{a}};", np.uint32, np.zeros(32, np.uint32))
