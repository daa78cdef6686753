"""Logic, shifts and bit fields, compared with the definitions of the PTX manual on Python's integers."""

from collections.abc import Callable

import numpy as np
import pytest
from elementwise import apply, integers, pairs

UNSIGNED = {16: "u2", 32: "u4", 64: "u8"}


def check(code: str, dtype: str, f: Callable[..., int], *inputs: np.ndarray) -> None:
    bits = 8 * np.dtype(dtype).itemsize
    rows = zip(*(x.tolist() for x in inputs), strict=True)
    expected = np.array([f(*row) & (1 << bits) - 1 for row in rows], f"u{bits // 8}").view(dtype)
    np.testing.assert_array_equal(apply(code, expected.dtype, *inputs), expected)


@pytest.mark.parametrize("bits", UNSIGNED)
def test_logic(bits: int) -> None:
    dtype = UNSIGNED[bits]
    a, b = pairs(integers(dtype), integers(dtype))
    check(f"and.b{bits} {{d}}, {{a}}, {{b}};", dtype, lambda x, y: x & y, a, b)
    check(f"or.b{bits} {{d}}, {{a}}, {{b}};", dtype, lambda x, y: x | y, a, b)
    check(f"xor.b{bits} {{d}}, {{a}}, {{b}};", dtype, lambda x, y: x ^ y, a, b)
    check(f"not.b{bits} {{d}}, {{a}};", dtype, lambda x: ~x, a)
    check(f"cnot.b{bits} {{d}}, {{a}};", dtype, lambda x: x == 0, a)


def test_logic_of_predicates() -> None:
    a, b = pairs(*[np.arange(2, dtype=np.uint32)] * 2)
    head = "setp.ne.u32 %p1, {a}, 0; setp.ne.u32 %p2, {b}, 0;"
    tail = "selp.u32 {d}, 1, 0, %p3;"
    check(f"{head} and.pred %p3, %p1, %p2; {tail}", "u4", lambda x, y: x & y, a, b)
    check(f"{head} or.pred %p3, %p1, !%p2; {tail}", "u4", lambda x, y: x | (1 - y), a, b)
    check(f"{head} xor.pred %p3, %p1, %p2; {tail}", "u4", lambda x, y: x ^ y, a, b)
    check(f"{head} not.pred %p3, %p1; {tail}", "u4", lambda x, y: 1 - x, a, b)
    check(f"{head} mov.pred %p3, %p2; {tail}", "u4", lambda x, y: y, a, b)


@pytest.mark.parametrize("bits", UNSIGNED)
def test_shifts_clamp_their_amount(bits: int) -> None:
    amounts = np.array([0, 1, 3, bits - 1, bits, bits + 1, 255, 2**31, 2**32 - 1], np.uint32)
    a, n = pairs(integers(UNSIGNED[bits]), amounts)
    check(f"shl.b{bits} {{d}}, {{a}}, {{b}};", UNSIGNED[bits], lambda x, s: x << min(s, bits), a, n)
    check(f"shr.u{bits} {{d}}, {{a}}, {{b}};", UNSIGNED[bits], lambda x, s: x >> min(s, bits), a, n)
    check(f"shr.b{bits} {{d}}, {{a}}, {{b}};", UNSIGNED[bits], lambda x, s: x >> min(s, bits), a, n)
    signed = a.view(f"i{bits // 8}")
    check(f"shr.s{bits} {{d}}, {{a}}, {{b}};", f"i{bits // 8}", lambda x, s: x >> min(s, bits), signed, n)


def test_funnel_shift() -> None:
    a, b, c = pairs(*[integers("u4")] * 2, np.array([0, 1, 13, 31, 32, 33, 100], np.uint32))
    check("shf.l.clamp.b32 {d}, {a}, {b}, {c};", "u4", lambda x, y, n: (y << 32 | x) << min(n, 32) >> 32, a, b, c)
    check("shf.r.clamp.b32 {d}, {a}, {b}, {c};", "u4", lambda x, y, n: (y << 32 | x) >> min(n, 32), a, b, c)
    check("shf.l.wrap.b32 {d}, {a}, {b}, {c};", "u4", lambda x, y, n: (y << 32 | x) << (n & 31) >> 32, a, b, c)
    check("shf.r.wrap.b32 {d}, {a}, {b}, {c};", "u4", lambda x, y, n: (y << 32 | x) >> (n & 31), a, b, c)


@pytest.mark.parametrize(
    ("table", "f"),
    [
        (0x1A, lambda a, b, c: (a & b | c) ^ a),  # the manual's example
        (0x80, lambda a, b, c: a & b & c),
        (0x40, lambda a, b, c: a & b & ~c),
        (0xFE, lambda a, b, c: a | b | c),
        (0x96, lambda a, b, c: a ^ b ^ c),
        (0xE8, lambda a, b, c: a & b | b & c | a & c),
        (0xCA, lambda a, b, c: a & b | ~a & c),
        (0x00, lambda a, b, c: 0),
        (0xFF, lambda a, b, c: -1),
    ],
)
def test_lop3(table: int, f: Callable[..., int]) -> None:
    check(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table};", "u4", f, *pairs(*[integers("u4")] * 3))


def extracted(a: int, b: int, c: int, bits: int, signed: bool) -> int:
    """The manual's pseudocode, bit by bit."""
    msb, pos, count = bits - 1, b & 255, c & 255
    sign = 0 if not signed or count == 0 else a >> min(pos + count - 1, msb) & 1
    return sum((a >> pos + i & 1 if i < count and pos + i <= msb else sign) << i for i in range(bits))


def inserted(a: int, b: int, c: int, d: int, bits: int) -> int:
    pos, count = c & 255, d & 255
    for i in range(count):
        if pos + i < bits:
            b = b & ~(1 << pos + i) | (a >> i & 1 if i < bits else 0) << pos + i
    return b


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("signed", [False, True])
def test_extract(bits: int, signed: bool) -> None:
    dtype, kind = f"{'i' if signed else 'u'}{bits // 8}", f"{'s' if signed else 'u'}{bits}"
    counts = np.array([0, 1, 5, bits // 2, bits - 1, bits, bits + 9, 255, 256 + 3], np.uint32)
    inputs = pairs(integers(dtype), counts, counts)
    f = lambda a, b, c: extracted(a, b, c, bits, signed)  # noqa: E731
    check(f"bfe.{kind} {{d}}, {{a}}, {{b}}, {{c}};", dtype, f, *inputs)


@pytest.mark.parametrize("bits", [32, 64])
def test_insert(bits: int) -> None:
    dtype = f"u{bits // 8}"
    counts = np.array([0, 1, 5, bits // 2, bits - 1, bits, bits + 9, 255, 256 + 3], np.uint32)
    inputs = pairs(integers(dtype, 2), integers(dtype, 2)[::3], counts, counts)
    f = lambda a, b, c, d: inserted(a, b, c, d, bits)  # noqa: E731
    check(f"bfi.b{bits} {{d}}, {{a}}, {{b}}, {{c}}, {{e}};", dtype, f, *inputs)


def found(a: int, bits: int, shift: bool) -> int:
    """The highest bit that differs from the sign, or -1 if there is none."""
    if a < 0:
        a = ~a
    return -1 if a == 0 else bits - a.bit_length() if shift else a.bit_length() - 1


@pytest.mark.parametrize("bits", [32, 64])
def test_counts(bits: int) -> None:
    a = integers(f"u{bits // 8}", 20)
    check(f"popc.b{bits} {{d}}, {{a}};", "u4", int.bit_count, a)
    check(f"clz.b{bits} {{d}}, {{a}};", "u4", lambda x: bits - x.bit_length(), a)
    check(f"brev.b{bits} {{d}}, {{a}};", f"u{bits // 8}", lambda x: int(f"{x:0{bits}b}"[::-1], 2), a)
    for kind, values in (f"u{bits}", a), (f"s{bits}", a.view(f"i{bits // 8}")):
        check(f"bfind.{kind} {{d}}, {{a}};", "u4", lambda x: found(x, bits, False), values)
        check(f"bfind.shiftamt.{kind} {{d}}, {{a}};", "u4", lambda x: found(x, bits, True), values)


def permuted(a: int, b: int, selector: int) -> int:
    result = 0
    for i in range(4):
        pick = selector >> 4 * i & 15
        byte = (b << 32 | a) >> 8 * (pick & 7) & 255
        result |= (byte if pick < 8 else 255 * (byte >> 7)) << 8 * i
    return result


PERMUTATIONS = {
    "f4e": [0x3210, 0x4321, 0x5432, 0x6543],
    "b4e": [0x5670, 0x6701, 0x7012, 0x0123],
    "rc8": [0x0000, 0x1111, 0x2222, 0x3333],
    "ecl": [0x3210, 0x3211, 0x3222, 0x3333],
    "ecr": [0x0000, 0x1110, 0x2210, 0x3210],
    "rc16": [0x1010, 0x3232, 0x1010, 0x3232],
}


def test_permute() -> None:
    selectors = np.array([0x3210, 0x7654, 0x0011, 0xFEDC, 0x8421, 0x5140, 0xABCD7362], np.uint32)
    check("prmt.b32 {d}, {a}, {b}, {c};", "u4", permuted, *pairs(*[integers("u4")] * 2, selectors))


@pytest.mark.parametrize("mode", PERMUTATIONS)
def test_permute_by_mode(mode: str) -> None:
    inputs = pairs(*[integers("u4")[-5:]] * 2, np.arange(6, dtype=np.uint32))
    table = PERMUTATIONS[mode]
    check(f"prmt.b32.{mode} {{d}}, {{a}}, {{b}}, {{c}};", "u4", lambda a, b, c: permuted(a, b, table[c & 3]), *inputs)


def extended(a: int, n: int, signed: bool, wrap: bool) -> int:
    n = n & 31 if wrap else min(n, 32)
    if n == 0:
        return 0
    a &= (1 << n) - 1
    return a - (1 << n) if signed and a >> n - 1 else a


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_sign_or_zero_extension_and_masks(mode: str) -> None:
    a, n = pairs(integers("u4"), np.array([0, 1, 7, 31, 32, 33, 2**32 - 1], np.uint32))
    for kind, signed in ("u32", False), ("s32", True):
        f = lambda x, k, s=signed: extended(x, k, s, mode == "wrap")  # noqa: E731
        check(f"szext.{mode}.{kind} {{d}}, {{a}}, {{b}};", "u4", f, a, n)
    limit = (lambda x: x & 31) if mode == "wrap" else (lambda x: min(x, 32))
    f = lambda start, count: (1 << limit(count)) - 1 << limit(start)  # noqa: E731
    check(f"bmsk.{mode}.b32 {{d}}, {{a}}, {{b}};", "u4", f, *pairs(n, n))
