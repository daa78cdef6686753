"""The embedding in CUDA C++: what it moves, its registers, and what it refuses. Results: test_gpu_embedding.py."""

import pytest
import torch

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast import backends, ops, tensors
from gpt2fast.cuda import embedding as kernels
from gpt2fast.cuda import library
from gpt2fast.op import OPS
from gpt2fast.testing import ptx
from gpt2fast.testing.inputs import build

pytestmark = pytest.mark.skipif(library.machine_reason() is not None, reason=str(library.machine_reason()))
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
WARP, WARPS, PACKS = 32, 4, 4  # lanes of a warp, warps of a block, packs of a lane in the forward pass


def run(name, args):
    with ptx.machine() as machine:
        kernels.KERNELS[name][0](**args)
    return machine.launches


@DTYPES
@pytest.mark.parametrize("C", (768, 1600))
@pytest.mark.parametrize("types", (False, True))
def test_bytes(C, types, dtype):
    """A row of each table is read, and a row is written, 128 bits at a time. Every lane asks for its row's indices."""
    B, T, size = 2, 33, dtype.itemsize
    (launch,) = run("embedding", build(OPS["embedding"], dict(B=B, T=T, C=C, V=99, P=64, token_types=types), dtype))
    across = -(-C // (WARP * PACKS * 16 // size))
    assert launch.grid[:2] == (-(-B * T // WARPS), across) and not launch.inefficient()
    rows = B * T * C * size
    moved = {name: (of["read_bytes"], of["written_bytes"]) for name, of in launch.per_buffer.items()}
    indices = dict.fromkeys(["tokens", "token_types"] if types else ["tokens"], (B * T * 8 * WARP * across, 0))
    assert moved == indices | dict(wte=((1 + types) * rows, 0), wpe=(rows, 0), out=(0, rows))
    requests = launch.counters["global_store_requests"]
    assert requests == B * T * -(-C * size // 512) and launch.counters["global_store_bytes"] == rows


@DTYPES
@pytest.mark.parametrize("C", (256, 1600))
def test_bytes_backward(C, dtype):
    """Rows of dy are read once for each table, and rows of gradients are written once. Only hot tokens have parts."""
    B, T, hot = 4, 300, 700
    tokens = torch.arange(B * T)
    tokens[:hot] = 3
    args = dict(dy=torch.randn(B, T, C).to(dtype), tokens=tokens.view(B, T), V=1500, P=T)
    launches = run("embedding_backward", args)
    assert not any(launch.inefficient() for launch in launches)
    size, segments = dtype.itemsize, -(-B * T // tensors.SEGMENT)
    across = -(-C * size // 512)
    assert [launch.grid[0] for launch in launches] == 2 * [B * T // WARPS, -(-(segments - 1) // WARPS)]
    assert {launch.grid[1] for launch in launches} == {across}
    of_tokens, joined, of_positions, nothing = (launch.per_buffer for launch in launches)
    assert of_tokens["dy"]["read_bytes"] == of_positions["dy"]["read_bytes"] == B * T * C * size
    # The hot token's sorted rows are the first 700, in segments of 256: three parts. It and the rest are written once.
    # Each row of wpe has four rows of dy, which lie in one segment: 256 is a multiple of 4.
    assert of_tokens["parts"]["written_bytes"] == joined["parts"]["read_bytes"] == 3 * C * 4
    assert of_tokens["out"]["written_bytes"] == (B * T - hot) * C * size
    assert joined["out"]["written_bytes"] == C * size and joined["dy"]["read_bytes"] == 0
    assert of_positions["out"]["written_bytes"] == T * C * size and of_positions["parts"]["written_bytes"] == 0
    assert nothing["out"]["written_bytes"] == nothing["parts"]["read_bytes"] == 0
    for launch in (launches[0], launches[2]):
        # Every warp reads one aligned group of 32 numbers of each list. At most one of a group's neighbours goes on
        # into it.
        assert launch.per_buffer["source"]["read_bytes"] <= across * (B * T + -(-B * T // WARP)) * WARP * 8


@DTYPES
@pytest.mark.parametrize("C", (64, 65))
def test_nothing_spills(C, dtype):
    tokens = torch.randint(0, 4, (2, 300), generator=torch.Generator().manual_seed(0))
    for types in (None, tokens):
        forward = dict(tokens=tokens, wte=torch.randn(4, C).to(dtype), wpe=torch.randn(300, C).to(dtype))
        backward = dict(dy=torch.randn(2, 300, C).to(dtype), tokens=tokens, V=4, P=300)
        for name, args in (("embedding", forward), ("embedding_backward", backward)):
            for launch in run(name, args | dict(token_types=types)):
                for arch in ARCHITECTURES:
                    found = launch.resources(arch)
                    assert found.stack == found.spill_stores == 0, f"{launch.name} {arch}: {found}"


def test_what_cannot_be_read_128_bits_at_a_time_is_read_one_by_one():
    """Rows, tables or columns that are not aligned give the same numbers, with more requests."""
    tokens, wte, wpe = torch.tensor([[1, 0, 2]]), torch.randn(3, 72), torch.randn(4, 72)

    def packs(args):
        with ptx.machine() as machine:
            y = kernels.embedding(tokens, **args)
        assert torch.equal(y, args["wte"][tokens] + args["wpe"][:3])
        return machine.launches[0].counters["global_store_requests"] == 3

    assert packs(dict(wte=wte[:, :64], wpe=wpe[:, :64]))
    assert not packs(dict(wte=wte[:, 1:65], wpe=wpe[:, :64]))
    assert not packs(dict(wte=wte[:, :63], wpe=wpe[:, :63]))
    assert not packs(dict(wte=wte[:, :64], wpe=torch.randn(4, 65)[:, :64]))


def test_one_segment_takes_no_parts_and_one_launch():
    launches = run("embedding_backward", dict(dy=torch.randn(1, 256, 8), tokens=torch.zeros(1, 256).long(), V=2, P=256))
    assert len(launches) == 2 and all("parts" not in launch.per_buffer for launch in launches)


def test_refused():
    tokens, wte = torch.tensor([[0, 1]]), torch.randn(2, 8)
    with ptx.machine(), backends.use_backend("cuda"):
        with pytest.raises(RuntimeError, match="embedding in CUDA covers float32, bfloat16 and float16, got float64"):
            ops.embedding(tokens, wte.double(), wte.double())
        one = tokens[:, :1]
        with pytest.raises(RuntimeError, match="gpt2fast_embedding: CUDA error 1$"):  # more columns than a grid holds
            kernels.embedding(one, *2 * [wte[:, :1].expand(2, 65535 * 128 + 1)])
