"""Branches, loops, calls, returns, traps and printf, with lanes that take different paths."""

import ctypes

import numpy as np
import pytest
from programs import HEADER, errors, kernel, launch, load, run, store

from gpt2fast import _ptx

LANES = np.arange(64, dtype=np.uint32)
TWO_WARPS = (64, 1, 1)


def test_two_ways_that_meet_again() -> None:
    out = np.zeros(64, np.uint32)
    body = """
and.b32 %r1, %thread, 1;
setp.eq.u32 %p1, %r1, 0;
@%p1 bra EVEN;
mul.lo.u32 %r2, %thread, 10;
bra.uni MEET;
EVEN:
add.u32 %r2, %thread, 1000;
MEET:
add.u32 %r2, %r2, 1;
"""
    counters = run(body + store("%r2", 0, "b32"), out, block=TWO_WARPS)
    np.testing.assert_array_equal(out, np.where(LANES % 2, LANES * 10, LANES + 1000) + 1)
    assert counters["divergent_branches"] == 2


def test_a_branch_that_all_lanes_take_does_not_diverge() -> None:
    body = "setp.lt.u32 %p1, %thread, 32;\n@%p1 bra END;\nmov.u32 %r1, 1;\nEND:\n"
    assert run(body, np.zeros(1), block=TWO_WARPS)["divergent_branches"] == 0


def test_a_loop_whose_lanes_end_one_by_one() -> None:
    """The sum of 0 … lane. Instructions count for the lanes that execute them, a branch for the lanes that take it."""
    out = np.zeros(64, np.uint32)
    body = """
mov.u32 %r1, 0;
mov.u32 %r2, 0;
NEXT:
add.u32 %r1, %r1, %r2;
add.u32 %r2, %r2, 1;
setp.le.u32 %p1, %r2, %thread;
@%p1 bra NEXT;
"""
    counters = run(body + store("%r1", 0, "b32"), out, block=TWO_WARPS)
    np.testing.assert_array_equal(out, LANES * (LANES + 1) // 2)
    turns = int((LANES + 1).sum())
    straight = run(body.replace("@%p1 bra NEXT;", "") + store("%r1", 0, "b32"), out, block=TWO_WARPS)
    once, taken = 3 * 64, turns - 64
    assert counters["thread_instructions"] == straight["thread_instructions"] - once + 3 * turns + taken


def test_nested_loops_and_ways() -> None:
    """Counts the steps of Collatz's sequence from lane + 1, and compares with Python."""
    out = np.zeros(64, np.uint32)
    body = """
add.u32 %r1, %thread, 1;
mov.u32 %r2, 0;
HEAD:
setp.eq.u32 %p1, %r1, 1;
@%p1 bra DONE;
and.b32 %r3, %r1, 1;
setp.eq.u32 %p2, %r3, 0;
@%p2 bra HALVE;
mad.lo.u32 %r1, %r1, 3, 1;
bra STEP;
HALVE:
shr.u32 %r1, %r1, 1;
STEP:
add.u32 %r2, %r2, 1;
bra HEAD;
DONE:
"""
    run(body + store("%r2", 0, "b32"), out, block=TWO_WARPS)

    def steps(n: int) -> int:
        count = 0
        while n != 1:
            n, count = (n // 2 if n % 2 == 0 else 3 * n + 1), count + 1
        return count

    assert out.tolist() == [steps(i + 1) for i in range(64)]


@pytest.mark.parametrize("leave", ["ret", "exit"])
def test_lanes_that_leave_early(leave: str) -> None:
    """The other threads go on. At barriers, those that have exited count as arrived, and a note says so."""
    out = np.zeros(64, np.uint32)
    body = f"setp.gt.u32 %p1, %thread, 40;\n@%p1 {leave};\n{{}}mov.u32 %r1, 7;\n" + store("%r1", 0, "b32")
    run(body.format(""), out, block=TWO_WARPS)
    np.testing.assert_array_equal(out, np.where(LANES > 40, 0, 7))
    out[:] = 0
    report = launch(kernel(body.format("bar.sync 0;\n"), 1), out, block=TWO_WARPS)
    assert report["errors"] == [] and "23 threads have exited" in report["notes"][0]["message"]
    np.testing.assert_array_equal(out, np.where(LANES > 40, 0, 7))


def test_labels_belong_to_their_scope() -> None:
    out = np.zeros(32, np.uint32)
    body = "mov.u32 %r1, 0;\n"
    for _ in range(2):
        body += "{\n.reg .b32 %r1x;\nmov.u32 %r1x, 5;\nbra SKIP;\nmov.u32 %r1x, 9;\nSKIP:\nadd.u32 %r1, %r1, %r1x;\n}\n"
    run(body + store("%r1", 0, "b32"), out)
    assert set(out.tolist()) == {10}


FUNCTION = """
.func (.param .b32 result) {name} (.param .b32 a, .param .b64 b)
{{
.reg .b32 %x<4>;
.reg .b64 %y<2>;
.reg .pred %q;
ld.param.b32 %x0, [a];
ld.param.b64 %y0, [b];
cvt.u32.u64 %x1, %y0;
setp.gt.u32 %q, %x0, 20;
@%q bra LARGE;
add.u32 %x2, %x0, %x1;
st.param.b32 [result], %x2;
ret;
LARGE:
{large}
st.param.b32 [result], %x2;
ret;
}}
"""
CALL = """
{{
.param .b32 a;
.param .b64 b;
.param .b32 back;
st.param.b32 [a], {a};
st.param.b64 [b], {b};
call.uni (back), {name}, (a, b);
ld.param.b32 {result}, [back];
}}
"""


def with_functions(body: str, *functions: str) -> str:
    header = HEADER.format(target="sm_80")
    return kernel(body, 1).replace(header, header + "".join(functions), 1)


def test_call_of_a_function_that_lanes_leave_by_different_ways() -> None:
    out = np.zeros(32, np.uint32)
    function = FUNCTION.format(name="f", large="mul.lo.u32 %x2, %x0, 100;")
    body = "mov.u64 %rd1, 3;\n" + CALL.format(name="f", a="%thread", b="%rd1", result="%r1")
    report = launch(with_functions(body + store("%r1", 0, "b32"), function), out)
    assert report["errors"] == []
    lanes = LANES[:32]
    np.testing.assert_array_equal(out, np.where(lanes > 20, lanes * 100, lanes + 3))


def test_a_function_calls_another_and_a_call_may_be_guarded() -> None:
    out = np.zeros(32, np.uint32)
    inner = FUNCTION.format(name="inner", large="mov.u32 %x2, 77;")
    large = ".reg .b64 %w;\nmov.u64 %w, 1000;\nmov.u32 %x3, 4;\n"
    outer = FUNCTION.format(name="outer", large=large + CALL.format(name="inner", a="%x3", b="%w", result="%x2"))
    body = "mov.u64 %rd1, 3;\nmov.u32 %r1, 1;\nsetp.ne.u32 %p1, %thread, 30;\n@!%p1 bra AFTER;\n"
    body += CALL.format(name="outer", a="%thread", b="%rd1", result="%r1") + "AFTER:\n"
    report = launch(with_functions(body + store("%r1", 0, "b32"), inner, outer), out)
    assert report["errors"] == []
    lanes = LANES[:32]
    np.testing.assert_array_equal(out, np.where(lanes == 30, 1, np.where(lanes > 20, 1004, lanes + 3)))


def test_trap_stops_the_launch_and_names_its_thread() -> None:
    out = np.zeros(32, np.uint32)
    found = errors("setp.eq.u32 %p1, %thread, 13;\n@%p1 trap;\nmov.u32 %r1, 1;\n" + store("%r1", 0, "b32"), out)
    assert [(e["kind"], tuple(e["thread"])) for e in found] == [("trap", (13, 0, 0))]
    assert not out.any()


def test_a_kernel_that_never_ends_is_stopped() -> None:
    found = errors("AGAIN:\nadd.u32 %r1, %thread, 1;\nbra AGAIN;\n", np.zeros(1), budget=5000)
    assert [e["kind"] for e in found] == ["budget"]


def test_instructions_without_effect_here() -> None:
    body = "nanosleep.u32 100;\nmembar.gl;\nfence.acq_rel.gpu;\nfence.sc.cta;\nbrkpt;\npmevent 3;\nbar.warp.sync -1;\n"
    out = np.zeros(32, np.uint32)
    run(body + "mov.u32 %r1, 3;\n" + store("%r1", 0, "b32"), out)
    assert set(out.tolist()) == {3}


PRINT = """
.extern .func (.param .b32 result) vprintf (.param .b64 format, .param .b64 arguments);
.global .align 1 .b8 text[{size}] = {{{bytes}}};
"""


def test_printf() -> None:
    text = b"%d %5.2f %s|%llu %c%%\n\0"
    out = np.zeros(32, np.uint32)
    word = ctypes.create_string_buffer(b"word")
    body = f"""
.local .align 8 .b8 own[40];
setp.ne.u32 %p1, %thread, 2;
@%p1 bra END;
mov.u64 %rd1, own;
cvta.local.u64 %rd2, %rd1;
st.local.u32 [%rd1], -5;
st.local.f64 [%rd1+8], 0d400921FB54442D18;
st.local.u64 [%rd1+16], {ctypes.addressof(word)};
st.local.u64 [%rd1+24], 18446744073709551615;
st.local.u32 [%rd1+32], 88;
mov.u64 %rd3, text;
cvta.global.u64 %rd3, %rd3;
{{
.param .b64 format;
.param .b64 arguments;
.param .b32 back;
st.param.b64 [format], %rd3;
st.param.b64 [arguments], %rd2;
call.uni (back), vprintf, (format, arguments);
ld.param.b32 %r1, [back];
}}
"""
    declarations = PRINT.format(size=len(text), bytes=", ".join(map(str, text)))
    module = _ptx.Module(with_functions(body + store("%r1", 0, "b32") + "END:\n", declarations))
    buffers = [(out.ctypes.data, out.nbytes, "out", True), (ctypes.addressof(word), 5, "word", True)]
    params = out.ctypes.data.to_bytes(8, "little")
    report = module.launch("k", (1, 1, 1), (32, 1, 1), 0, params, buffers, 10000, True, True)
    assert report["errors"] == []
    assert report["printed"] == f"-5  3.14 word|{2**64 - 1} X%\n"
    assert out[2] == 5


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("frobnicate.u32 %r1, %r2;", "unknown or unsupported instruction"),
        ("add.frob.u32 %r1, %r2, %r3;", "add.frob.u32"),
        ("add.u32 %r1, %r2;", "too few operands"),
        ("add.u32 %r1, %r2, %r3, %r4;", "expected 3 operands, got 4"),
        ("add.u32 %rd1, %r2, %r3;", "32 bits"),
        ("add.u32 %r1, %r2, %q9;", "unknown register %q9"),
        ("bra NOWHERE;", "unknown label NOWHERE"),
        ("@%r1 mov.u32 %r2, 1;", "guard"),
        ("wgmma.fence.sync.aligned;", "unknown or unsupported instruction"),
        ("tex.2d.v4.f32.s32 {%f1, %f2, %f3, %f4}, [t, {%r1, %r2}];", "line"),
    ],
)
def test_what_the_machine_does_not_know_is_named_with_its_line(line: str, why: str) -> None:
    text = kernel(f"mov.u32 %r1, 1;\n{line}\n", 1)
    number = text[: text.index(line)].count("\n") + 1
    with pytest.raises(ValueError, match=f"PTX line {number}: ") as error:
        launch(text, np.zeros(1))
    assert why in str(error.value)
    assert line in str(error.value)


def test_an_unknown_instruction_refuses_only_its_own_kernel() -> None:
    out = np.zeros(32, np.uint32)
    good = kernel("mov.u32 %r1, 7;\n" + store("%r1", 0, "b32"), 1)
    bad = kernel("frobnicate.tile [%buffer0, {%r1, %r2}];\n", 1).split(".address_size 64")[1].replace(" k(", " bad(")
    module = _ptx.Module(good + bad)
    arguments = (1, 1, 1), (32, 1, 1), 0, out.ctypes.data.to_bytes(8, "little"), [(out.ctypes.data, 128, "o", True)], 99
    assert module.launch("k", *arguments)["errors"] == [] and set(out.tolist()) == {7}
    with pytest.raises(ValueError, match="frobnicate.tile: unknown or unsupported instruction"):
        module.launch("bad", *arguments)


def test_programs_helpers_place_values() -> None:
    x, out = np.arange(96, dtype=np.uint32), np.zeros(64, np.uint32)
    run(load("%r1", 0, "b32", 2, 3) + store("%r1", 1, "b32", 1, 2), x, out)
    np.testing.assert_array_equal(out.reshape(32, 2), np.stack([np.zeros(32), np.arange(32) * 3 + 2], 1))
