"""shfl.sync, vote.sync, match.sync, redux.sync and activemask, compared with the formulas of the PTX manual."""

import numpy as np
import pytest
from programs import errors, kernel, launch, load, run, store

LANES = np.arange(32, dtype=np.uint32)
VALUES = LANES * 1000 + 7


def shuffled(mode: str, b: int, c: int) -> tuple[np.ndarray, np.ndarray]:
    """The manual's pseudocode, lane by lane."""
    d, p = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    segment, clamp, delta = c >> 8 & 31, c & 31, b & 31
    for lane in range(32):
        most, least = (lane & segment) | (clamp & ~segment & 31), lane & segment
        if mode == "up":
            j = lane - delta
            inside = j >= most
        elif mode == "down":
            j = lane + delta
            inside = j <= most
        elif mode == "bfly":
            j = lane ^ delta
            inside = j <= most
        else:
            j = least | (delta & ~segment & 31)
            inside = j <= most
        d[lane], p[lane] = VALUES[j if inside else lane], inside
    return d, p


def segments(width: int, clamp: int) -> int:
    return (32 - width) << 8 | clamp


@pytest.mark.parametrize("width", [32, 16, 8, 2])
@pytest.mark.parametrize("delta", [0, 1, 3, 8, 31, 33])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffle(mode: str, delta: int, width: int) -> None:
    c = segments(width, 0 if mode == "up" else 31)
    d, p = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    body = load("%r0", 0, "b32") + f"shfl.sync.{mode}.b32 %r1|%p1, %r0, {delta}, {c}, -1;\nselp.u32 %r2, 1, 0, %p1;\n"
    run(body + store("%r1", 1, "b32") + store("%r2", 2, "b32"), VALUES.copy(), d, p)
    expected, inside = shuffled(mode, delta, c)
    np.testing.assert_array_equal(d, expected)
    np.testing.assert_array_equal(p, inside)


def test_shuffle_by_hand() -> None:
    """down by 4 in segments of 8: lanes 0-3 of a segment get lanes 4-7, the others keep their own."""
    d = np.zeros(32, np.uint32)
    body = load("%r0", 0, "b32") + f"shfl.sync.down.b32 %r1, %r0, 4, {0x181F}, -1;\n" + store("%r1", 1, "b32")
    run(body, LANES.copy(), d)
    assert d[:16].tolist() == [4, 5, 6, 7, 4, 5, 6, 7, 12, 13, 14, 15, 12, 13, 14, 15]


def test_shuffle_takes_its_lane_from_a_register() -> None:
    """A rotation: every lane reads another lane."""
    d = np.zeros(32, np.float32)
    source = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    body = load("%f0", 0, "f32") + "add.u32 %r1, %thread, 5;\nshfl.sync.idx.b32 %f1, %f0, %r1, 31, -1;\n"
    run(body + store("%f1", 1, "f32"), source, d)
    np.testing.assert_array_equal(d, np.roll(source, -5))


def test_shuffle_from_a_lane_outside_is_undefined() -> None:
    """An undefined result is all ones, a NaN in every format, and not something that looks right."""
    d = np.zeros(32, np.uint32)
    body = """
    setp.lt.u32 %p0, %thread, 8;
    @!%p0 bra done;
    shfl.sync.down.b32 %r1, %thread, 4, 31, 255;
    """
    run(body + store("%r1", 0, "b32") + "done:\n", d)
    assert d[:8].tolist() == [4, 5, 6, 7] + [2**32 - 1] * 4


def test_lanes_wait_for_each_other() -> None:
    """Two paths lead to one shuffle, and the lanes that come first wait."""
    d = np.zeros(32, np.uint32)
    body = """
    and.b32 %r0, %thread, 1;
    setp.eq.u32 %p0, %r0, 0;
    mul.lo.u32 %r1, %thread, 10;
    @%p0 bra join;
    add.u32 %r1, %r1, 1;
    add.u32 %r1, %r1, 1;
    join:
    shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;
    """
    counters = run(body + store("%r2", 0, "b32"), d)
    own = LANES * 10 + 2 * (LANES % 2)
    np.testing.assert_array_equal(d, own[LANES ^ 1])
    assert counters["divergent_branches"] == 1


def test_missing_lane_is_a_deadlock() -> None:
    """Lane 0 waits for the whole warp at one place, and the others wait at the vote."""
    body = """
    setp.eq.u32 %p0, %thread, 0;
    @%p0 bra zero;
    vote.sync.any.pred %p1, %p0, -1;
    bra done;
    zero:
    shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;
    done:
    """
    (error,) = errors(body)
    assert error["kind"] == "deadlock"
    assert "31 lanes at" in error["message"] and "vote.sync" in error["message"] and "shfl.sync" in error["message"]


def test_lane_outside_the_mask() -> None:
    (error,) = errors("shfl.sync.bfly.b32 %r2, %thread, 1, 31, 0x7fffffff;")
    assert error["kind"] == "warp"
    assert "lane 31" in error["message"]


TILE_OF_4 = "and.b32 %r1, %thread, 28;\nshl.b32 %r2, 15, %r1;\n"  # the mask of the thread's four lanes


def test_tiles_with_masks_of_their_own() -> None:
    """Lanes that are together but give different masks exchange within their tiles."""
    out = np.zeros((32, 3), np.uint32)
    body = (
        TILE_OF_4
        + """
    shfl.sync.bfly.b32 %r3, %thread, 3, 31, %r2;
    setp.eq.u32 %p0, %thread, 9;
    vote.sync.ballot.b32 %r4, %p0, %r2;
    redux.sync.add.u32 %r5, %thread, %r2;
    bar.warp.sync %r2;
    """
    )
    run(body + "".join(store(f"%r{3 + i}", 0, "b32", i, 3) for i in range(3)), out)
    for lane in range(32):
        first = lane & ~3
        assert out[lane].tolist() == [lane ^ 3, 1 << 9 if first == 8 else 0, 4 * first + 6]


def test_tiles_that_come_one_after_the_other() -> None:
    """Odd tiles are late, and lanes of even tiles come in two groups. A tile waits for its own lanes only."""
    out = np.zeros(32, np.uint32)
    body = (
        TILE_OF_4
        + """
    setp.lt.u32 %p0, %thread, 10;
    mov.u32 %r6, %thread;
    @%p0 bra join;
    add.u32 %r6, %r6, 100;
    join:
    shfl.sync.bfly.b32 %r3, %r6, 3, 31, %r2;
    """
    )
    counters = run(body + store("%r3", 0, "b32"), out)
    assert out.tolist() == [(lane ^ 3) + (0 if lane ^ 3 < 10 else 100) for lane in range(32)]
    assert counters["divergent_branches"] == 1


def test_exited_lanes_are_not_waited_for() -> None:
    d = np.zeros(32, np.uint32)
    body = "setp.gt.u32 %p0, %thread, 19;\n@%p0 exit;\nvote.sync.ballot.b32 %r1, !%p0, -1;\n" + store("%r1", 0, "b32")
    run(body, d)
    assert d.tolist() == [2**20 - 1] * 20 + [0] * 12


@pytest.mark.parametrize("chosen", [0, 0x80000001, 0xFFFFFFFF])
@pytest.mark.parametrize("members", [0xFFFFFFFF, 0x0000FF00])
def test_vote(chosen: int, members: int) -> None:
    out = np.zeros((32, 4), np.uint32)
    body = f"""
    mov.u32 %r0, %lanemask_eq;
    and.b32 %r1, %r0, {members};
    setp.eq.u32 %p9, %r1, 0;
    @%p9 bra done;
    and.b32 %r1, %r0, {chosen};
    setp.ne.u32 %p0, %r1, 0;
    vote.sync.all.pred %p1, %p0, {members};
    vote.sync.any.pred %p2, %p0, {members};
    vote.sync.uni.pred %p3, %p0, {members};
    vote.sync.ballot.b32 %r5, %p0, {members};
    selp.u32 %r2, 1, 0, %p1;
    selp.u32 %r3, 1, 0, %p2;
    selp.u32 %r4, 1, 0, %p3;
    """
    body += "".join(store(f"%r{2 + i}", 0, "b32", i, 4) for i in range(4)) + "done:\n"
    run(body, out)
    yes = chosen & members
    for lane in range(32):
        inside = members >> lane & 1
        expected = [yes == members, yes != 0, yes in (0, members), yes] if inside else [0, 0, 0, 0]
        assert out[lane].tolist() == expected


def test_vote_of_a_negated_predicate() -> None:
    out = np.zeros(32, np.uint32)
    run("setp.lt.u32 %p0, %thread, 4;\nvote.sync.ballot.b32 %r1, !%p0, -1;\n" + store("%r1", 0, "b32"), out)
    assert set(out.tolist()) == {0xFFFFFFF0}


def test_activemask() -> None:
    out = np.zeros(32, np.uint32)
    body = "setp.lt.u32 %p0, %thread, 3;\n@%p0 bra few;\nbra done;\nfew:\nactivemask.b32 %r1;\n"
    run(body + store("%r1", 0, "b32") + "done:\n", out)
    assert out.tolist() == [7, 7, 7] + [0] * 29


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_match_any(kind: str) -> None:
    values = (np.arange(32) % 5).astype(np.uint32 if kind == "b32" else np.uint64)
    if kind == "b64":
        values <<= np.uint64(40)
    out = np.zeros(32, np.uint32)
    register = "%r0" if kind == "b32" else "%rd0"
    run(load(register, 0, kind) + f"match.any.sync.{kind} %r1, {register}, -1;\n" + store("%r1", 1, "b32"), values, out)
    assert out.tolist() == [sum(1 << k for k in range(32) if k % 5 == lane % 5) for lane in range(32)]


@pytest.mark.parametrize("same", [True, False])
def test_match_all(same: bool) -> None:
    values = np.full(32, 9, np.uint32)
    values[17] += not same
    out = np.zeros((32, 2), np.uint32)
    body = load("%r0", 0, "b32") + "match.all.sync.b32 %r1|%p1, %r0, -1;\nselp.u32 %r2, 1, 0, %p1;\n"
    run(body + store("%r1", 1, "b32", 0, 2) + store("%r2", 1, "b32", 1, 2), values, out)
    assert out.tolist() == [[2**32 - 1, 1] if same else [0, 0]] * 32


REDUCTIONS = {
    "add": lambda x: x.sum(dtype=np.int64),
    "min": np.min,
    "max": np.max,
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
    "xor": np.bitwise_xor.reduce,
}


@pytest.mark.parametrize("members", [0xFFFFFFFF, 0xF0F0F0F0])
@pytest.mark.parametrize("kind", ["u32", "s32"])
@pytest.mark.parametrize("op", REDUCTIONS)
def test_redux(op: str, kind: str, members: int) -> None:
    values = np.random.default_rng(1).integers(0, 2**32, 32, dtype=np.uint32)
    out = np.zeros(32, np.uint32)
    name = "b32" if op in ("and", "or", "xor") else kind
    body = (
        load("%r0", 0, "b32")
        + f"""
    mov.u32 %r2, %lanemask_eq;
    and.b32 %r2, %r2, {members};
    setp.eq.u32 %p0, %r2, 0;
    @%p0 bra done;
    redux.sync.{op}.{name} %r1, %r0, {members};
    """
    )
    run(body + store("%r1", 1, "b32") + "done:\n", values, out)
    inside = (members >> LANES & 1).astype(bool)
    taken = values[inside].view(np.int32 if kind == "s32" else np.uint32)
    expected = int(REDUCTIONS[op](taken)) & 0xFFFFFFFF
    assert set(out[inside].tolist()) == {expected}
    assert not out[~inside].any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shfl.down.b32 %r1, %r2, 1, 31;", "without .sync"),
        ("shfl.sync.idx.b64 %rd1, %rd2, 1, 31, -1;", "unsupported type"),
        ("redux.sync.and.u32 %r1, %r2, -1;", "unsupported type"),
        ("elect.sync %r1|%p1, -1;", "elect"),
        ("vote.sync.ballot.pred %p1, %p2, -1;", "unsupported type"),
    ],
)
def test_unsupported(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch(kernel(text, 0))
