"""setp, set, selp and slct: every comparison, ordered and unordered, of every type, and how they are combined."""

import operator
from collections.abc import Callable

import exact
import numpy as np
import pytest
from elementwise import apply, integers, pairs
from exact import BF16, F16, F32, F64, Format

INTEGERS = {"u16": "u2", "s16": "i2", "u32": "u4", "s32": "i4", "u64": "u8", "s64": "i8"}
FLOATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}
ORDERED = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


def compared(name: str, f: Format, a: int, b: int) -> bool:
    """With NaN, ordered comparisons are false, including .ne. The unordered forms, which end in u, are true."""
    unordered = f.is_nan(a) or f.is_nan(b)
    if name in ("num", "nan"):
        return unordered == (name == "nan")
    if unordered:
        return name.endswith("u")
    return ORDERED[name.removesuffix("u")](f.value(a), f.value(b))


def view(f: Format, x: np.ndarray) -> np.ndarray:
    return x.view(f"f{f.bits // 8}") if f.bits > 16 else x


def check(code: str, expected: list[bool], *inputs: np.ndarray) -> None:
    out = apply(f"{code}\nselp.u32 {{d}}, 1, 0, %p1;", np.uint32, *inputs)
    np.testing.assert_array_equal(out, expected, err_msg=code)


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers(kind: str) -> None:
    a, b = pairs(*[integers(INTEGERS[kind])] * 2)
    names = dict(ORDERED)
    if kind[0] == "u":
        names |= {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}
    for name, f in names.items():
        check(f"setp.{name}.{kind} %p1, {{a}}, {{b}};", f(a, b).tolist(), a, b)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_untyped_bits_are_equal_or_not(bits: int) -> None:
    a, b = pairs(*[integers(f"u{bits // 8}")] * 2)
    check(f"setp.eq.b{bits} %p1, {{a}}, {{b}};", (a == b).tolist(), a, b)
    check(f"setp.ne.b{bits} %p1, {{a}}, {{b}};", (a != b).tolist(), a, b)


@pytest.mark.parametrize("name", [*ORDERED, *(f"{n}u" for n in ORDERED), "num", "nan"])
@pytest.mark.parametrize("kind", FLOATS)
def test_floats(kind: str, name: str) -> None:
    f = FLOATS[kind]
    bits = pairs(*[exact.samples(f, 6)] * 2)
    rows = list(zip(*(x.tolist() for x in bits), strict=True))
    expected = [compared(name, f, *row) for row in rows]
    a, b = (view(f, x) for x in bits)
    check(f"setp.{name}.{kind} %p1, {{a}}, {{b}};", expected, a, b)
    out = apply(f"set.{name}.u32.{kind} {{d}}, {{a}}, {{b}};", np.uint32, a, b)
    np.testing.assert_array_equal(out, np.where(expected, 2**32 - 1, 0))
    out = apply(f"set.{name}.f32.{kind} {{d}}, {{a}}, {{b}};", np.float32, a, b)
    np.testing.assert_array_equal(out, np.array(expected, np.float32))
    if kind in ("f16", "f32"):
        flushed = [compared(name, f, *(f.flushed(x) for x in row)) for row in rows]
        assert flushed != expected or name in ("num", "nan")
        check(f"setp.{name}.ftz.{kind} %p1, {{a}}, {{b}};", flushed, a, b)


@pytest.mark.parametrize("name", [*ORDERED, *(f"{n}u" for n in ORDERED), "num", "nan"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_pairs_of_halves(kind: str, name: str) -> None:
    """p gets the result of the lower half, and q that of the upper half. set writes both into halves of a register."""
    f = FLOATS[kind]
    low = pairs(*[exact.samples(f, 6)] * 2)
    high = [np.roll(x, 7) for x in low]
    a, b = (x.astype(np.uint32) | y.astype(np.uint32) << 16 for x, y in zip(low, high, strict=True))
    results = [
        [compared(name, f, x, y) for x, y in zip(*(v.tolist() for v in part), strict=True)] for part in (low, high)
    ]
    for p, expected in zip(("%p1", "%p2"), results, strict=True):
        code = f"setp.{name}.{kind}x2 %p1|%p2, {{a}}, {{b}};\nselp.u32 {{d}}, 1, 0, {p};"
        np.testing.assert_array_equal(apply(code, np.uint32, a, b), expected, err_msg=code)
    one = f.one
    wanted = np.array(results[0]) * np.uint32(one) | np.array(results[1]) * np.uint32(one) << 16
    out = apply(f"set.{name}.{kind}x2.{kind}x2 {{d}}, {{a}}, {{b}};", np.uint32, a, b)
    np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize(("name", "f"), [("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)])
@pytest.mark.parametrize("negated", [False, True])
def test_combined_with_a_predicate(name: str, f: Callable[[bool, bool], bool], negated: bool) -> None:
    """p is (a < b) with c, q is not (a < b) with c."""
    a, b, c = pairs(np.arange(3, dtype=np.int32), np.arange(3, dtype=np.int32), np.arange(2, dtype=np.int32))
    third = "!%p3" if negated else "%p3"
    head = f"setp.ne.s32 %p3, {{c}}, 0;\nsetp.lt.{name}.s32 %p1|%p2, {{a}}, {{b}}, {third};\n"
    with_c = (c != 0) != negated
    for p, expected in ("%p1", f(a < b, with_c)), ("%p2", f(a >= b, with_c)):
        out = apply(head + f"selp.u32 {{d}}, 1, 0, {p};", np.uint32, a, b, c)
        np.testing.assert_array_equal(out, expected)
    code = f"setp.ne.s32 %p3, {{c}}, 0;\nset.lt.{name}.u32.s32 {{d}}, {{a}}, {{b}}, {third};"
    np.testing.assert_array_equal(apply(code, np.uint32, a, b, c), np.where(f(a < b, with_c), 2**32 - 1, 0))


def test_one_of_two_predicates_may_be_dropped() -> None:
    a, b = pairs(*[np.arange(3, dtype=np.int32)] * 2)
    code = "setp.lt.s32 _|%p2, {a}, {b};\nselp.u32 {d}, 1, 0, %p2;"
    np.testing.assert_array_equal(apply(code, np.uint32, a, b), a >= b)
    code = "setp.lt.s32 %p1|_, {a}, {b};\nselp.u32 {d}, 1, 0, %p1;"
    np.testing.assert_array_equal(apply(code, np.uint32, a, b), a < b)


@pytest.mark.parametrize("dtype", ["u2", "u4", "u8", "f4", "f8"])
def test_select(dtype: str) -> None:
    bits = 8 * np.dtype(dtype).itemsize
    kind = f"f{bits}" if dtype[0] == "f" else f"b{bits}"
    a, b = pairs(np.array([1, 2, 3], dtype), np.array([10, 20], dtype))
    c = np.resize(np.array([0, 1, -1, -(2**31), 2**31 - 1], np.int32), a.shape)
    code = f"setp.gt.s32 %p1, {{c}}, 0;\nselp.{kind} {{d}}, {{a}}, {{b}}, %p1;"
    np.testing.assert_array_equal(apply(code, a.dtype, a, b, c), np.where(c > 0, a, b))
    np.testing.assert_array_equal(
        apply(f"slct.{kind}.s32 {{d}}, {{a}}, {{b}}, {{c}};", a.dtype, a, b, c), np.where(c >= 0, a, b)
    )


def test_select_by_the_sign_of_a_float() -> None:
    """-0 counts as not negative, and NaN selects b. With .ftz a small negative number counts as -0."""
    c = np.float32([1, -1, 0.0, -0.0, np.nan, -np.inf, np.inf, -(2.0**-140)])
    a, b = np.full(8, 7, np.uint32), np.full(8, 9, np.uint32)
    out = apply("slct.u32.f32 {d}, {a}, {b}, {c};", np.uint32, a, b, c)
    assert out.tolist() == [7, 9, 7, 7, 9, 9, 7, 9]
    out = apply("slct.ftz.u32.f32 {d}, {a}, {b}, {c};", np.uint32, a, b, c)
    assert out.tolist() == [7, 9, 7, 7, 9, 9, 7, 7]
