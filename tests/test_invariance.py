"""Equal bits: a row's result does not depend on the rows beside it, and decode gives attention's bits. Also huge
offsets."""

import mmap

import pytest
import torch
from conftest import ISAS, flops

from gpt2fast import ops
from gpt2fast.backends import is_native
from gpt2fast.op import OPS
from gpt2fast.testing import build, call, cpu_isa

ROWWISE = [o for o in OPS.values() if is_native(o)]


def rows_of(op, case, args, row):
    """The arguments that give only row ``row`` of the outputs."""
    alone = dict(args)
    for name in op.tensors:
        spec = op.shapes[name]
        spec = spec(args) if callable(spec) else spec
        tensor = args[name]
        if tensor is None or spec.split()[0] not in ("...", "B", "R", "B|1", "B:", "R:") or tensor.shape[0] == 1:
            continue
        alone[name] = tensor[row : row + 1]
    if op.name == "sample" and alone["rows"] is None:
        alone["rows"] = torch.tensor([row])
    return alone


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", ROWWISE, ids=lambda op: op.name)
def test_a_row_alone_gives_the_same_bits(op, isa):
    with cpu_isa(isa):
        for case in op.cases:
            many = case.get("B", case.get("R"))
            reduced = op.name == "cross_entropy" and case.get("reduction") != "none"
            if many < 2 or flops(op, case) > 2e8 or case.get("dropout_p") or reduced:
                continue
            for dtype in op.dtypes:
                args = build(op, case, dtype)
                together = call(op, args)
                for row in {0, many - 1}:
                    for name, a, b in zip(op.outputs, call(op, rows_of(op, case, args, row)), together):
                        assert a.numel() == 0 or torch.equal(a, b[row : row + 1]), (case, dtype, row, name)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_linear_rows_alone_and_together(isa, dtype):
    g = torch.Generator().manual_seed(0)
    with cpu_isa(isa):
        for transposed in (False, True):
            for K, N in ((768, 200), (770, 33), (3072, 64)):
                x, bias = torch.randn(70, K, generator=g).to(dtype), torch.randn(N, generator=g).to(dtype)
                weight = torch.randn((N, K) if transposed else (K, N), generator=g).to(dtype)
                whole = ops.linear(x, weight, bias, activation="gelu_tanh", transposed=transposed)
                for begin, end in ((0, 1), (3, 5), (7, 10), (11, 19), (40, 57), (69, 70)):
                    part = ops.linear(x[begin:end], weight, bias, activation="gelu_tanh", transposed=transposed)
                    assert torch.equal(part, whole[begin:end]), (transposed, K, N, begin, end)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_decode_gives_the_bits_of_attention(isa, dtype):
    g = torch.Generator().manual_seed(0)
    B, S, H, D, capacity = 2, 200, 3, 64, 256
    q, k, v = (torch.randn(B, S, H, D, generator=g).to(dtype) for _ in range(3))
    cache_k, cache_v = (torch.full((B, H, capacity, D), torch.nan, dtype=dtype).transpose(1, 2) for _ in range(2))
    cache_k[:, :S], cache_v[:, :S] = k, v
    with cpu_isa(isa):
        for window in (0, 50):
            whole = ops.attention(q, k, v, window=window)
            for T, length in ((1, 1), (1, 64), (1, 65), (1, 200), (4, 130), (7, 7)):
                lengths = torch.full((B,), length)
                new = q[:, length - T : length]
                out = ops.decode_attention(new, cache_k, cache_v, lengths, window=window)
                assert torch.equal(out, whole[:, length - T : length]), (T, length)
                chunk = ops.attention(new, k[:, :length], v[:, :length], window=window)
                assert torch.equal(chunk, out), (T, length)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_that_see_nothing_are_zeros(isa):
    q, k, v = (torch.randn(1, 3, 2, 8) for _ in range(3))
    with cpu_isa(isa):
        out, lse = ops.attention.overload(q, k, v, mask=torch.tensor([[False, False, True]]))
        assert out[:, :2].abs().max() == 0 and lse.isfinite().all()
        hidden = torch.full((1, 1, 1, 3), -torch.inf)
        out, lse = ops.attention.overload(q, k, v, bias=hidden)
        assert out.abs().max() == 0 and lse.isfinite().all()


@pytest.fixture(scope="module")
def sparse():
    """24 GiB of address space, in which only touched pages take memory."""
    size = 24 << 30
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    yield torch.frombuffer(memory, dtype=torch.float32)


FAR = (1 << 31) + 64  # elements


def far_apart(sparse, tensor):
    """A copy of ``tensor`` (2, ...) whose second row lies beyond 2^31 elements."""
    strides = [FAR, *torch.empty(tensor.shape[1:]).stride()]
    view = sparse.as_strided(tensor.shape, strides)
    view.copy_(tensor)
    return view


def far_cases():
    """Every kernel with every floating-point argument that has rows. T is 1 if the rows are (B, T)."""
    for declared in OPS.values():
        if not is_native(declared) or declared.name == "embedding":
            continue
        case = next(c for c in declared.cases if 0 not in c.values())
        case = case | ({"R": 2, "V": 771} if "R" in case else {"B": 2})
        if "attention" not in declared.name and "T" in case:
            case["T"] = 1
        names = ("q", "k", "v") if "attention" in declared.name else ("x", "residual", "logits")
        for name in names:
            if name in declared.tensors:
                yield pytest.param(declared, case | {name: True}, name, id=f"{declared.name}-{name}")


@pytest.mark.parametrize("declared, case, name", list(far_cases()))
def test_offsets_beyond_2_31_elements(sparse, declared, case, name, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    args = build(declared, case)
    far = args | {name: far_apart(sparse, args[name])}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = call(declared, far)
    assert "aten::clone" not in {event.key for event in profile.key_averages()}, "the kernel saw a copy"
    for a, b in zip(found, call(declared, args)):
        assert torch.equal(a, b)


def test_embedding_tables_beyond_2_31_elements(sparse, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    C = 64
    V = FAR // C + 2
    wte = sparse[: V * C].view(V, C)
    wte[V - 1] = torch.arange(C).float()
    out = ops.embedding(torch.tensor([[V - 1]]), wte, torch.zeros(1, C))
    assert torch.equal(out[0, 0], torch.arange(C).float())


def test_linear_weights_beyond_2_31_elements(sparse, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    weight = torch.randn(2, 40)
    far = far_apart(sparse, weight)
    for M in (1, 9):
        x = torch.randn(M, 2)
        assert torch.equal(ops.linear(x, far), ops.linear(x, weight))
        x = torch.randn(M, 40)
        assert torch.equal(ops.linear(x, far, transposed=True), ops.linear(x, weight, transposed=True))


def test_parallel_kernels_use_torchs_threads(two_threads):
    x = torch.randn(256, 768)
    weight = torch.randn(768, 768)
    for threads in (2, 1):
        torch.set_num_threads(threads)
        assert threads_running(lambda: ops.linear(x, weight)) == threads


def threads_running(function) -> int:
    """How many threads got CPU time while ``function`` ran for a while."""
    import os
    import time

    def ticks():
        return {t: int(open(f"/proc/self/task/{t}/schedstat").read().split()[0]) for t in os.listdir("/proc/self/task")}

    before, begin = ticks(), time.perf_counter()
    while time.perf_counter() - begin < 0.3:
        function()
    after = ticks()
    return sum(after[t] - before.get(t, 0) > 5e7 for t in after)
