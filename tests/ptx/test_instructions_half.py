""".f16, .bf16 and their pairs against exact rational arithmetic."""

import exact
import numpy as np
import pytest
from elementwise import apply, pairs
from exact import BF16, F16, NAN, Format

FORMATS = {"f16": F16, "bf16": BF16}
CANONICAL = 0x7FFF


def compare(code: str, expected: list[int], *inputs: np.ndarray) -> None:
    """Runs the scalar form, and the pair form with other values in the upper half."""
    wanted = np.array([CANONICAL if x == NAN else x for x in expected], np.uint16)
    np.testing.assert_array_equal(apply(code, np.uint16, *inputs), wanted, err_msg=code)
    packed = [x.astype(np.uint32) | np.roll(x, 1).astype(np.uint32) << 16 for x in inputs]
    both = wanted.astype(np.uint32) | np.roll(wanted, 1).astype(np.uint32) << 16
    pair = code.replace("bf16 ", "bf16x2 ") if "bf16 " in code else code.replace("f16 ", "f16x2 ")
    np.testing.assert_array_equal(apply(pair, np.uint32, *packed), both, err_msg=pair)


def saturated(f: Format, bits: int) -> int:
    return 0 if bits == NAN or f.negative(bits) else min(bits, f.one)


def rectified(f: Format, bits: int) -> int:
    return bits if bits == NAN else 0 if f.negative(bits) else bits


@pytest.mark.parametrize("kind", FORMATS)
def test_arithmetic(kind: str) -> None:
    f = FORMATS[kind]
    a, b = pairs(*[exact.samples(f, 12)] * 2)
    rows = list(zip(a.tolist(), b.tolist(), strict=True))
    sign = 1 << 15
    total = [exact.add(f, "rn", x, y) for x, y in rows]
    rest = [exact.add(f, "rn", x, y ^ sign) for x, y in rows]
    product = [exact.multiply(f, "rn", x, y) for x, y in rows]
    for name, expected in ("add", total), ("sub", rest), ("mul", product):
        compare(f"{name}.rn.{kind} {{d}}, {{a}}, {{b}};", expected, a, b)
        if kind == "bf16":
            continue
        compare(f"{name}.f16 {{d}}, {{a}}, {{b}};", expected, a, b)
        compare(f"{name}.sat.f16 {{d}}, {{a}}, {{b}};", [saturated(f, x) for x in expected], a, b)


def test_flush_to_zero() -> None:
    a, b = pairs(*[exact.samples(F16, 12)] * 2)
    rows = [(F16.flushed(x), F16.flushed(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    for name, f in ("add", exact.add), ("mul", exact.multiply):
        compare(f"{name}.ftz.f16 {{d}}, {{a}}, {{b}};", [F16.flushed(f(F16, "rn", *row)) for row in rows], a, b)


@pytest.mark.parametrize("kind", FORMATS)
def test_fma(kind: str) -> None:
    f = FORMATS[kind]
    few = exact.samples(f, 4)[::2]
    a, b, c = pairs(few, few, few)
    x, y = pairs(*[exact.samples(f, 12)] * 2)
    products = [exact.multiply(f, "rn", *row) for row in zip(x.tolist(), y.tolist(), strict=True)]
    near = np.array([max(0, p) ^ 1 << 15 for p in products], np.uint16)
    a, b, c = (np.concatenate(parts) for parts in ((a, x), (b, y), (c, near)))
    expected = [exact.fma(f, "rn", *row) for row in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
    compare(f"fma.rn.{kind} {{d}}, {{a}}, {{b}}, {{c}};", expected, a, b, c)
    relu = [rectified(f, e) for e in expected]
    compare(f"fma.rn.relu.{kind} {{d}}, {{a}}, {{b}}, {{c}};", relu, a, b, c)
    if kind == "f16":
        compare("fma.rn.sat.f16 {d}, {a}, {b}, {c};", [saturated(f, e) for e in expected], a, b, c)


def extreme(f: Format, a: int, b: int, most: bool, nan: bool) -> int:
    if f.is_nan(a) or f.is_nan(b):
        return NAN if nan or (f.is_nan(a) and f.is_nan(b)) else b if f.is_nan(a) else a
    order = lambda x: -f.magnitude(x) - 1 if f.negative(x) else f.magnitude(x)  # noqa: E731
    return (max if most else min)(a, b, key=order)


@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("name", ["min", "max"])
@pytest.mark.parametrize("kind", FORMATS)
def test_extremes(kind: str, name: str, nan: bool) -> None:
    f = FORMATS[kind]
    a, b = pairs(*[exact.samples(f, 12)] * 2)
    rows = list(zip(a.tolist(), b.tolist(), strict=True))
    full = name + ".NaN" * nan
    expected = [extreme(f, x, y, name == "max", nan) for x, y in rows]
    compare(f"{full}.{kind} {{d}}, {{a}}, {{b}};", expected, a, b)
    numbers = np.array([not f.is_nan(x) and not f.is_nan(y) for x, y in rows])
    a, b = a[numbers], b[numbers]
    rows = zip(a.tolist(), b.tolist(), strict=True)
    signed = [extreme(f, x & 0x7FFF, y & 0x7FFF, name == "max", nan) | (x ^ y) & 0x8000 for x, y in rows]
    compare(f"{full}.xorsign.abs.{kind} {{d}}, {{a}}, {{b}};", signed, a, b)


@pytest.mark.parametrize("kind", FORMATS)
def test_signs(kind: str) -> None:
    f = FORMATS[kind]
    a = np.array([x for x in exact.samples(f, 40).tolist() if not f.is_nan(x)], np.uint16)
    compare(f"neg.{kind} {{d}}, {{a}};", [x ^ 0x8000 for x in a.tolist()], a)
    compare(f"abs.{kind} {{d}}, {{a}};", [x & 0x7FFF for x in a.tolist()], a)


def to_double(kind: str, bits: np.ndarray) -> np.ndarray:
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("kind", FORMATS)
def test_approximations(kind: str) -> None:
    """ex2: within 2^-9.9 (f16) or 2^-7 (bf16) of the value relatively; tanh: within 2^-10.987 or 2^-8 absolutely.

    All 65536 inputs are tested. If the result is subnormal, the bound is the spacing of the format.
    """
    f = FORMATS[kind]
    a = np.arange(65536, dtype=np.uint16)
    x = to_double(kind, a)
    with np.errstate(over="ignore", invalid="ignore"):
        exp2, tanh = np.exp2(x), np.tanh(x)
    ftz = ".ftz" if kind == "bf16" else ""
    largest, spacing = float(f.value(f.infinity - 1)), 2.0 ** (f.least - f.mantissa)
    relative = 2.0**-9.9 if kind == "f16" else 2.0**-7
    y = to_double(kind, apply(f"ex2.approx{ftz}.{kind} {{d}}, {{a}};", np.uint16, a))
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
    fits = exp2 <= largest
    assert (np.abs(y[fits] - exp2[fits]) <= np.maximum(relative * exp2, spacing)[fits]).all()
    assert (y[exp2 > 2 * largest] == np.inf).all()
    absolute = 2.0**-10.987 if kind == "f16" else 2.0**-8
    y = to_double(kind, apply(f"tanh.approx.{kind} {{d}}, {{a}};", np.uint16, a))
    numbers = ~np.isnan(x)
    assert (np.abs(y - tanh)[numbers] <= absolute).all()
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))


def test_pairs_of_approximations() -> None:
    a = np.random.default_rng(0).standard_normal((512, 2)).astype(np.float16)
    for name in "ex2", "tanh":
        one = apply(f"{name}.approx.f16 {{d}}, {{a}};", np.uint16, a.ravel().view(np.uint16))
        two = apply(f"{name}.approx.f16x2 {{d}}, {{a}};", np.uint32, a.view(np.uint32).ravel())
        np.testing.assert_array_equal(two.view(np.uint16), one)
