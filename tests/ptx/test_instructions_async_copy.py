"""cp.async: which bytes arrive, when they arrive, and what is reported if a thread does not wait."""

import numpy as np
import pytest
from programs import errors, kernel, launch, run, store

# Thread t copies 16 bytes at 16 * t from buffer 0 into the tile; %r40 is its place there, %rd40 the source.
PLACES = """
mov.u32 %r39, tile;
shl.b32 %r41, %thread, 4;
add.u32 %r40, %r39, %r41;
mad.wide.u32 %rd40, %thread, 16, %buffer0;
"""
COPY = "cp.async.cg.shared.global [%r40], [%rd40], 16;\n"
COMMIT = "cp.async.commit_group;\n"


def wait(groups: int) -> str:
    return f"cp.async.wait_group {groups};\n"


# Thread t reads what thread t ^ 32, in the other warp, copied.
READ_OTHER = """
xor.b32 %r42, %r41, 512;
add.u32 %r43, %r39, %r42;
ld.shared.v4.b32 {%r0, %r1, %r2, %r3}, [%r43];
"""
READ_OWN = "ld.shared.v4.b32 {%r0, %r1, %r2, %r3}, [%r40];\n"
STORE = "".join(store(f"%r{i}", 1, "b32", i, 4) for i in range(4))


def source(threads: int) -> np.ndarray:
    return np.random.default_rng(threads).integers(0, 2**32, (threads, 4), dtype=np.uint32)


def line_of(text: str, part: str) -> int:
    return next(i for i, line in enumerate(text.splitlines(), 1) if part in line)


def test_lands_at_the_wait() -> None:
    x, y = source(64), np.zeros((64, 4), np.uint32)
    counters = run(
        PLACES + COPY + COMMIT + wait(0) + "bar.sync 0;\n" + READ_OTHER + STORE, x, y, shared=1024, block=(64, 1, 1)
    )
    np.testing.assert_array_equal(y, np.roll(x, 32, axis=0))
    # Two warps of 512 bytes. Each warp's 16-byte words go to shared memory in 4 passes.
    assert counters["global_load_requests"] == 2
    assert counters["global_load_bytes"] == 1024
    assert counters["shared_store_requests"] == 2
    assert counters["shared_store_wavefronts"] == 8
    assert counters["shared_store_bank_conflicts"] == 0


@pytest.mark.parametrize("size", [4, 8, 16])
def test_sizes(size: int) -> None:
    x, y = source(32), np.zeros((32, 4), np.uint32)
    x[:] = x[0]
    fill = "mov.u32 %r9, 77;\nst.shared.v4.b32 [%r40], {%r9, %r9, %r9, %r9};\n"
    copy = f"cp.async.ca.shared.global [%r40], [%rd40], {size};\n"
    run(PLACES + fill + copy + "cp.async.wait_all;\n" + READ_OWN + STORE, x, y, shared=512)
    np.testing.assert_array_equal(y[:, : size // 4], x[:, : size // 4])
    assert (y[:, size // 4 :] == 77).all()


@pytest.mark.parametrize("count", [0, 4, 12, 16, "%r50"])
def test_source_size_fills_with_zeros(count: int | str) -> None:
    """Only so many bytes of the source are read: it may end after them. %r50: t % 16 bytes."""
    x, y = source(32), np.zeros((32, 4), np.uint32)
    taken = [lane % 16 if count == "%r50" else int(count) for lane in range(32)]
    expected = np.zeros((32, 16), np.uint8)
    for lane, n in enumerate(taken):
        expected[lane, :n] = x.view(np.uint8)[lane, :n]
    body = PLACES + "and.b32 %r50, %thread, 15;\n" if count == "%r50" else PLACES
    copy = f"cp.async.cg.shared.global.L2::128B [%r40], [%rd40], 16, {count};\n"
    run(body + copy + "cp.async.wait_all;\n" + READ_OWN + STORE, x, y, shared=512)
    np.testing.assert_array_equal(y.view(np.uint8), expected)


def test_short_source_may_end_the_buffer() -> None:
    x, y = source(32).reshape(-1)[:-2].copy(), np.zeros((32, 4), np.uint32)
    copy = """
    setp.eq.u32 %p0, %thread, 31;
    selp.u32 %r50, 8, 16, %p0;
    cp.async.cg.shared.global [%r40], [%rd40], 16, %r50;
    """
    run(PLACES + copy + "cp.async.wait_all;\n" + READ_OWN + STORE, x, y, shared=512)
    assert y.reshape(-1)[-2:].tolist() == [0, 0]
    np.testing.assert_array_equal(y.reshape(-1)[:-2], x)


@pytest.mark.parametrize("negated", ["", "!"])
def test_ignored_source(negated: str) -> None:
    x, y = source(32), np.ones((32, 4), np.uint32)
    copy = f"setp.lt.u32 %p0, %thread, 5;\ncp.async.cg.shared.global [%r40], [%rd40], 16, {negated}%p0;\n"
    run(PLACES + copy + "cp.async.wait_all;\n" + READ_OWN + STORE, x, y, shared=512)
    ignored = (np.arange(32) < 5) != bool(negated)
    np.testing.assert_array_equal(y, np.where(ignored[:, None], 0, x))


GROUPS = "".join(
    f"cp.async.ca.shared.global [%r40 + {4 * g}], [%rd40 + {4 * g}], 4;\n" + COMMIT for g in range(4)
)  # word g in group g


@pytest.mark.parametrize("pending", [0, 1, 2, 3, 4])
def test_wait_group_counts_the_latest(pending: int) -> None:
    """With n groups pending, words 0 … 3 - n have arrived. To read these is right; to read the next one is a race."""
    x, y = source(32), np.zeros(32, np.uint32)
    for word in range(4):
        body = PLACES + GROUPS + wait(pending) + f"ld.shared.b32 %r0, [%r40 + {4 * word}];\n" + store("%r0", 1, "b32")
        if word < 4 - pending:
            run(body, x, y, shared=512)
            np.testing.assert_array_equal(y, x[:, word])
            continue
        text = kernel(body, 2, shared=512)
        report = launch(text, x, y)
        assert {e["kind"] for e in report["errors"]} == {"race"}
        error = report["errors"][0]
        assert error["line"] == line_of(text, "ld.shared")
        assert f"line {line_of(text, f'[%r40 + {4 * word}], [')}" in error["message"]
        assert "has not been waited for" in error["message"]


def test_empty_groups_count() -> None:
    x, y = source(32), np.zeros((32, 4), np.uint32)
    run(PLACES + COPY + COMMIT + COMMIT + COMMIT + wait(2) + READ_OWN + STORE, x, y, shared=512)
    np.testing.assert_array_equal(y, x)


def test_uncommitted_copies_wait_for_wait_all() -> None:
    x, y = source(32), np.zeros((32, 4), np.uint32)
    assert {e["kind"] for e in errors(PLACES + COPY + wait(0) + READ_OWN + STORE, x, y, shared=512)} == {"race"}
    run(PLACES + COPY + "cp.async.wait_all;\n" + READ_OWN + STORE, x, y, shared=512)
    np.testing.assert_array_equal(y, x)


def test_wait_without_barrier() -> None:
    """A warp waits for its own copies only. Without a barrier, reading the other warp's is a race, with both lines."""
    x, y = source(64), np.zeros((64, 4), np.uint32)
    text = kernel(PLACES + COPY + COMMIT + wait(0) + READ_OTHER + STORE, 2, shared=1024)
    report = launch(text, x, y, block=(64, 1, 1))
    copy, read = line_of(text, "cp.async.cg"), line_of(text, "ld.shared")
    races = [e for e in report["errors"] if e["kind"] == "race"]
    # Warp 0 reads before warp 1 starts, and warp 1's write finds that race. Warp 1 reads what warp 0 has written.
    assert {e["line"] for e in races} == {copy, read}
    for error in races:
        assert f"line {copy + read - error['line']}" in error["message"]


def test_barrier_without_wait() -> None:
    x, y = source(64), np.zeros((64, 4), np.uint32)
    body = PLACES + COPY + COMMIT + "bar.sync 0;\n" + READ_OTHER + STORE
    found = errors(body, x, y, shared=1024, block=(64, 1, 1))
    assert {e["kind"] for e in found} == {"race"}
    assert "has not been waited for" in found[0]["message"]


def test_overwriting_what_others_still_read() -> None:
    """A pipeline's second barrier, which is often forgotten, is missing: a copy starts while the other warp reads."""
    x, y = source(64), np.zeros((64, 4), np.uint32)
    loop = COPY + COMMIT + wait(0) + "bar.sync 0;\n" + READ_OTHER
    again = COPY.replace("cg", "ca") + COMMIT + wait(0)
    run(PLACES + loop + "bar.sync 0;\n" + again + STORE, x, y, shared=1024, block=(64, 1, 1))
    text = kernel(PLACES + loop + again + STORE, 2, shared=1024)
    report = launch(text, x, y, block=(64, 1, 1))
    assert {e["kind"] for e in report["errors"]} == {"race"}
    lines = {e["line"] for e in report["errors"]}
    assert lines <= {line_of(text, "cp.async.ca"), line_of(text, "ld.shared")}


def test_two_copies_to_one_place() -> None:
    x, y = source(32), np.zeros((32, 4), np.uint32)
    found = errors(PLACES + COPY + COPY.replace("cg", "ca") + "cp.async.wait_all;\n", x, y, shared=512)
    assert {e["kind"] for e in found} == {"race"}
    assert "is written by cp.async while the cp.async" in found[0]["message"]


def test_each_lane_waits_for_its_own() -> None:
    """Only lanes below 16 commit. After the wait their copies have arrived, and those of the others have not."""
    x, y = source(32), np.zeros((32, 4), np.uint32)
    body = PLACES + COPY + "setp.lt.u32 %p0, %thread, 16;\n@%p0 cp.async.commit_group;\n" + wait(0)
    run(body + "@%p0 " + READ_OWN + STORE.replace("st.", "@%p0 st."), x, y, shared=512)
    np.testing.assert_array_equal(y[:16], x[:16])
    found = errors(body + "@!%p0 " + READ_OWN, x, y, shared=512)
    assert {e["kind"] for e in found} == {"race"}


def test_memory_checks() -> None:
    x, y = source(32), np.zeros((32, 4), np.uint32)

    def kinds(copy: str, shared: int = 512) -> set[str]:
        return {e["kind"] for e in errors(PLACES + copy + "cp.async.wait_all;\n", x, y, shared=shared)}

    assert kinds(COPY.replace("[%rd40]", "[%rd40 + 16]")) == {"bounds"}
    assert kinds(COPY.replace("[%rd40]", "[%rd40 - 16]")) == {"bounds"}
    assert kinds(COPY.replace("[%rd40]", "[%rd40 - 4]")) == {"misaligned"}
    assert kinds(COPY.replace("[%r40]", "[%r40 + 8]")) == {"misaligned"}
    assert kinds(COPY, shared=256) == {"bounds"}
    assert kinds(COPY.replace("16;", "16, 20;")) == {"bounds"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cp.async.cg.shared.global [%r0], [%rd0], 8;", "expected 16 as"),
        ("cp.async.ca.shared.global [%r0], [%rd0], 12;", "expected 4, 8 or 16"),
        ("cp.async.mbarrier.arrive.shared.b64 [%r0];", "expected .ca or .cg"),
        ("cp.async.bulk.shared::cluster.global [%r0], [%rd0], 16, [%r1];", "expected .ca or .cg"),
        ("mbarrier.init.shared.b64 [%r0], 4;", "mbarrier"),
    ],
)
def test_unsupported(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch(kernel(text, 0))
