"""add, sub, mul, fma, div, rcp, sqrt of .f32 and .f64 in every rounding mode, against exact rational arithmetic."""

import itertools
from collections.abc import Callable

import exact
import numpy as np
import pytest
from elementwise import apply, pairs
from exact import F32, F64, MODES, NAN, Format

FORMATS = {"f32": F32, "f64": F64}
CANONICAL = 0x7FFFFFFF  # what .f32 instructions give for every NaN
BINARY = {"add": exact.add, "mul": exact.multiply, "div": exact.divide}


def compare(code: str, f: Format, expected: list[int], *inputs: np.ndarray) -> None:
    """Compares bits. For .f64, any NaN is right."""
    dtype = np.dtype(f"f{f.bits // 8}")
    out = apply(code, dtype, *(x.view(dtype) for x in inputs)).view(f"u{f.bits // 8}").tolist()
    if f is F64:
        out = [NAN if f.is_nan(x) else x for x in out]
    else:
        expected = [CANONICAL if x == NAN else x for x in expected]
    rows = zip(*(x.tolist() for x in inputs), expected, out, strict=True)
    wrong = [[hex(x) for x in row] for row in rows if row[-1] != row[-2]]
    assert not wrong, f"{code}: {len(wrong)} wrong, inputs, expected, got: {wrong[:5]}"


def results(f: Callable[..., int], form: Format, mode: str, inputs: list[np.ndarray]) -> list[int]:
    return [f(form, mode, *row) for row in zip(*(x.tolist() for x in inputs), strict=True)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", BINARY)
def test_two_operands(name: str, kind: str, mode: str) -> None:
    f = FORMATS[kind]
    inputs = pairs(*[exact.samples(f)] * 2)
    compare(f"{name}.{mode}.{kind} {{d}}, {{a}}, {{b}};", f, results(BINARY[name], f, mode, inputs), *inputs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", FORMATS)
def test_difference(kind: str, mode: str) -> None:
    f = FORMATS[kind]
    a, b = pairs(*[exact.samples(f)] * 2)
    negated = b ^ b.dtype.type(1 << f.bits - 1)
    compare(f"sub.{mode}.{kind} {{d}}, {{a}}, {{b}};", f, results(exact.add, f, mode, [a, negated]), a, b)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", FORMATS)
def test_fma(kind: str, mode: str) -> None:
    """fma rounds once, even if the product and c cancel nearly or completely."""
    f = FORMATS[kind]
    few = exact.samples(f, 4)[::2]
    a, b, c = pairs(few, few, few)
    x, y = pairs(*[exact.samples(f)] * 2)
    product = np.array([max(0, p) for p in results(exact.multiply, f, "rn", [x, y])], x.dtype)
    cancels = product ^ x.dtype.type(1 << f.bits - 1)
    inputs = [np.concatenate(parts) for parts in ((a, x), (b, y), (c, cancels))]
    for name in "fma", "mad":
        compare(f"{name}.{mode}.{kind} {{d}}, {{a}}, {{b}}, {{c}};", f, results(exact.fma, f, mode, inputs), *inputs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", FORMATS)
def test_reciprocal_and_root(kind: str, mode: str) -> None:
    f = FORMATS[kind]
    a = exact.samples(f, 300)
    one = np.full_like(a, f.one)
    compare(f"rcp.{mode}.{kind} {{d}}, {{a}};", f, results(exact.divide, f, mode, [one, a]), a)
    compare(f"sqrt.{mode}.{kind} {{d}}, {{a}};", f, results(exact.root, f, mode, [a]), a)


def test_no_mode_is_to_nearest() -> None:
    a, b = pairs(*[exact.samples(F32)] * 2)
    compare("add.f32 {d}, {a}, {b};", F32, results(exact.add, F32, "rn", [a, b]), a, b)
    compare("mul.f32 {d}, {a}, {b};", F32, results(exact.multiply, F32, "rn", [a, b]), a, b)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BINARY)
def test_flush_to_zero(name: str, mode: str) -> None:
    """Subnormal inputs count as zeros of their sign; results below the least normal number become such zeros."""
    a, b = pairs(*[exact.samples(F32)] * 2)
    flushed = [np.array([F32.flushed(x) for x in v.tolist()], v.dtype) for v in (a, b)]
    expected = [F32.flushed(x) for x in results(BINARY[name], F32, mode, flushed)]
    compare(f"{name}.{mode}.ftz.f32 {{d}}, {{a}}, {{b}};", F32, expected, a, b)


def saturated(bits: int) -> int:
    return 0 if bits == NAN or F32.negative(bits) else min(bits, F32.one)


@pytest.mark.parametrize("mode", MODES)
def test_saturation(mode: str) -> None:
    """.sat limits results to [+0, 1], and NaN becomes +0."""
    a, b = pairs(*[exact.samples(F32)] * 2)
    for name in "add", "mul":
        expected = [saturated(x) for x in results(BINARY[name], F32, mode, [a, b])]
        compare(f"{name}.{mode}.sat.f32 {{d}}, {{a}}, {{b}};", F32, expected, a, b)
    c = a[::-1].copy()
    expected = [saturated(x) for x in results(exact.fma, F32, mode, [a, b, c])]
    compare(f"fma.{mode}.sat.f32 {{d}}, {{a}}, {{b}}, {{c}};", F32, expected, a, b, c)


def extreme(f: Format, a: int, b: int, most: bool, nan: bool) -> int:
    """A number wins over NaN, except with .NaN. -0 is less than +0."""
    if f.is_nan(a) or f.is_nan(b):
        return NAN if nan or (f.is_nan(a) and f.is_nan(b)) else b if f.is_nan(a) else a
    order = lambda x: -f.magnitude(x) - 1 if f.negative(x) else f.magnitude(x)  # noqa: E731
    return (max if most else min)(a, b, key=order)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["min", "max"])
def test_extremes(name: str, kind: str) -> None:
    f = FORMATS[kind]
    a, b = pairs(*[exact.samples(f)] * 2)
    rows = list(zip(a.tolist(), b.tolist(), strict=True))
    most = name == "max"
    compare(f"{name}.{kind} {{d}}, {{a}}, {{b}};", f, [extreme(f, x, y, most, False) for x, y in rows], a, b)
    if kind == "f64":
        return
    compare(f"{name}.NaN.f32 {{d}}, {{a}}, {{b}};", f, [extreme(f, x, y, most, True) for x, y in rows], a, b)
    flushed = [extreme(f, f.flushed(x), f.flushed(y), most, False) for x, y in rows]
    compare(f"{name}.ftz.f32 {{d}}, {{a}}, {{b}};", f, flushed, a, b)
    sign, rest = 1 << 31, (1 << 31) - 1
    for nan in False, True:
        expected = []
        for x, y in rows:
            r = extreme(f, x & rest, y & rest, most, nan)
            expected.append(NAN if r == NAN else r | (x ^ y) & sign)
        code = f"{name}{'.NaN' if nan else ''}.xorsign.abs.f32 {{d}}, {{a}}, {{b}};"
        numbers = [i for i, e in enumerate(expected) if e != NAN]
        compare(code, f, [expected[i] for i in numbers], a[numbers], b[numbers])


@pytest.mark.parametrize("kind", FORMATS)
def test_signs(kind: str) -> None:
    f = FORMATS[kind]
    a, b = pairs(*[exact.samples(f)[~np.isnan(exact.samples(f).view(f"f{f.bits // 8}"))]] * 2)
    sign = 1 << f.bits - 1
    compare(f"neg.{kind} {{d}}, {{a}};", f, [x ^ sign for x in a.tolist()], a)
    compare(f"abs.{kind} {{d}}, {{a}};", f, [x & ~sign for x in a.tolist()], a)
    rows = zip(a.tolist(), b.tolist(), strict=True)
    compare(f"copysign.{kind} {{d}}, {{a}}, {{b}};", f, [y & ~sign | x & sign for x, y in rows], a, b)
    if kind == "f32":
        compare("neg.ftz.f32 {d}, {a};", f, [f.flushed(x) ^ sign for x in a.tolist()], a)
        compare("abs.ftz.f32 {d}, {a};", f, [f.flushed(x) & ~sign for x in a.tolist()], a)


@pytest.mark.parametrize("kind", FORMATS)
def test_classes_of_numbers(kind: str) -> None:
    """The manual counts zeros as normal."""
    f = FORMATS[kind]
    a = exact.samples(f)
    m = [f.magnitude(x) for x in a.tolist()]
    least = 1 << f.mantissa
    expected = {
        "finite": [x < f.infinity for x in m],
        "infinite": [x == f.infinity for x in m],
        "number": [x <= f.infinity for x in m],
        "notanumber": [x > f.infinity for x in m],
        "normal": [least <= x < f.infinity or x == 0 for x in m],
        "subnormal": [0 < x < least for x in m],
    }
    for name, wanted in expected.items():
        code = f"testp.{name}.{kind} %p1, {{a}};\nselp.u32 {{d}}, 1, 0, %p1;"
        out = apply(code, np.uint32, a.view(f"f{f.bits // 8}"))
        np.testing.assert_array_equal(out, wanted, err_msg=name)


def test_the_reference_itself() -> None:
    """Compares exact.py with numpy, which rounds to nearest."""
    values = exact.samples(F32)
    with np.errstate(all="ignore"):
        for a, b in itertools.product(values, values):
            x, y = a.view(np.float32), b.view(np.float32)
            for f, expected in (exact.add, x + y), (exact.multiply, x * y), (exact.divide, x / y):
                bits = f(F32, "rn", int(a), int(b))
                assert np.isnan(expected) if bits == NAN else bits == int(expected.view(np.uint32))
