"""ld and st of every width, vector and space; cvta, isspacep, prefetch and cache policies."""

import numpy as np
import pytest
from programs import HEADER, errors, kernel, launch, load, run, store

from gpt2fast import _ptx

RANDOM = np.random.default_rng(0)
WIDTHS = {"h": 16, "r": 32, "rd": 64}


@pytest.mark.parametrize("register", WIDTHS)
@pytest.mark.parametrize("kind", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "b8", "b16", "b32", "b64"])
def test_register_may_be_wider_than_the_type(kind: str, register: str) -> None:
    """Loads extend signed types by their sign, and others by zeros. A store takes the lower bits."""
    bits, width = int(kind[1:]), WIDTHS[register]
    if bits > width:
        with pytest.raises(ValueError, match=rf"PTX line \d+: ld.global.{kind}"):
            run(f"ld.global.{kind} %{register}1, [%buffer0];\n", np.zeros(1, np.uint64))
        return
    dtype = f"{'i' if kind[0] == 's' else 'u'}{bits // 8}"
    x = RANDOM.integers(0, 256, 32 * bits // 8, dtype=np.uint8).view(dtype)
    out, again = np.zeros(32, f"{dtype[0]}{width // 8}"), np.zeros_like(x)
    body = f"mad.wide.u32 %wide, %thread, {bits // 8}, %buffer0;\nld.global.{kind} %{register}1, [%wide];\n"
    body += f"mad.wide.u32 %wide, %thread, {bits // 8}, %buffer2;\nst.global.{kind} [%wide], %{register}1;\n"
    run(body + store(f"%{register}1", 1, f"b{width}"), x, out, again)
    np.testing.assert_array_equal(out, x)
    np.testing.assert_array_equal(again, x)


@pytest.mark.parametrize(("kind", "n"), [("b8", 2), ("b8", 4), ("b16", 4), ("b32", 2), ("b32", 4), ("b64", 2)])
def test_vectors(kind: str, n: int) -> None:
    """The elements are written in reverse order, through registers. There is one request each way."""
    size = int(kind[1:]) // 8
    prefix = {1: "%h", 2: "%h", 4: "%r", 8: "%rd"}[size]
    x = RANDOM.integers(0, 256, 32 * n * size, dtype=np.uint8).view(f"u{size}").reshape(32, n)
    out = np.zeros_like(x)
    names = [f"{prefix}{i}" for i in range(n)]
    body = f"""
mul.wide.u32 %wide, %thread, {n * size};
add.s64 %rd10, %wide, %buffer0;
add.s64 %rd11, %wide, %buffer1;
ld.global.v{n}.{kind} {{{", ".join(names)}}}, [%rd10];
st.global.v{n}.{kind} [%rd11], {{{", ".join(names[::-1])}}};
"""
    counters = run(body, x, out)
    np.testing.assert_array_equal(out, x[:, ::-1])
    assert counters["global_load_requests"] == counters["global_store_requests"] == 1
    assert counters["global_load_bytes"] == counters["global_store_bytes"] == 32 * n * size


def test_vector_limits() -> None:
    for text, why in (
        ("ld.global.v4.b64 {%rd1, %rd2, %rd3, %rd4}, [%buffer0];", "at most 16 bytes"),
        ("ld.global.v4.b32 {%r1, %r2}, [%buffer0];", "expected 4 destinations, got 2"),
        ("st.global.v2.b32 [%buffer0], %r1;", "expected 2 sources, got 1"),
    ):
        with pytest.raises(ValueError, match=why):
            run(text, np.zeros(8))


def test_offsets_have_a_sign() -> None:
    x, out = np.arange(34, dtype=np.uint32), np.zeros(32, np.uint32)
    body = """
mad.wide.u32 %wide, %thread, 4, %buffer0;
ld.global.b32 %r1, [%wide+8];
add.s64 %wide, %wide, 64;
ld.global.b32 %r2, [%wide+-64];
ld.global.b32 %r3, [%wide-60];
add.u32 %r1, %r1, %r2;
add.u32 %r1, %r1, %r3;
"""
    run(body + store("%r1", 1, "b32"), x, out)
    np.testing.assert_array_equal(out, 3 * np.arange(32) + 3)


LOADS = ["ld.global.nc.b32", "ld.volatile.global.b32", "ld.relaxed.gpu.global.b32", "ld.acquire.sys.global.b32"]
LOADS += ["ld.global.ca.b32", "ld.global.cg.b32", "ld.global.L1::no_allocate.b32", "ld.global.nc.L1::evict_last.b32"]
LOADS += ["ld.weak.global.b32", "ld.b32", "ld.volatile.b32", "ldu.global.b32", "ld.global.L2::128B.b32"]
STORES = ["st.global.wb.b32", "st.global.cs.b32", "st.volatile.global.b32", "st.release.gpu.global.b32", "st.b32"]


@pytest.mark.parametrize("first", LOADS)
def test_kinds_of_loads(first: str) -> None:
    x, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    body = load("%r1", 0, "b32").replace("ld.global.b32", first) + store("%r1", 1, "b32")
    run(body, x, out)
    np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize("second", STORES)
def test_kinds_of_stores(second: str) -> None:
    x, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    run(load("%r1", 0, "b32") + store("%r1", 1, "b32").replace("st.global.b32", second), x, out)
    np.testing.assert_array_equal(out, x)


def test_cache_policies_change_nothing() -> None:
    x, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    body = "createpolicy.fractional.L2::evict_first.b64 %rd9, 1.0;\nprefetch.global.L2 [%buffer0];\n"
    body += (
        "mad.wide.u32 %wide, %thread, 4, %buffer0;\nld.global.L1::evict_last.L2::cache_hint.b32 %r1, [%wide], %rd9;\n"
    )
    run(body + store("%r1", 1, "b32"), x, out)
    np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize("space", ["shared", "local"])
@pytest.mark.parametrize("generic", [False, True])
def test_spaces_of_a_block_and_of_a_thread(space: str, generic: bool) -> None:
    """Each thread writes and reads its own word, by an address in the space and by a generic one."""
    x, out = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    declaration = ".shared .align 4 .b8 mine[256];\n" if space == "shared" else ".local .align 4 .b8 mine[16];\n"
    body = declaration + load("%r1", 0, "b32") + "mov.u64 %rd1, mine;\n"
    if space == "shared":
        body += "mad.wide.u32 %rd1, %thread, 4, %rd1;\n"
    if generic:
        body += f"cvta.{space}.u64 %rd2, %rd1;\nst.b32 [%rd2], %r1;\n"
        body += f"cvta.to.{space}.u64 %rd3, %rd2;\nld.{space}.b32 %r2, [%rd3];\n"
    else:
        body += f"st.{space}.b32 [%rd1], %r1;\nld.{space}.b32 %r2, [%rd1];\n"
    run(body + "add.u32 %r2, %r2, 1;\n" + store("%r2", 1, "b32"), x, out, block=(64, 1, 1))
    np.testing.assert_array_equal(out, x + 1)


def test_which_space_an_address_lies_in() -> None:
    out = np.zeros((32, 3), np.uint32)
    body = ".shared .align 4 .b8 mine[16];\n.local .align 4 .b8 own[16];\n"
    body += "mov.u64 %rd1, mine;\ncvta.shared.u64 %rd1, %rd1;\nmov.u64 %rd2, own;\ncvta.local.u64 %rd2, %rd2;\n"
    for i, space in enumerate(("global", "shared", "local")):
        body += "mov.u32 %r1, 0;\n"
        for bit, address in enumerate(("%buffer0", "%rd1", "%rd2")):
            body += f"isspacep.{space} %p1, {address};\n@%p1 or.b32 %r1, %r1, {1 << bit};\n"
        body += store("%r1", 0, "b32", i, 3)
    run(body, out)
    assert (out == [1, 2, 4]).all()


def module_text(declarations: str, body: str) -> str:
    text = kernel(body, 1)
    assert text.startswith(HEADER.format(target="sm_80"))
    return text.replace(".address_size 64\n", ".address_size 64\n" + declarations, 1)


def test_variables_of_a_module() -> None:
    """Variables start with their initial values. .global ones keep what a launch wrote for the next launch."""
    declarations = (
        ".const .align 4 .u32 table[3] = {5, 6, 7};\n.global .align 4 .u32 total = 100;\n.global .u16 rest[4];\n"
    )
    body = """
rem.u32 %r1, %thread, 3;
mov.u64 %rd1, table;
mad.wide.u32 %rd1, %r1, 4, %rd1;
ld.const.u32 %r2, [%rd1];
ld.const.u32 %r3, [table+8];
ld.global.u32 %r4, [total];
ld.global.u16 %r5, [rest+2];
add.u32 %r2, %r2, %r3;
add.u32 %r2, %r2, %r4;
add.u32 %r2, %r2, %r5;
bar.sync 0;
setp.eq.u32 %p1, %thread, 0;
@%p1 st.global.u32 [total], 1000;
"""
    module = _ptx.Module(module_text(declarations, body + store("%r2", 0, "b32")))
    for total in 100, 1000:
        out = np.zeros(32, np.uint32)
        params, buffers = out.ctypes.data.to_bytes(8, "little"), [(out.ctypes.data, out.nbytes, "out", False)]
        report = module.launch("k", (1, 1, 1), (32, 1, 1), 0, params, buffers, 10000, True, True)
        assert report["error_count"] == 0, report["errors"]
        np.testing.assert_array_equal(out, np.array([5, 6, 7])[np.arange(32) % 3] + 7 + total)


def test_constant_memory_is_not_written() -> None:
    with pytest.raises(ValueError, match="constant memory cannot be written"):
        launch(module_text(".const .u32 c = 1;\n", "st.const.u32 [c], 1;\n"), np.zeros(1))


def test_a_store_outside_leaves_memory_alone() -> None:
    x = np.zeros(32, np.uint32)
    found = errors(
        "mov.u32 %r1, 9;\n" + store("%r1", 0, "b32").replace("add.s64 %wide, %wide, 0", "add.s64 %wide, %wide, 8"), x
    )
    assert [e["kind"] for e in found] == ["bounds"]
    assert x.tolist() == [0, 0] + [9] * 30
