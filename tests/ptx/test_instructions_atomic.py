"""atom and red in every space: results by the PTX manual's definitions, old values returned, races, counters."""

from collections.abc import Callable

import numpy as np
import pytest
from programs import errors, kernel, launch, load, run, store

SPACES = ["global", "shared", "generic", "generic_shared"]
U32 = 2**32

# op, type, the operands of 32 lanes, the start, the expected end
INTEGER_CASES: list[tuple[str, str, list[int], int, int]] = [
    ("add", "u32", list(range(32)), U32 - 10, 496 - 10),
    ("add", "s32", [-5] * 32, 7, 7 - 160),
    ("add", "u64", [2**33] * 32, 5, 2**38 + 5),
    ("min", "u32", [9 + lane for lane in range(32)], U32 - 1, 9),
    ("min", "s32", [lane - 20 for lane in range(32)], 3, -20),
    ("min", "u64", [2**40 + lane for lane in range(32)], 2**50, 2**40),
    ("min", "s64", [-(2**40) - lane for lane in range(32)], 0, -(2**40) - 31),
    ("max", "u32", list(range(32)), 17, 31),
    ("max", "s32", [-lane - 1 for lane in range(32)], -9, -1),
    ("max", "u64", [2**63 + lane for lane in range(32)], 5, 2**63 + 31),
    ("max", "s64", [-lane - 2 for lane in range(32)], -(2**60), -2),
    ("and", "b32", [U32 - 1 - (1 << lane if lane % 2 else 0) for lane in range(32)], U32 - 1, 0x55555555),
    ("or", "b32", [1 << lane if lane % 3 == 0 else 0 for lane in range(32)], 0, sum(1 << k for k in range(0, 32, 3))),
    ("xor", "b32", [1 << (lane % 31) for lane in range(32)], 0, 0x7FFFFFFE),
    ("and", "b64", [2**64 - 1 - (1 << (lane + 20)) for lane in range(32)], 2**64 - 1, 2**64 - 1 - (2**52 - 2**20)),
    ("or", "b64", [1 << (2 * lane) for lane in range(32)], 0, 0x5555555555555555),
    ("xor", "b64", [1 << 40] * 31 + [1], 0, (1 << 40) + 1),
    # 0, 1, 2, …, 9, 0, 1, …: 32 steps of a counter modulo 10
    ("inc", "u32", [9] * 32, 0, 2),
    ("inc", "u32", [5] + [9] * 31, 7, 1),
    # down from 3: 3, 2, 1, 0, 9, 8, …: 32 steps modulo 10 with a start above the bound first
    ("dec", "u32", [9] * 32, 3, 1),
    ("dec", "u32", [9] * 32, 1000, 8),
    ("exch", "b32", list(range(100, 132)), 1, 131),
    ("exch", "b64", [lane << 35 for lane in range(32)], 1, 31 << 35),
]


def atomic_body(space: str, op: str, kind: str, returned: bool = True) -> tuple[str, int]:
    """Buffer 0: the target, 1: the lanes' operands, 2: the old values. Shared memory starts as the target."""
    bits = {"f16x2": 32, "bf16x2": 32, "bf16": 16}.get(kind) or int(kind[1:])
    wide = f"b{bits}"
    register = {16: "%h", 32: "%r", 64: "%rd"}[bits]
    suffix = ".noftz" if "f16" in kind else ""
    name = f"{op}{suffix}.{kind}"
    qualified = "" if space.startswith("generic") else f".{space}"
    body = load(f"{register}0", 1, wide)
    at = "%buffer0"
    if "shared" in space:
        body += f"""
        ld.global.{wide} {register}5, [%buffer0];
        mov.u32 %r20, tile;
        setp.eq.u32 %p0, %thread, 0;
        @%p0 st.shared.{wide} [%r20], {register}5;
        bar.sync 0;
        """
        at = "%r20"
        if space != "shared":
            body += "cvt.u64.u32 %rd20, %r20;\ncvta.shared.u64 %rd21, %rd20;\n"
            at = "%rd21"
    if returned:
        body += f"atom{qualified}.{name} {register}1, [{at}], {register}0;\n" + store(f"{register}1", 2, wide)
    else:
        body += f"red{qualified}.{name} [{at}], {register}0;\n"
    if "shared" in space:
        body += f"bar.sync 0;\nld.shared.{wide} {register}6, [%r20];\n@%p0 st.global.{wide} [%buffer0], {register}6;\n"
    return body, bits


def numbers(values: list[int], bits: int) -> np.ndarray:
    return np.array([v % 2**bits for v in values], np.dtype(f"u{bits // 8}"))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("case", INTEGER_CASES, ids=lambda c: f"{c[0]}-{c[1]}")
def test_integers(case: tuple[str, str, list[int], int, int], space: str) -> None:
    op, kind, brought, start, end = case
    body, bits = atomic_body(space, op, kind)
    target, old = numbers([start], bits), np.zeros(32, np.dtype(f"u{bits // 8}"))
    run(body, target, numbers(brought, bits), old, shared=16)
    assert target[0] == end % 2**bits
    assert old[0] == start % 2**bits  # lanes take turns in order
    if op == "exch":
        np.testing.assert_array_equal(old[1:], numbers(brought, bits)[:-1])
    if op == "add":
        np.testing.assert_array_equal(old, numbers([start + sum(brought[:lane]) for lane in range(32)], bits))
    if op not in ("exch",):
        body, _ = atomic_body(space, op, kind, returned=False)
        again = numbers([start], bits)
        run(body, again, numbers(brought, bits), shared=16)
        assert again[0] == target[0]


def half(x: list[float]) -> np.ndarray:
    return np.array(x, np.float16).view(np.uint16)


def bfloat(x: list[float]) -> np.ndarray:
    return (np.array(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


ENCODE: dict[str, Callable[[list[float]], np.ndarray]] = {
    "f32": lambda x: np.array(x, np.float32).view(np.uint32),
    "f64": lambda x: np.array(x, np.float64).view(np.uint64),
    "f16": half,
    "bf16": bfloat,
    "f16x2": lambda x: np.repeat(half(x), 2).view(np.uint32),
    "bf16x2": lambda x: np.repeat(bfloat(x), 2).view(np.uint32),
}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", ENCODE)
def test_floats(kind: str, space: str) -> None:
    brought = [0.5 * lane for lane in range(32)]
    body, bits = atomic_body(space, "add", kind)
    target = ENCODE[kind]([-200.0])
    old = np.zeros(32, np.dtype(f"u{bits // 8}"))
    run(body, target, ENCODE[kind](brought), old, shared=16)
    expected = [-200.0]
    for x in brought:  # each sum rounded to the type; bfloat16 has 8 bits of mantissa
        expected.append(expected[-1] + x if "b" not in kind else round_to_bfloat(expected[-1] + x))
    np.testing.assert_array_equal(target, ENCODE[kind]([expected[-1]]))
    np.testing.assert_array_equal(old, ENCODE[kind](expected[:-1]))


def round_to_bfloat(x: float) -> float:
    bits = int(np.float32(x).view(np.uint32))
    bits += 0x7FFF + (bits >> 16 & 1)
    return float(np.uint32(bits >> 16 << 16).view(np.float32))


@pytest.mark.parametrize(
    ("space", "flushed"), [("global", True), ("generic", True), ("shared", False), ("generic_shared", False)]
)
def test_subnormals(space: str, flushed: bool) -> None:
    """An f32 addition flushes subnormals in global memory, and keeps them in shared memory."""
    target = np.array([1e-40], np.float32).view(np.uint32)
    start = target.copy()
    body, _ = atomic_body(space, "add", "f32", returned=False)
    run(body, target, np.zeros(32, np.uint32), shared=16)
    assert target[0] == (0 if flushed else start[0])


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_compare_and_swap(kind: str) -> None:
    """Lane l replaces l by l + 1. From 0 on, all lanes succeed, in their order. From 7 on, lane 7 is the first."""
    register = {"b16": "%h", "b32": "%r", "b64": "%rd"}[kind]
    dtype = np.dtype(f"u{int(kind[1:]) // 8}")
    body = load(f"{register}0", 1, kind) + load(f"{register}1", 2, kind)
    body += f"atom.global.cas.{kind} {register}2, [%buffer0], {register}0, {register}1;\n"
    body += store(f"{register}2", 3, kind)
    lanes = np.arange(32, dtype=dtype)
    for start in (0, 7):
        target, old = np.array([start], dtype), np.zeros(32, dtype)
        run(body, target, lanes, lanes + dtype.type(1), old)
        assert target[0] == 32
        np.testing.assert_array_equal(old, np.maximum(lanes, start))


def test_lanes_that_are_left_out() -> None:
    target = np.zeros(1, np.uint32)
    body = "and.b32 %r0, %thread, 1;\nsetp.eq.u32 %p0, %r0, 0;\n@%p0 atom.global.add.u32 %r1, [%buffer0], 1;\n"
    run(body, target)
    assert target[0] == 16


def test_qualifiers_are_accepted() -> None:
    target = np.zeros(1, np.uint32)
    forms = [
        "atom.global.gpu.acq_rel.add.u32 %r1, [%buffer0], 1;",
        "atom.acq_rel.gpu.global.add.u32 %r1, [%buffer0], 1;",
        "atom.relaxed.sys.global.add.u32 _, [%buffer0], 1;",
        "red.release.cta.global.add.u32 [%buffer0], 1;",
        "atom.add.u32 %r1, [%buffer0 + 0], 1;",
    ]
    run("\n".join(forms), target)
    assert target[0] == 32 * len(forms)


def test_atomics_of_several_warps_are_no_race() -> None:
    out = np.zeros(1, np.uint32)
    body = """
    mov.u32 %r0, tile;
    setp.eq.u32 %p0, %thread, 0;
    @%p0 st.shared.u32 [%r0], 0;
    bar.sync 0;
    atom.shared.add.u32 %r1, [%r0], 1;
    {barrier}
    ld.shared.u32 %r2, [%r0];
    @%p0 st.global.u32 [%buffer0], %r2;
    """
    run(body.format(barrier="bar.sync 0;"), out, block=(128, 1, 1), shared=16)
    assert out[0] == 128
    found = errors(body.format(barrier=""), out, block=(128, 1, 1), shared=16)
    assert {e["kind"] for e in found} == {"race"}
    assert "atomic operation" in found[0]["message"]


def test_atomic_and_plain_write_race() -> None:
    body = """
    mov.u32 %r0, tile;
    setp.lt.u32 %p0, %thread, 32;
    @%p0 st.shared.u32 [%r0], 0;
    @!%p0 red.shared.add.u32 [%r0], 1;
    """
    found = errors(body, block=(64, 1, 1), shared=16)
    assert {e["kind"] for e in found} == {"race"}


def test_counters() -> None:
    """32 lanes access 4 neighbouring words: one request of one sector."""
    target = np.zeros(8, np.uint32)
    body = "and.b32 %r0, %thread, 3;\nmad.wide.u32 %rd0, %r0, 4, %buffer0;\nred.global.add.u32 [%rd0], 1;\n"
    counters = run(body, target)
    assert target.tolist() == [8, 8, 8, 8, 0, 0, 0, 0]
    assert counters["global_atomic_requests"] == 1
    assert counters["global_atomic_bytes"] == 128
    assert counters["global_atomic_sectors"] <= 2  # one, or two if the buffer starts inside a sector
    assert counters["global_load_requests"] == counters["global_store_requests"] == 0


def test_memory_checks() -> None:
    target = np.zeros(2, np.uint32)
    (error,) = errors("red.global.add.u32 [%buffer0 + 8], 1;", target)
    assert error["kind"] == "bounds"
    (error,) = errors("red.global.add.u32 [%buffer0 + 2], 1;", target)
    assert error["kind"] == "misaligned"
    (error,) = errors("red.global.add.u32 [%buffer0], 1;", target, initialised=False)
    assert error["kind"] == "uninitialised"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("red.global.exch.b32 [%rd0], %r1;", "red has neither"),
        ("atom.global.add.f16x2 %r1, [%rd0], %r2;", "noftz"),
        ("atom.global.add.s64 %rd1, [%rd0], %rd2;", "does not exist"),
        ("atom.global.inc.u64 %rd1, [%rd0], %rd2;", "does not exist"),
        ("atom.global.cas.b128 %rd1, [%rd0], %rd2, %rd3;", "b128"),
        ("atom.global.v2.f32.add {%f1, %f2}, [%rd0], {%f3, %f4};", "atom"),
    ],
)
def test_unsupported(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch(kernel(text, 0))
