"""What surrounds the core: how launches are caught, arguments packed and memory found, and static resources. The core
only records."""

import gc
import shutil
import struct

import pytest
import torch
from recording import recorded  # noqa: F401

from gpt2fast.testing import ptx
from gpt2fast.testing.ptx.occupancy import Resources
from gpt2fast.testing.ptx.signatures import functions

PTX = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry scale(
  .param .u64 scale_param_0,
  .param .u64 scale_param_1,
  .param .u32 scale_param_2,
  .param .f32 scale_param_3
)
{
  ret;
}
"""


def launch(machine, *args):
    return machine.launch(PTX, "scale", (2,), (64, 2), *args)


def test_a_launch_of_ptx_text(recorded):
    x, y = torch.randn(8), torch.zeros(10)[2:]
    with ptx.machine() as m:
        found = launch(m, x, y, -3, 2.5)
    ((kernel, grid, block, shared, params, buffers),) = recorded.launches
    assert (kernel, grid, block, shared) == ("scale", (2, 1, 1), (64, 2, 1), 0)
    assert params == struct.pack("<QQif", x.data_ptr(), y.data_ptr(), -3, 2.5)
    whole = y.untyped_storage().data_ptr()
    known = [(x.data_ptr(), 32, "scale_param_0", True), (whole, 40, "scale_param_1", True)]
    assert sorted(buffers) == sorted(known)
    assert m.launches == [found] and found.counters == dict(thread_instructions=7)
    assert m.report().startswith("[0] scale grid (2, 1, 1) block (64, 2, 1)")


@pytest.mark.parametrize(
    "change, error, message",
    (
        (lambda a: a[:3], TypeError, "scale takes 4 arguments .*, got 3"),
        (lambda a: [1.5, *a[1:]], TypeError, "scale_param_0 is a .u64 and takes a whole number, got float"),
        (lambda a: [*a[:2], 1 << 33, a[3]], ValueError, "scale_param_2 is a .u32 and does not hold 8589934592"),
        (lambda a: [*a[:2], a[0], a[3]], TypeError, "scale_param_2 is a .u32 and takes no tensor"),
        (lambda a: [*a[:3], "1"], TypeError, "scale_param_3 is a .f32 and takes a number, got str"),
        (lambda a: [a[0].to("meta"), *a[1:]], ValueError, "scale_param_0 must be on cpu.*got meta"),
    ),
)
def test_arguments_that_do_not_fit(recorded, change, error, message):
    with ptx.machine() as m, pytest.raises(error, match=message):
        launch(m, *change([torch.randn(4), torch.randn(4), 4, 1.0]))
    assert not recorded.launches


def test_a_kernel_that_is_not_there(recorded):
    with ptx.machine() as m, pytest.raises(ValueError, match="kernel must be one of scale, got 'skale'"):
        m.launch(PTX, "skale", (1,), (1,))


def test_errors_are_raised_or_collected(recorded):
    wrong = dict(kind="bounds", message="4 bytes past x", line=9, source="a.py:3", thread=(1, 0, 0), block=(0, 0, 0))
    recorded.outcome["errors"] = [wrong]
    args = torch.randn(4), torch.randn(4), 4, 1.0
    with (
        ptx.machine() as m,
        pytest.raises(ptx.MachineError, match=r"scale: 1 error\n  bounds at a.py:3: .*past x") as e,
    ):
        launch(m, *args)
    assert e.value.launch is m.launches[0] and e.value.errors[0].source == "a.py:3"
    with ptx.machine(raise_errors=False) as m:
        assert launch(m, *args).errors[0].kind == "bounds"
    assert "bounds at a.py:3" in m.report()


def test_fresh_memory_until_something_writes_it(recorded):
    x = torch.randn(4)
    recorded.outcome["writes"] = dict(scale_param_1=slice(0, 12))
    with ptx.machine(raise_errors=False) as m:
        y, z = torch.empty(4), torch.empty_like(x)
        z.view(torch.uint8).fill_(255)  # the same bytes again: only the version counter shows it
        launch(m, x, y, 4, 1.0)
        launch(m, z, y, 4, 1.0)
        assert [e.kind for e in m.unwritten()] == ["unwritten"]
        assert "4 of 16 bytes of scale_param_1 were never written, the first at 12" in m.unwritten()[0].message
        y[3] = 0
        assert not m.unwritten()
    first, second = ({b[0]: b[3] for b in call[5]} for call in recorded.launches)
    assert first[x.data_ptr()] is True and list(first[y.data_ptr()]) == [1] * 12 + [0] * 4
    assert second[z.data_ptr()] is True and second[y.data_ptr()] is first[y.data_ptr()]


@pytest.mark.parametrize("make", ("empty", "new_empty", "empty_strided"))
def test_output_that_nothing_wrote_is_an_error_at_the_end(recorded, make):
    x = torch.randn(4)
    makers = dict(empty=lambda: torch.empty(4), new_empty=lambda: x.new_empty(4))
    with pytest.raises(ptx.MachineError, match="left unwritten\n  unwritten: 16 of 16 bytes"), ptx.machine() as m:
        y = makers.get(make, lambda: torch.empty_strided((4,), (1,)))()
        launch(m, x, y, 4, 1.0)
    with ptx.machine() as m:
        y = torch.empty(4)
        m.may_stay_unwritten(y)
        launch(m, x, y, 4, 1.0)
    with ptx.machine() as m, torch.inference_mode():
        y = torch.empty(4)
        y.fill_(1)
        launch(m, x, y, 4, 1.0)


def test_memory_that_was_freed(recorded):
    with ptx.machine() as m:
        y = torch.randn(1 << 16)
        address = y.data_ptr()
        launch(m, y, y, 4, 1.0)
        del y
        gc.collect()
        with pytest.raises(ValueError, match="pointer into scale_param_0, scale_param_1, which was freed before"):
            launch(m, address, 0, 4, 1.0)


def test_buffers_reached_by_a_table_of_pointers(recorded):
    parts, other = [torch.randn(3) for _ in range(2)], torch.randn(5)
    with ptx.machine() as m:
        table = torch.tensor([p.data_ptr() for p in parts])
        m.register(other=other)
        launch(m, table, 0, 2, 1.0)
    found = {b[0]: b[2] for b in recorded.launches[0][5]}
    assert {p.data_ptr() for p in parts} < set(found) and found[other.data_ptr()] == "other"


def test_everything_is_put_back(recorded):
    before = torch.empty, torch.Tensor.new_empty, torch.Tensor.data_ptr
    with ptx.machine():
        assert torch.empty is not before[0] and ptx.active() is not None
        with pytest.raises(RuntimeError, match="machines do not nest"), ptx.machine():
            pass
        assert ptx.active() is not None
    assert (torch.empty, torch.Tensor.new_empty, torch.Tensor.data_ptr) == before and ptx.active() is None


def test_triton_launches_arrive(recorded):
    pytest.importorskip("triton")
    import tutorials
    from triton.runtime import driver

    x, y = torch.randn(300), torch.randn(300)
    before = driver._active
    with ptx.machine(raise_errors=False) as m:
        out = tutorials.add(x, y)
    assert driver._active is before
    ((kernel, grid, block, shared, params, buffers),) = recorded.launches
    assert (kernel, grid, block, shared) == ("add_kernel", (3, 1, 1), (128, 1, 1), 0)
    assert params[:28] == struct.pack("<QQQi", x.data_ptr(), y.data_ptr(), out.data_ptr(), 300)
    assert {b[2] for b in buffers} == {"x_ptr", "y_ptr", "out_ptr"}
    assert [e.buffer for e in m.unwritten()] == ["out_ptr"]
    usage = m.launches[0].resources("sm_90")
    assert 0 < usage.registers < 64 and usage.spill_stores == usage.shared == 0


@pytest.mark.parametrize(
    "arch, registers, shared, threads, blocks",
    (
        ("sm_80", 32, 0, 256, 8),  # 64 warps of 1024 registers: 4 x 16
        ("sm_80", 128, 0, 256, 2),  # 16 warps of 4096 registers
        ("sm_80", 33, 0, 256, 6),  # 40 registers a thread are given: 4 x 12 warps
        ("sm_80", 16, 40 * 1024, 128, 4),  # 41 KiB of 164 each
        ("sm_80", 200, 0, 32, 8),  # 2 warps of 6400 on each of 4 schedulers
        ("sm_86", 16, 0, 1024, 1),  # 1536 threads
        ("sm_86", 16, 0, 32, 16),  # 16 blocks
        ("sm_89", 16, 0, 32, 24),
        ("sm_90", 16, 200 * 1024, 128, 1),
        ("sm_86", 16, 100 * 1024, 128, 0),  # a block may take 99 KiB
    ),
)
def test_blocks_that_fit_on_an_sm(arch, registers, shared, threads, blocks):
    limit = dict(sm_80=2048, sm_86=1536, sm_89=1536, sm_90=2048)[arch]
    usage = Resources("k", arch, registers, 0, 0, 0, shared)
    assert usage.blocks(threads) == blocks and usage.occupancy(threads) == blocks * threads / limit


def test_resources_of_compiled_code():
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    text = ptx.compile_cuda(
        'extern "C" __global__ void f(float* x) {\n  __shared__ float s[96];\n  s[threadIdx.x] = x[threadIdx.x];\n'
        "  __syncthreads();\n  x[threadIdx.x] = s[95 - threadIdx.x];\n}\n"
    )
    for arch in ptx.ARCHITECTURES:
        (usage,) = ptx.resources(text, arch).values()
        assert (usage.kernel, usage.arch, usage.shared, usage.spill_loads) == ("f", arch, 384, 0)
    with pytest.raises(ValueError, match="arch must be one of sm_80, .*, got 'sm_70'"):
        ptx.resources(text, "sm_70")


def test_functions_of_a_source():
    source = """
    extern "C" void one(const float* __restrict__ x, unsigned int n, cudaStream_t stream) {}
    // extern "C" void commented(int n) {}
    extern "C" {
    static int hidden(int a) { return a; }
    int two(void) { if (1) { return 2; } }
    cudaError_t three(const std::int64_t *a, long long b[3], double) { return cudaSuccess; }
    __global__ void kernel(float* x) {}
    }
    void cpp(int a) {}
    """
    found = {f.name: [f"{p.type} {p.name}" for p in f.parameters] for f in functions(source)}
    assert found == dict(
        one=["float* x", "unsigned int n", "cudaStream_t stream"],
        two=[],
        three=["int64_t* a", "long long* b", "double argument 2"],
    )
