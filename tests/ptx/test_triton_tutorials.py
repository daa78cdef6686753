"""Triton's tutorials on the PTX machine keep the parity rule against PyTorch in float64, and have no errors."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

import tutorials

from gpt2fast.testing import assert_close_to_truth, ptx


def close(actual, function, *args, what="output"):
    """``function`` is plain PyTorch. Its own error against float64 sets the bound."""
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    assert_close_to_truth(actual, function(*args), function(*wide), what)


@pytest.mark.parametrize("n", (1, 1000, 4096))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16, torch.int32))
def test_vector_add(n, dtype):
    x, y = (torch.randn(n) * 100).to(dtype), (torch.randn(n) * 100).to(dtype)
    with ptx.machine():
        out = tutorials.add(x, y)
    assert torch.equal(out, x + y)


@pytest.mark.parametrize("rows, columns", ((1, 1), (5, 781), (7, 1024)))
def test_softmax(rows, columns):
    x = torch.randn(rows, columns + 3)[:, :columns]
    with ptx.machine():
        out = tutorials.softmax(x)
    close(out, lambda x: x.softmax(-1), x)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize("M, N, K", ((64, 32, 32), (70, 50, 100), (128, 64, 128)))
def test_matmul(M, N, K, dtype):
    a, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
    with ptx.machine():
        out = tutorials.matmul(a, b, leaky=True)
    close(out, lambda a, b: F.leaky_relu(a @ b, 0.01), a, b)


def test_matmul_of_a_transposed_operand_and_one_stage():
    a, b = torch.randn(64, 70).half().t(), torch.randn(40, 64).half().t()
    with ptx.machine():
        out = tutorials.matmul(a, b, stages=1)
    close(out, torch.matmul, a, b)


def test_matmul_in_tf32_splits():
    a, b = torch.randn(64, 64), torch.randn(64, 32)
    with ptx.machine() as m:
        out = tutorials.matmul(a, b, precision="tf32x3")
    close(out, torch.matmul, a, b)
    assert m.launches[0].counters["tensor_flops"] == 3 * 2 * 64 * 64 * 32


def philox_uniform(seed, counters):
    """The first word of Philox 4x32-10, as a float the way ``tl.rand`` makes it: |signed word| * 2^-31, never 1."""
    c = [counters.astype(np.uint64), *(np.zeros_like(counters, np.uint64) for _ in range(3))]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    mask = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (b >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            b & mask,
            (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            a & mask,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    word = c[0].astype(np.uint32).view(np.int32)
    word = np.where(word < 0, -word - 1, word)
    return word.astype(np.float32) * np.float32(4.6566127342e-10)


@pytest.mark.parametrize("seed", (123, 2**40 + 7))
def test_dropout(seed):
    n, p = 1000, 0.3
    x = torch.randn(n)
    with ptx.machine():
        out, again = tutorials.dropout(x, p, seed), tutorials.dropout(x, p, seed)
    kept = torch.from_numpy(philox_uniform(seed, np.arange(n)) > np.float32(p))
    assert torch.equal(out, again) and 0.6 < kept.float().mean() < 0.8
    assert torch.equal(out != 0, kept)
    close(out, lambda x: torch.where(kept, x / (1 - p), 0.0), x)


@pytest.mark.parametrize("M, N", ((1, 64), (7, 200), (5, 333)))
def test_layer_norm(M, N):
    x, w, b, dy = torch.randn(M, N), torch.rand(N), torch.randn(N), torch.randn(M, N)
    with ptx.machine():
        y, mean, rstd = tutorials.layer_norm(x, w, b)
        found = tutorials.layer_norm_backward(dy, x, w, mean, rstd)
    close(y, lambda x, w, b: F.layer_norm(x, (N,), w, b), x, w, b)

    def gradients(dy, x, w, b):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        return torch.autograd.grad(F.layer_norm(leaves[0], (N,), *leaves[1:]), leaves, dy)

    for i, name in enumerate(("dx", "dw", "db")):
        close(found[i], lambda *a, i=i: gradients(*a)[i], dy, x, w, b, what=name)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("T", (64, 100))
def test_attention(T, dtype, causal):
    q, k, v, dout = (torch.randn(1, 2, T, 64).to(dtype) for _ in range(4))
    with ptx.machine():
        out, lse = tutorials.attention(q, k, v, causal)
        found = tutorials.attention_backward(dout, q, k, v, out, lse, causal)

    def forward(q, k, v):
        s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        s = s.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf) if causal else s
        return s.softmax(-1) @ v

    def gradients(dout, q, k, v):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(forward(*leaves), leaves, dout)

    close(out, forward, q, k, v)
    for i, name in enumerate(("dq", "dk", "dv")):
        close(found[i], lambda *a, i=i: gradients(*a)[i], dout, q, k, v, what=name)
