"""Block and warp barriers, fences: who waits for whom, deadlocks, and the order that the race check takes from them."""

import numpy as np
import pytest
from programs import errors, kernel, launch, run, store

SLOT = "mov.u32 %r50, tile;\nshl.b32 %r51, %thread, 2;\nadd.u32 %r52, %r50, %r51;\n"  # %r52: the thread's own word
WRITE = "st.shared.u32 [%r52], %thread;\n"


def read(distance: int, threads: int) -> str:
    """The word of the thread that is `distance` further on, cyclically in the block."""
    return f"""
    add.u32 %r60, %thread, {distance};
    and.b32 %r60, %r60, {threads - 1};
    shl.b32 %r60, %r60, 2;
    add.u32 %r60, %r60, %r50;
    ld.shared.u32 %r0, [%r60];
    """


def line_of(text: str, part: str) -> int:
    return next(i for i, line in enumerate(text.splitlines(), 1) if part in line)


FULL = [
    "bar.sync 0;\n",
    "bar.sync 3;\n",
    "barrier.sync 0;\n",
    "barrier.cta.sync.aligned 0;\n",
    "bar.cta.sync 1, 128;\n",
]


@pytest.mark.parametrize("barrier", FULL)
def test_barrier_orders_all_warps(barrier: str) -> None:
    out = np.zeros(128, np.uint32)
    counters = run(SLOT + WRITE + barrier + read(37, 128) + store("%r0", 0, "b32"), out, shared=512, block=(128, 1, 1))
    np.testing.assert_array_equal(out, np.roll(np.arange(128), -37))
    assert counters["barriers"] == 4  # warps that arrived


def test_no_barrier_is_a_race() -> None:
    out = np.zeros(128, np.uint32)
    text = kernel(SLOT + WRITE + read(37, 128) + store("%r0", 0, "b32"), 1, shared=512)
    report = launch(text, out, block=(128, 1, 1))
    races = [e for e in report["errors"] if e["kind"] == "race"]
    pair = {line_of(text, "st.shared"), line_of(text, "ld.shared")}
    assert races and {e["line"] for e in races} <= pair
    for e in races:
        assert f"line {sum(pair) - e['line']}" in e["message"]


def test_barrier_number_from_a_register() -> None:
    """Pairs of warps meet at barriers 1 and 2 of 64 threads each, and exchange within the pair."""
    out = np.zeros(128, np.uint32)
    pair = "shr.u32 %r1, %thread, 6;\nadd.u32 %r1, %r1, 1;\nbar.sync %r1, 64;\n"
    exchange = "xor.b32 %r2, %thread, 32;\nshl.b32 %r2, %r2, 2;\nadd.u32 %r2, %r2, %r50;\nld.shared.u32 %r0, [%r2];\n"
    run(SLOT + WRITE + pair + exchange + store("%r0", 0, "b32"), out, shared=512, block=(128, 1, 1))
    np.testing.assert_array_equal(out, np.arange(128) ^ 32)
    across = exchange.replace("%thread, 32", "%thread, 64")
    found = errors(SLOT + WRITE + pair + across, shared=512, block=(128, 1, 1))
    assert "race" in {e["kind"] for e in found}


def test_arrive_does_not_wait() -> None:
    """Producer warps 0 and 1 write and arrive, and consumer warps 2 and 3 wait. This orders one direction only."""
    out = np.zeros(128, np.uint32)
    body = (
        SLOT
        + """
    setp.lt.u32 %p0, %thread, 64;
    @!%p0 bra consumer;
    st.shared.u32 [%r52], %thread;
    bar.arrive 1, 128;
    bra done;
    consumer:
    bar.sync 1, 128;
    ld.shared.u32 %r0, [%r52 - 256];
    """
        + store("%r0", 0, "b32")
        + "done:\n"
    )
    run(body, out, shared=512, block=(128, 1, 1))
    assert out[64:].tolist() == list(range(64))
    # The other direction is not ordered: the producers write again while the consumers read.
    again = body.replace("bar.arrive 1, 128;", "bar.arrive 1, 128;\nst.shared.u32 [%r52], 5;")
    assert {e["kind"] for e in errors(again, out, shared=512, block=(128, 1, 1))} == {"race"}


def test_order_is_transitive() -> None:
    """Warp 0 to warp 1 at barrier 1, warp 1 to warp 2 at barrier 2: warp 2 may read what warp 0 wrote."""
    out = np.zeros(96, np.uint32)
    body = (
        SLOT
        + """
    shr.u32 %r1, %thread, 5;
    setp.eq.u32 %p0, %r1, 0;
    setp.eq.u32 %p1, %r1, 1;
    setp.eq.u32 %p2, %r1, 2;
    @%p0 st.shared.u32 [%r52], %thread;
    @%p0 bar.arrive 1, 64;
    @%p1 bar.sync 1, 64;
    @%p1 bar.arrive 2, 64;
    @%p2 bar.sync 2, 64;
    @%p2 ld.shared.u32 %r0, [%r52 - 256];
    """
        + store("%r0", 0, "b32").replace("st.", "@%p2 st.")
    )
    run(body, out, shared=384, block=(96, 1, 1))
    assert out[64:].tolist() == list(range(32))


@pytest.mark.parametrize("limit", [0, 1, 40, 128])
@pytest.mark.parametrize("form", ["bar.red", "barrier.cta.red"])
def test_reduction(form: str, limit: int) -> None:
    aligned = ".aligned" if form.startswith("barrier") else ""
    out = np.zeros((128, 4), np.uint32)
    body = f"""
    setp.lt.u32 %p0, %thread, {limit};
    {form}.popc{aligned}.u32 %r0, 0, %p0;
    {form}.and{aligned}.pred %p1, 1, %p0;
    {form}.or{aligned}.pred %p2, 2, 128, %p0;
    {form}.popc{aligned}.u32 %r3, 0, !%p0;
    selp.u32 %r1, 1, 0, %p1;
    selp.u32 %r2, 1, 0, %p2;
    """
    run(body + "".join(store(f"%r{i}", 0, "b32", i, 4) for i in range(4)), out, block=(128, 1, 1))
    assert out.tolist() == [[limit, limit == 128, limit > 0, 128 - limit]] * 128


def test_block_that_is_no_multiple_of_a_warp() -> None:
    out = np.zeros((40, 2), np.uint32)
    body = "setp.lt.u32 %p0, %thread, 40;\nbar.red.popc.u32 %r0, 0, %p0;\nbar.red.and.pred %p1, 0, %p0;\n"
    run(
        body + "selp.u32 %r1, 1, 0, %p1;\n" + store("%r0", 0, "b32", 0, 2) + store("%r1", 0, "b32", 1, 2),
        out,
        block=(40, 1, 1),
    )
    assert out.tolist() == [[40, 1]] * 40


def test_barrier_that_a_warp_misses() -> None:
    """A barrier for a number of threads also waits for threads that exited. The report says where each warp is."""
    text = kernel("setp.lt.u32 %p0, %thread, 32;\n@%p0 bra done;\nbar.sync 0, 96;\ndone:\n", 0)
    (error,) = launch(text, block=(96, 1, 1))["errors"]
    assert error["kind"] == "deadlock"
    at = f"at line {line_of(text, 'bar.sync')} 'bar.sync 0, 96;'"
    assert f"warp 0 has exited; warp 1: {at}; warp 2: {at}" in error["message"]


def test_barrier_that_some_lanes_miss() -> None:
    """Threads that have exited count as arrived, and a note says so."""
    text = kernel("setp.lt.u32 %p0, %thread, 5;\n@%p0 bra done;\nbar.sync 0;\ndone:\n", 0)
    report = launch(text, block=(64, 1, 1))
    assert report["errors"] == []
    (note,) = report["notes"]
    assert note["kind"] == "exited_before_barrier" and "5 threads have exited" in note["message"]
    assert note["line"] == line_of(text, "bar.sync")


def test_warps_at_different_barriers() -> None:
    body = "setp.lt.u32 %p0, %thread, 32;\n@%p0 bra other;\nbar.sync 1;\nbra done;\nother:\nbar.sync 2;\ndone:\n"
    (error,) = errors(body, block=(64, 1, 1))
    assert error["kind"] == "deadlock"
    assert "'bar.sync 1;'" in error["message"] and "'bar.sync 2;'" in error["message"]


def test_lanes_meet_at_the_barrier() -> None:
    """Lanes that took different branches come to one bar.sync, one after the other."""
    out = np.zeros(64, np.uint32)
    body = """
    and.b32 %r0, %thread, 1;
    setp.eq.u32 %p0, %r0, 0;
    mov.u32 %r1, 5;
    @%p0 bra join;
    mov.u32 %r1, 6;
    join:
    bar.sync 0;
    """
    counters = run(body + store("%r1", 0, "b32"), out, block=(64, 1, 1))
    assert out.tolist() == [5, 6] * 32
    assert counters["barriers"] == 2
    assert counters["divergent_branches"] == 2


def test_wrong_numbers() -> None:
    (error,) = errors("bar.sync 16;")
    assert "barrier 16 does not exist" in error["message"]
    (error,) = errors("bar.sync 1, 48;", block=(64, 1, 1))
    assert "multiple of 32, got 48" in error["message"]
    body = "setp.lt.u32 %p0, %thread, 32;\n@%p0 bar.sync 1, 64;\n@!%p0 bar.sync 1, 96;\n"
    found = errors(body, block=(64, 1, 1))
    assert any(e["kind"] == "barrier" and "96 threads here and 64" in e["message"] for e in found)


def test_lanes_of_a_warp_at_two_barriers() -> None:
    """bar.sync is .aligned: all lanes of a warp must come to the same one. Lanes may come to different barrier.sync."""
    body = "setp.lt.u32 %p0, %thread, 5;\n@%p0 bra other;\nBAR 0;\nbra done;\nother:\nBAR 0;\ndone:\n"
    (error,) = errors(body.replace("BAR", "bar.sync"))
    assert error["kind"] == "barrier" and "different barrier instructions" in error["message"]
    run(body.replace("BAR", "barrier.sync"))


@pytest.mark.parametrize("value", ["%warp", "7"])
def test_two_writes_without_order(value: str) -> None:
    """Both warps write one word. That is a race, unless the value is the same: compilers write so what several warps
    hold."""
    body = ".reg .b32 %warp;\nshr.u32 %warp, %thread, 5;\nmov.u32 %r50, tile;\n"
    body += f"mov.u32 %r1, {value};\nst.shared.u32 [%r50], %r1;\nbar.sync 0;\n"
    found = errors(body, shared=16, block=(64, 1, 1))
    assert [e["kind"] for e in found] == (["race"] if value == "%warp" else [])
    if found:
        assert "write at byte 0 by warp 1 and write by warp 0" in found[0]["message"]


def test_lanes_that_spin_let_others_go_on() -> None:
    """The lanes of one warp take a lock in turn. The holder is at a higher program counter than the lanes that spin."""
    out = np.zeros(2, np.uint32)
    body = """
    spin:
    atom.global.cas.b32 %r0, [%buffer0], 0, 1;
    setp.ne.u32 %p0, %r0, 0;
    @%p0 bra spin;
    ld.global.u32 %r1, [%buffer0 + 4];
    add.u32 %r1, %r1, 1;
    st.global.u32 [%buffer0 + 4], %r1;
    atom.global.exch.b32 %r2, [%buffer0], 0;
    """
    run(body, out, budget=10_000_000)
    assert out.tolist() == [0, 32]


PARTED = """
setp.lt.u32 %p0, %thread, 16;
@!%p0 bra second;
st.shared.u32 [%r52], %thread;
{first_sync}
bra done;
second:
{second_sync}
ld.shared.u32 %r0, [%r52 - 64];
done:
"""


@pytest.mark.parametrize("members", [-1, 0xFFFFFFFF])
def test_warp_barrier_orders_parted_lanes(members: int) -> None:
    """Two bar.warp.sync at different places meet."""
    sync = f"bar.warp.sync {members};"
    run(SLOT + PARTED.format(first_sync=sync, second_sync=sync), shared=128)


def test_parted_lanes_without_warp_barrier() -> None:
    text = kernel(SLOT + PARTED.format(first_sync="", second_sync=""), 0, shared=128)
    races = [e for e in launch(text)["errors"] if e["kind"] == "race"]
    assert races and "other lanes of it" in races[0]["message"]
    pair = {line_of(text, "st.shared"), line_of(text, "ld.shared")}
    assert {e["line"] for e in races} <= pair
    assert f"line {sum(pair) - races[0]['line']}" in races[0]["message"]


# What one lane does in shared memory, what its neighbour does then, and whether a barrier must lie between.
LANE_PAIRS = {
    "write, read": (WRITE, read(1, 32), True),
    "read, write": (WRITE + "bar.warp.sync -1;\n" + read(1, 32), WRITE, True),
    "write, write": (WRITE, "xor.b32 %r40, %r52, 4;\nst.shared.u32 [%r40], 7;\n", True),
    "write, write of the same": (WRITE, "st.shared.u32 [%r52], %thread;\n", False),
    "write, own read": (WRITE, read(0, 32), False),
    "lane 0 writes, all read": ("setp.eq.u32 %p0, %thread, 0;\n@%p0 " + WRITE, "ld.shared.u32 %r0, [%r50];\n", True),
}


@pytest.mark.parametrize("sync", ("", "bar.warp.sync -1;\n", "bar.sync 0;\n"), ids=("nothing", "warp", "block"))
@pytest.mark.parametrize("pair", LANE_PAIRS)
def test_lanes_of_a_warp_meet_in_shared_memory(pair: str, sync: str) -> None:
    """The lanes run in step here, but that is no order: since Volta, only a barrier orders them."""
    first, second, needs = LANE_PAIRS[pair]
    text = kernel(SLOT + first + sync + second, 0, shared=128)
    found = [e for e in launch(text)["errors"] if e["kind"] == "race"]
    assert bool(found) == (needs and not sync)
    assert all("by other lanes of it" in e["message"] and "no __syncwarp" in e["message"] for e in found)


def test_lanes_that_have_met_others_since() -> None:
    """Lanes 0-15 meet each other after the write and read what their half wrote. The other lanes do not meet."""
    halves = "setp.lt.u32 %p0, %thread, 16;\n@%p0 bar.warp.sync 0xffff;\n"
    mine = "xor.b32 %r40, %r52, 4;\nld.shared.u32 %r0, [%r40];\n"
    (race,) = [e for e in launch(kernel(SLOT + WRITE + halves + mine, 0, shared=128))["errors"] if e["kind"] == "race"]
    assert race["count"] == 16 and race["thread"] == (16, 0, 0)


def test_warp_barrier_needs_its_lanes() -> None:
    (error,) = errors("bar.warp.sync 0x7fffffff;")
    assert error["kind"] == "warp"
    body = "setp.eq.u32 %p0, %thread, 0;\n@%p0 bra zero;\nbar.warp.sync -1;\nbra done;\nzero:\nbar.warp.sync 1;\n"
    (error,) = errors(body + "bar.sync 0;\ndone:\n")
    assert error["kind"] == "deadlock"


def test_blocks_are_separate() -> None:
    """The shared memory of one block does not race with that of the next block, and it starts unwritten."""
    out = np.zeros(64, np.uint32)
    body = SLOT + WRITE + "bar.sync 0;\n" + read(1, 32) + store("%r0", 0, "b32")
    run(body, out, shared=128, grid=(3, 2, 1))
    found = errors(
        SLOT + "mov.u32 %r1, %ctaid.x;\nsetp.eq.u32 %p0, %r1, 0;\n@%p0 " + WRITE + "bar.sync 0;\n" + read(1, 32),
        shared=128,
        grid=(2, 1, 1),
    )
    assert {(e["kind"], tuple(e["block"])) for e in found} == {("uninitialised", (1, 0, 0))}


def test_fences_are_accepted() -> None:
    forms = [
        "membar.cta",
        "membar.gl",
        "membar.sys",
        "fence.sc.cta",
        "fence.acq_rel.gpu",
        "fence.cta",
        "fence.proxy.alias",
    ]
    run(";\n".join(forms) + ";\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bar.arrive 1;", "needs a number of threads"),
        ("bar.wait 1;", "expected .sync, .arrive or .red"),
        ("bar.red.xor.pred %p0, 0, %p1;", "expected .popc, .and or .or"),
        ("barrier.cluster.arrive;", "cluster"),
        ("fence.proxy.async;", "async"),
        ("mbarrier.try_wait.shared.b64 %p0, [%r0], %rd0;", "mbarrier"),
    ],
)
def test_unsupported(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch(kernel(text, 0))
