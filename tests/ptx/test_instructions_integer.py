"""Integer arithmetic against Python's unbounded integers."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from elementwise import apply, integers, pairs

TYPES = {"u16": "u2", "s16": "i2", "u32": "u4", "s32": "i4", "u64": "u8", "s64": "i8"}


def wrapped(values: list[int], dtype: str) -> np.ndarray:
    bits = 8 * np.dtype(dtype).itemsize
    return np.array([v & (1 << bits) - 1 for v in values], f"u{bits // 8}").view(dtype)


def check(code: str, kind: str, f: Callable[..., int], count: int, result: str | None = None) -> None:
    values = integers(TYPES[kind])
    inputs = pairs(*[values if i < 2 else values[::3] for i in range(count)])
    expected = wrapped([f(*v) for v in zip(*(x.tolist() for x in inputs), strict=True)], result or TYPES[kind])
    np.testing.assert_array_equal(apply(code, expected.dtype, *inputs), expected)


def bits_of(kind: str) -> int:
    return int(kind[1:])


def quotient(a: int, b: int) -> int:
    """Division that rounds towards zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("name", "f"),
    [
        ("add", lambda a, b: a + b),
        ("sub", lambda a, b: a - b),
        ("mul.lo", lambda a, b: a * b),
        ("min", min),
        ("max", max),
    ],
)
def test_two_operands(name: str, f: Callable[..., int], kind: str) -> None:
    check(f"{name}.{kind} {{d}}, {{a}}, {{b}};", kind, f, 2)


@pytest.mark.parametrize("kind", TYPES)
def test_high_half_of_a_product(kind: str) -> None:
    bits = bits_of(kind)
    check(f"mul.hi.{kind} {{d}}, {{a}}, {{b}};", kind, lambda a, b: a * b >> bits, 2)
    check(f"mad.hi.{kind} {{d}}, {{a}}, {{b}}, {{c}};", kind, lambda a, b, c: (a * b >> bits) + c, 3)


@pytest.mark.parametrize("kind", TYPES)
def test_multiply_add_and_absolute_difference(kind: str) -> None:
    check(f"mad.lo.{kind} {{d}}, {{a}}, {{b}}, {{c}};", kind, lambda a, b, c: a * b + c, 3)
    check(f"sad.{kind} {{d}}, {{a}}, {{b}}, {{c}};", kind, lambda a, b, c: c + abs(a - b), 3)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_product(kind: str) -> None:
    wide = TYPES[kind[0] + str(2 * bits_of(kind))]
    check(f"mul.wide.{kind} {{d}}, {{a}}, {{b}};", kind, lambda a, b: a * b, 2, wide)
    a, b = pairs(integers(TYPES[kind]), integers(TYPES[kind]))
    c = np.resize(integers(wide), a.shape)
    expected = wrapped([x * y + z for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], wide)
    np.testing.assert_array_equal(apply(f"mad.wide.{kind} {{d}}, {{a}}, {{b}}, {{c}};", wide, a, b, c), expected)


@pytest.mark.parametrize("kind", TYPES)
def test_division(kind: str) -> None:
    """The manual promises nothing for a division by zero, so it is not tested."""
    values = integers(TYPES[kind])
    a, b = pairs(values, values[values != 0])
    both = list(zip(a.tolist(), b.tolist(), strict=True))
    expected = wrapped([quotient(x, y) for x, y in both], TYPES[kind])
    np.testing.assert_array_equal(apply(f"div.{kind} {{d}}, {{a}}, {{b}};", TYPES[kind], a, b), expected)
    rest = wrapped([x - quotient(x, y) * y for x, y in both], TYPES[kind])
    np.testing.assert_array_equal(apply(f"rem.{kind} {{d}}, {{a}}, {{b}};", TYPES[kind], a, b), rest)


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_sign(kind: str) -> None:
    check(f"neg.{kind} {{d}}, {{a}};", kind, lambda a: -a, 1)
    check(f"abs.{kind} {{d}}, {{a}};", kind, abs, 1)


def clamp(x: int) -> int:
    return max(-(2**31), min(2**31 - 1, x))


def test_saturation() -> None:
    check("add.sat.s32 {d}, {a}, {b};", "s32", lambda a, b: clamp(a + b), 2)
    check("sub.sat.s32 {d}, {a}, {b};", "s32", lambda a, b: clamp(a - b), 2)
    check("mad.hi.sat.s32 {d}, {a}, {b}, {c};", "s32", lambda a, b, c: clamp((a * b >> 32) + c), 3)


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_carries(kind: str) -> None:
    """A number of two registers: the condition code is the carry out of the upper bit, whatever the sign."""
    bits = bits_of(kind)
    values = integers(f"u{bits // 8}")
    low = pairs(values, values)
    top = wrapped([5, -1, 1 << bits - 1, 0], f"u{bits // 8}")
    a1, b1 = np.resize(top, low[0].shape), np.resize(top[::-1], low[0].shape)
    rows = list(zip(*(x.tolist() for x in (*low, a1, b1)), strict=True))
    for first, second, sign in ("add.cc", "addc", 1), ("sub.cc", "subc", -1):
        code = f"{first}.{kind} {{d}}, {{a}}, {{b}};\n{second}.{kind} {{d}}, {{c}}, {{e}};"
        whole = [(x + (p << bits) + sign * (y + (q << bits))) >> bits for x, y, p, q in rows]
        np.testing.assert_array_equal(apply(code, top.dtype, *low, a1, b1), wrapped(whole, f"u{bits // 8}"))


def test_carry_goes_through_three_registers() -> None:
    ones, zero = np.full(32, 2**32 - 1, np.uint32), np.zeros(32, np.uint32)
    one = np.arange(32, dtype=np.uint32) % 2
    code = "add.cc.u32 {d}, {a}, {c};\naddc.cc.u32 {d}, {a}, {b};\naddc.u32 {d}, {b}, {b};"
    np.testing.assert_array_equal(apply(code, np.uint32, ones, zero, one), one)
    code = "sub.cc.u32 {d}, {b}, {c};\nsubc.cc.u32 {d}, {b}, {b};\nsubc.u32 {d}, {b}, {b};"
    np.testing.assert_array_equal(apply(code, np.uint32, ones, zero, one), 0 - one)


@pytest.mark.parametrize("kind", ["u32", "u64"])
def test_product_of_two_registers(kind: str) -> None:
    """The second register of a * b + c, with a carry from the first."""
    bits = bits_of(kind)
    code = f"mad.lo.cc.{kind} {{d}}, {{a}}, {{b}}, {{c}};\nmadc.hi.{kind} {{d}}, {{a}}, {{b}}, {{c}};"
    check(code, kind, lambda a, b, c: (a * b + c + (c << bits)) >> bits, 3)


@pytest.mark.parametrize("kinds", [("u32", "u32"), ("s32", "s32"), ("u32", "s32"), ("s32", "u32")])
def test_dot_products(kinds: tuple[str, str]) -> None:
    a, b = (np.random.default_rng(i).integers(0, 2**32, 64, dtype=np.uint32) for i in range(2))
    c = np.random.default_rng(2).integers(0, 2**32, 64, dtype=np.uint32)

    def parts(x: np.ndarray, kind: str, size: int) -> np.ndarray:
        return x.view(f"{'i' if kind == 's32' else 'u'}{size}").reshape(64, -1).astype(np.int64)

    suffix = ".".join(kinds)
    bytes_of_b = parts(b, kinds[1], 1)
    four = (parts(a, kinds[0], 1) * bytes_of_b).sum(1) + c
    np.testing.assert_array_equal(
        apply(f"dp4a.{suffix} {{d}}, {{a}}, {{b}}, {{c}};", np.uint32, a, b, c), four.astype(np.uint32)
    )
    for half, chosen in ("lo", bytes_of_b[:, :2]), ("hi", bytes_of_b[:, 2:]):
        two = (parts(a, kinds[0], 2) * chosen).sum(1) + c
        out = apply(f"dp2a.{half}.{suffix} {{d}}, {{a}}, {{b}}, {{c}};", np.uint32, a, b, c)
        np.testing.assert_array_equal(out, two.astype(np.uint32))


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_products_of_24_bits(kind: str) -> None:
    def low(x: int) -> int:
        x &= 0xFFFFFF
        return x - (1 << 24) if kind == "s32" and x >> 23 else x

    check(f"mul24.lo.{kind} {{d}}, {{a}}, {{b}};", kind, lambda a, b: low(a) * low(b), 2)
    check(f"mul24.hi.{kind} {{d}}, {{a}}, {{b}};", kind, lambda a, b: low(a) * low(b) >> 16, 2)
    check(f"mad24.lo.{kind} {{d}}, {{a}}, {{b}}, {{c}};", kind, lambda a, b, c: low(a) * low(b) + c, 3)
    check(f"mad24.hi.{kind} {{d}}, {{a}}, {{b}}, {{c}};", kind, lambda a, b, c: (low(a) * low(b) >> 16) + c, 3)


def test_values_are_distinct() -> None:
    """Otherwise the tests above would test little."""
    for dtype in TYPES.values():
        assert all(a != b for a, b in pairwise(sorted(set(integers(dtype).tolist()))))
        assert len(set(integers(dtype).tolist())) >= 15
