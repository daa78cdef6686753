"""mov with packing, special registers and clocks."""

import numpy as np
import pytest
from elementwise import apply
from programs import run, store

WORDS = np.random.default_rng(0).integers(0, 2**64, 96, dtype=np.uint64)


@pytest.mark.parametrize("dtype", ["u2", "u4", "u8", "f4", "f8"])
def test_move(dtype: str) -> None:
    x = WORDS.view(dtype)[:96].copy()
    kind = f"{'f' if dtype[0] == 'f' else 'b'}{8 * x.itemsize}"
    bits = f"u{x.itemsize}"
    np.testing.assert_array_equal(apply(f"mov.{kind} {{d}}, {{a}};", x.dtype, x).view(bits), x.view(bits))


def test_immediates() -> None:
    """Decimal, hexadecimal, octal and binary integers, exact floats of both widths, -1 in every width."""
    x = np.zeros(32, np.uint32)
    cases = {"255": 255, "0xFF": 255, "0377": 255, "0b101": 5, "-1": 2**32 - 1, "0x80000000": 2**31, "7U": 7}
    for text, value in cases.items():
        assert set(apply(f"mov.b32 {{d}}, {text};", np.uint32, x).tolist()) == {value}
    assert set(apply("mov.f32 {d}, 0f40490FDB;", np.float32, x).tolist()) == {float(np.float32(np.pi))}
    assert set(apply("mov.f64 {d}, 0d400921FB54442D18;", np.float64, x).tolist()) == {np.pi}
    assert set(apply("mov.f32 {d}, 1.5;", np.float32, x).tolist()) == {1.5}
    assert set(apply("mov.b64 {d}, -1;", np.uint64, x).tolist()) == {2**64 - 1}
    assert set(apply("mov.b16 {d}, -2;", np.uint16, x).tolist()) == {2**16 - 2}


def test_halves_of_a_word() -> None:
    x = WORDS.view(np.uint32)
    low, high = x.view(np.uint16)[::2].copy(), x.view(np.uint16)[1::2].copy()
    np.testing.assert_array_equal(apply("mov.b32 {d}, {{{a}, {b}}};", np.uint32, low, high), x)
    np.testing.assert_array_equal(apply("mov.b32 {{{d}, %h1}}, {a};", np.uint16, x), low)
    np.testing.assert_array_equal(apply("mov.b32 {{%h1, {d}}}, {a};", np.uint16, x), high)
    np.testing.assert_array_equal(apply("mov.b32 {{_, {d}}}, {a};", np.uint16, x), high)


def test_parts_of_a_double_word() -> None:
    words, quarters = WORDS.view(np.uint32).reshape(-1, 2), WORDS.view(np.uint16).reshape(-1, 4)
    two = [words[:, i].copy() for i in range(2)]
    np.testing.assert_array_equal(apply("mov.b64 {d}, {{{a}, {b}}};", np.uint64, *two), WORDS)
    np.testing.assert_array_equal(apply("mov.b64 {{{d}, %r1}}, {a};", np.uint32, WORDS), two[0])
    np.testing.assert_array_equal(apply("mov.b64 {{%r1, {d}}}, {a};", np.uint32, WORDS), two[1])
    four = [quarters[:, i].copy() for i in range(4)]
    np.testing.assert_array_equal(apply("mov.b64 {d}, {{{a}, {b}, {c}, {e}}};", np.uint64, *four), WORDS)
    for i in range(4):
        parts = ", ".join("{d}" if i == k else f"%h{k}" for k in range(4))
        np.testing.assert_array_equal(apply(f"mov.b64 {{{{{parts}}}}}, {{a}};", np.uint16, WORDS), four[i])


def test_a_double_in_two_registers() -> None:
    x = np.random.default_rng(1).standard_normal(64)
    out = apply("mov.b64 {{%r1, %r2}}, {a};\nmov.b64 {d}, {{%r1, %r2}};", np.float64, x)
    np.testing.assert_array_equal(out, x)


def test_exchange_of_halves_in_place() -> None:
    """The register that is read may be one of those that are written."""
    x = np.arange(64, dtype=np.uint64) << 32 | 5
    out = apply(
        "mov.b64 %rd1, {a};\nmov.b64 {{%r1, %r2}}, %rd1;\nmov.b64 %rd1, {{%r2, %r1}};\nmov.b64 {d}, %rd1;", "u8", x
    )
    np.testing.assert_array_equal(out, np.arange(64, dtype=np.uint64) | 5 << 32)


BLOCK, GRID = (5, 3, 4), (2, 3, 2)


def special(name: str) -> np.ndarray:
    """The special register of every thread, as (block z, y, x, thread z, y, x)."""
    threads, blocks = int(np.prod(BLOCK)), int(np.prod(GRID))
    body = """
mov.u32 %r1, %tid.x; mov.u32 %r2, %tid.y; mov.u32 %r3, %tid.z;
mad.lo.u32 %r2, %r3, 3, %r2; mad.lo.u32 %thread, %r2, 5, %r1;
mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z;
mad.lo.u32 %r2, %r3, 3, %r2; mad.lo.u32 %r2, %r2, 2, %r1;
mad.lo.u32 %thread, %r2, 60, %thread;
"""
    out = np.zeros(threads * blocks, np.uint32)
    run(f"{body}mov.u32 %r5, {name};\n" + store("%r5", 0, "b32"), out, block=BLOCK, grid=GRID)
    return out.reshape(*GRID[::-1], *BLOCK[::-1])


def test_places_of_threads_and_blocks() -> None:
    axes = np.indices((*GRID[::-1], *BLOCK[::-1]))
    for i, axis in enumerate("zyx"):
        np.testing.assert_array_equal(special(f"%ctaid.{axis}"), axes[i])
        np.testing.assert_array_equal(special(f"%tid.{axis}"), axes[3 + i])
        assert set(special(f"%ntid.{axis}").ravel().tolist()) == {BLOCK[2 - i]}
        assert set(special(f"%nctaid.{axis}").ravel().tolist()) == {GRID[2 - i]}


def test_places_in_a_warp() -> None:
    """Warps are filled along x, then y, then z."""
    linear = np.arange(60)
    lane = linear % 32
    expected = {
        "%laneid": lane,
        "%warpid": linear // 32,
        "%nwarpid": np.full(60, 2),
        "%lanemask_eq": 1 << lane,
        "%lanemask_lt": (1 << lane) - 1,
        "%lanemask_le": (2 << lane) - 1,
        "%lanemask_gt": 2**32 - (2 << lane),
        "%lanemask_ge": 2**32 - (1 << lane),
    }
    for name, wanted in expected.items():
        out = special(name).reshape(-1, 60)
        np.testing.assert_array_equal(out, np.broadcast_to(wanted, out.shape), err_msg=name)
    np.testing.assert_array_equal(special("WARP_SZ"), np.full((*GRID[::-1], *BLOCK[::-1]), 32))


@pytest.mark.parametrize("clock", ["%clock64", "%globaltimer"])
def test_a_loop_that_waits_for_the_clock_ends(clock: str) -> None:
    """The clock counts executed instructions, so that it is the same in every run."""
    body = f"""
mov.u64 %rd1, {clock};
mov.u32 %r1, 0;
WAIT:
add.u32 %r1, %r1, 1;
mov.u64 %rd2, {clock};
sub.u64 %rd3, %rd2, %rd1;
setp.lt.u64 %p1, %rd3, 5000;
@%p1 bra WAIT;
"""
    turns = []
    for _ in range(2):
        out = np.zeros(32, np.uint32)
        run(body + store("%r1", 0, "b32"), out)
        turns.append(out.tolist())
    assert turns[0] == turns[1]
    assert 900 < turns[0][0] <= 30000
