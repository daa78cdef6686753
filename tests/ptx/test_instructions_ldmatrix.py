"""ldmatrix: which lane gives the address of which row, which lane gets which element, and the counters."""

import numpy as np
import pytest
from programs import errors, kernel, launch, run, store

FILL = """
mov.u32 %r40, tile;
shl.b32 %r41, %thread, 4;
add.u32 %r41, %r41, %r40;
mad.wide.u32 %rd40, %thread, 16, %buffer0;
ld.global.v4.b32 {%r42, %r43, %r44, %r45}, [%rd40];
st.shared.v4.b32 [%r41], {%r42, %r43, %r44, %r45};
bar.sync 0;
"""  # row r of 8 b16 at 16 * r


def load_rows(count: int, row_of_lane: str, trans: str = "", address: str = "%r50", space: str = ".shared") -> str:
    registers = ", ".join(f"%r{i}" for i in range(count))
    return (
        FILL
        + row_of_lane
        + "mad.lo.u32 %r50, %r50, 16, %r40;\n"
        + f"ldmatrix.sync.aligned.m8n8.x{count}{trans}{space}.b16 {{{registers}}}, [{address}];\n"
        + "".join(store(f"%r{i}", 1, "b32", i, count) for i in range(count))
    )


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_elements(count: int, trans: str) -> None:
    """Lane l gives the address of row (5 * l) % 32; the matrices are rows 8m … 8m + 7 in lanes' order."""
    rows = np.arange(256, dtype=np.uint16).reshape(32, 8)
    out = np.zeros((32, count), np.uint32)
    counters = run(
        load_rows(count, "mul.lo.u32 %r50, %thread, 5;\nand.b32 %r50, %r50, 31;\n", trans), rows, out, shared=512
    )
    halves = out.view(np.uint16).reshape(32, count, 2)
    for lane in range(32):
        for m in range(count):
            for i in range(2):
                row, column = lane // 4, 2 * (lane % 4) + i
                if trans:
                    row, column = column, row
                assert halves[lane, m, i] == rows[(8 * m + row) * 5 % 32, column]
    # Rows of 16 bytes at 80 * r: 8 rows cover all 32 banks once.
    assert counters["shared_load_requests"] == 1
    assert counters["shared_load_wavefronts"] == count
    assert counters["shared_load_bank_conflicts"] == 0


def test_generic_address() -> None:
    rows = np.arange(256, dtype=np.uint16).reshape(32, 8)
    out = np.zeros((32, 1), np.uint32)
    body = load_rows(1, "mov.u32 %r50, %thread;\ncvt.u64.u32 %rd50, %r50;\n", address="%rd52", space="").replace(
        "ldmatrix", "cvt.u64.u32 %rd51, %r50;\ncvta.shared.u64 %rd52, %rd51;\nldmatrix"
    )
    run(body, rows, out, shared=512)
    np.testing.assert_array_equal(out.view(np.uint16).reshape(8, 8), rows[:8])


def test_bank_conflicts() -> None:
    """Rows 128 bytes apart lie in the same 4 banks: 8 passes for each matrix of 8 rows."""
    out = np.zeros((32, 4), np.uint32)
    body = """
    mov.u32 %r40, tile;
    mov.u32 %r1, 7;
    mad.lo.u32 %r41, %thread, 128, %r40;
    st.shared.v4.b32 [%r41], {%r1, %r1, %r1, %r1};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r0, %r1, %r2, %r3}, [%r41];
    """ + "".join(store(f"%r{i}", 0, "b32", i, 4) for i in range(4))
    counters = run(body, out, shared=4096)
    assert counters["shared_load_wavefronts"] == 32
    assert counters["shared_load_bank_conflicts"] == 28


def test_lanes_beyond_the_matrices_give_no_addresses() -> None:
    rows = np.arange(256, dtype=np.uint16).reshape(32, 8)
    out = np.zeros((32, 2), np.uint32)
    body = load_rows(2, "mov.u32 %r50, %thread;\n")
    body = body.replace("ldmatrix", "setp.gt.u32 %p1, %thread, 15;\nselp.b32 %r50, 12345, %r50, %p1;\nldmatrix")
    run(body, rows, out, shared=512)
    np.testing.assert_array_equal(out.view(np.uint16).reshape(32, 2, 2)[:, 0].reshape(8, 8), rows[:8])
    np.testing.assert_array_equal(out.view(np.uint16).reshape(32, 2, 2)[:, 1].reshape(8, 8), rows[8:16])


def test_errors() -> None:
    rows, out = np.zeros((32, 8), np.uint16), np.zeros((32, 1), np.uint32)
    found = errors(load_rows(1, "add.u32 %r50, %thread, 30;\n"), rows, out, shared=512)
    assert [e["kind"] for e in found] == ["bounds"]
    found = errors(load_rows(1, "mov.u32 %r50, %thread;\n").replace("[%r50]", "[%r50 + 8]"), rows, out, shared=512)
    assert [e["kind"] for e in found] == ["misaligned"]
    unwritten = load_rows(1, "mov.u32 %r50, %thread;\n").replace(
        "st.shared", "setp.ne.u32 %p9, %thread, 3;\n@%p9 st.shared"
    )
    found = errors(unwritten, rows, out, shared=512)
    assert [e["kind"] for e in found] == ["uninitialised"]
    found = errors(load_rows(1, "mov.u32 %r50, %thread;\n", address="%buffer0", space=""), rows, out, shared=512)
    assert [e["kind"] for e in found] == ["warp"]
    assert "outside" in found[0]["message"]


def test_wrong_number_of_registers() -> None:
    with pytest.raises(ValueError, match="expected 4 destinations, got 2"):
        launch(kernel("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r0, %r1}, [%r2];", 0))
