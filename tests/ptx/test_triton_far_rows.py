"""Triton kernels on rows that lie more than 2^31 elements apart, in memory of which only touched pages exist."""

import mmap

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.op import OPS
from gpt2fast.testing import call, on
from gpt2fast.testing.inputs import build

FAR = 2**31 + 64  # elements
ROWS = dict(R=2, B=2, T=1, K=24, N=40, C=40, V=70, S=9, H=2, D=8)
ARGUMENTS = dict(
    layer_norm="x", add_layer_norm="x residual", layer_norm_backward="dy x", gelu="x", gelu_backward="dy x",
    bias_gelu="x", linear="x residual", linear_backward="dy x", attention="q k v", attention_backward="q k v dout",
    decode_attention="q k v", cross_entropy="logits", cross_entropy_backward="logits", sample="logits",
)  # fmt: skip


@pytest.fixture(scope="module")
def sparse():
    memory = mmap.mmap(-1, 5 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    yield torch.frombuffer(memory, dtype=torch.bfloat16)


@pytest.mark.parametrize("op, name", [(op, name) for op, names in ARGUMENTS.items() for name in names.split()])
def test_offsets_beyond_2_31_elements(sparse, op, name, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    op = OPS[op]
    sizes = ROWS | (dict(T=3) if "attention" in op.name and op.name != "decode_attention" else {})
    args = build(op, sizes | dict.fromkeys(op.optional, False) | {name: True}, torch.bfloat16)
    near = args[name]
    far = sparse.as_strided(near.shape, [FAR, *torch.empty(near.shape[1:]).stride()])
    far.copy_(near)
    contiguous = torch.Tensor.contiguous

    def in_place(tensor):
        assert tensor.data_ptr() != far.data_ptr() or tensor.is_contiguous(), "the kernel gets a copy"
        return contiguous(tensor)

    monkeypatch.setattr(torch.Tensor, "contiguous", in_place)
    with on("triton:ptx"):
        for a, b in zip(call(op, args | {name: far}), call(op, args)):
            assert torch.equal(a, b)
