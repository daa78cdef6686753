"""attention_backward by csrc/cuda/attention_backward.cu."""

import torch

from ..tensors import dense_heads, empty_as
from .attention import arguments, objection
from .library import call

SOURCE = "attention_backward.cu"


def attention_backward(
    dout, q, k, v, out, lse, mask=None, bias=None, seed=None, causal=True, window=0, scale=None, dropout_p=0.0
):
    dq, dk, dv = empty_as(q), empty_as(k), empty_as(v)
    dbias = q.new_empty(0) if bias is None else empty_as(bias)
    if 0 in (*q.shape[:3], k.shape[1]):  # nothing attends to anything
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias.zero_()
    dout, out, q, k, v = dense_heads(dout, out, q, k, v)
    if bias is not None and any(step == 0 and n > 1 for n, step in zip(bias.shape, bias.stride())):
        bias = bias.contiguous()  # the kernel takes a stride of 0 to mean that dbias has size 1 there
    lse = lse.contiguous()
    delta, excess = torch.empty_like(lse), torch.empty_like(lse)
    call(
        SOURCE, "gpt2fast_attention_backward", dout, dq, dk, dv, None if bias is None else dbias, delta, excess,
        *dout.stride()[:3], *out.stride()[:3],
        *arguments(q, k, v, mask, bias, out, lse, seed, causal, window, scale, dropout_p),
    )  # fmt: skip
    return dq, dk, dv, dbias


def supports(
    dout, q, k, v, out, lse, mask=None, bias=None, seed=None, causal=True, window=0, scale=None, dropout_p=0.0
):
    return objection(q)


KERNELS = {"attention_backward": (attention_backward, supports)}
