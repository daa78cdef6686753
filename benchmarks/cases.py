"""What is timed: for each op, cases at GPT-2's own sizes and a few other shapes, and PyTorch's ways to compare with."""

import contextlib
import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2fast import memory
from gpt2fast.backends import BUILT_IN, choose
from gpt2fast.op import OPS, Op
from gpt2fast.testing import build, call, find_ops
from gpt2fast.testing.inputs import every, tensors_of

GPT2 = dict(C={768, 3072}, K={768, 3072}, N={768, 2304, 3072, 50257}, V={50257}, H={12}, D={64}, P={1024})
BATCH = dict(B=8, T=1023)  # a batch that fills all of the 1024 positions but one
VECTORS = [(768,)] * 6 + [(2304,), (3072,)]
MATRICES = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]
PARAMETERS = [(50257, 768), (1024, 768), *12 * (VECTORS + MATRICES), (768,), (768,)]  # all of the 124M model
MORE = {
    "embedding": [
        dict(B=1, T=1, C=768, V=50257, P=1024, start=37),
        dict(**BATCH, C=768, V=50257, P=1024),
    ],
    "layer_norm": [dict(**BATCH, C=768)],
    "add_layer_norm": [dict(**BATCH, C=768)],
    "gelu": [dict(**BATCH, C=3072, approximate="tanh")],
    "bias_gelu": [dict(**BATCH, C=3072, approximate="tanh")],
    "linear": [
        dict(B=1, T=512, K=768, N=2304, bias=True),
        dict(B=1, T=1, K=768, N=3072, bias=True, activation="gelu_tanh"),
        dict(B=1, T=1, K=3072, N=768, bias=True, residual=True),
        dict(B=8, T=1, K=768, N=50257, transposed=True),
        dict(**BATCH, K=768, N=3072, bias=True, activation="gelu_tanh"),
    ],
    "attention": [dict(B=4, T=1024, S=1024, H=12, D=64)],
    "decode_attention": [dict(B=1, T=1, S=1024, H=12, D=64), dict(B=8, T=1, S=1023, H=12, D=64)],
    "cross_entropy": [dict(R=1024, V=50257)],
    "adamw_": [dict(each=PARAMETERS, step=10)],
    "gradient_norm": [dict(each=PARAMETERS)],
}
# If a call moves at least so many bytes, its inputs would not be in the cache when a model calls it. So its benchmark
# takes several sets of inputs in turn, of at most MOST_ROTATED bytes together.
LEAST_ROTATED = 2 << 20
MOST_ROTATED = 512 << 20


def bench_ops(names: list[str]) -> list[Op]:
    """The ops with these names. By default, all ops that have a kernel of ours and a way in PyTorch to compare with."""
    found = find_ops(names)
    runs_on = {op.key: choose(op, **op.example()).backend for op in found}
    if not names:
        return [op for op in found if runs_on[op.key] not in BUILT_IN and rivals(op)]
    for op in found:
        if runs_on[op.key] == "fused":
            have = ", ".join(name for name, where in runs_on.items() if where not in BUILT_IN) or "none of those named"
            raise ValueError(
                f"gpt2fast bench: {op.name} has no kernel of ours, PyTorch's fused way runs; kernels: {have}"
            )
        if not rivals(op):
            have = ", ".join(name for name, other in OPS.items() if rivals(other))
            raise ValueError(
                f"gpt2fast bench: {op.name} declares no fused=, baseline= or naive= to compare with; "
                f"those that do: {have}"
            )
    return found


def bench_cases(op: Op) -> list[dict]:
    """Cases of ``op`` at GPT-2's sizes, decode first; for an op whose letters are not GPT-2's, all non-empty cases."""
    own = [c for c in op.cases if all(c[k] in sizes for k, sizes in GPT2.items() if k in c)]
    found = [c for c in own if 0 not in c.values() and not c.get("dropout_p")]
    found = found or [c for c in op.cases if 0 not in (c.get("B"), c.get("R"))]
    return sorted(found + MORE.get(op.name, []), key=lambda c: c.get("B", 1) * c.get("T", 1) * c.get("R", 1))


def describe(case: dict) -> str:
    words = [f"{k}{v}" for k, v in case.items() if k.isupper()]
    if "each" in case:
        words.append(f"{len(case['each'])} tensors of {sum(math.prod(shape) for shape in case['each'])}")
    flags = [
        k if v is True else f"{k}={v}" for k, v in case.items() if not k.isupper() and k != "each" and v is not False
    ]
    return " ".join(["·".join(words), *flags])


def _sdpa_decode(q, k, v, lengths, starts=None, window=0, scale=None):
    """Attention without a mask. If all rows see the whole cache, this is correct, and it is PyTorch's fastest way."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _torch_sample(
    logits, seed, positions, tokens=None, rows=None,
    temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
):  # fmt: skip
    """The steps of transformers' logits processors and warpers, and then torch.multinomial."""
    if tokens is not None and repetition_penalty != 1:
        tokens = tokens.clamp(min=0)
        score = logits.gather(1, tokens)
        score = torch.where(score < 0, score * repetition_penalty, score / repetition_penalty)
        logits = logits.scatter(1, tokens, score)
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ascending, order = logits.sort()
        below = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        below[:, -1] = False
        logits = logits.masked_fill(below.scatter(1, order, below), -torch.inf)
    if min_p:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), -torch.inf)
    return torch.multinomial(logits.softmax(-1).float(), 1)[:, 0]


def _fused(op: Op) -> Callable | None:
    """PyTorch's fused way. For calls that it cannot compute, the reference runs instead."""
    if op.fused is None or op.fused_unless is None:
        return op.fused
    return lambda *args: (op.reference if op.fused_unless(*args) else op.fused)(*args)


def rivals(op: Op, case: dict | None = None) -> dict[str, Callable]:
    """PyTorch's ways to compute ``op``, by name. They take the op's arguments by position."""
    found = dict(fused=op.baseline or _fused(op), naive=op.naive)
    if op.name == "sample":
        found["naive"] = _torch_sample
    if op.name == "decode_attention" and case and case["B"] == case["T"] == 1 and not case.get("starts"):
        found["fused"] = _sdpa_decode
    return {name: function for name, function in found.items() if function is not None}


def last_level_cache() -> int:
    """The size of this machine's largest cache in bytes. If the system does not tell, it is taken as 32 MiB."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]] if text[-1] in "KM" else int(text))
    return max(sizes, default=32 << 20)


def nbytes(op: Op, args: dict) -> tuple[int, int]:
    """The bytes that a call must read and must write. Every tensor counts once, and of tables only the rows in use."""
    written = sum(t.nbytes for t in call(op, args))
    read = sum(t.nbytes for t in tensors_of(args))
    if op.name == "embedding":
        wte, wpe, tokens = args["wte"], args["wpe"], args["tokens"]
        read += tokens.numel() * wte[0].nbytes + tokens.shape[1] * wpe[0].nbytes - wte.nbytes - wpe.nbytes
    return read, written


def _placed(tensor: Tensor) -> Tensor:
    """A copy of the tensor. A large copy is on huge pages: in a model, the inputs of an op are outputs of other ops,
    and our ops put large outputs there."""
    if tensor.nbytes < memory.HUGE_PAGE or not tensor.is_contiguous():
        return tensor.clone()
    return memory.empty({"": tuple(tensor.shape)}, tensor.dtype)[""].copy_(tensor)


def inputs(op: Op, case: dict, dtype: torch.dtype) -> tuple[list[tuple], bool]:
    """The argument tuples to take in turn, and whether they are together larger than the caches."""
    args = build(op, case, dtype)
    moved = sum(nbytes(op, args))
    copies = 1
    if moved >= LEAST_ROTATED:
        copies = min(math.ceil(2 * last_level_cache() / moved) + 1, max(MOST_ROTATED // moved, 1))
    sets = [tuple(every(_placed, value) for value in args.values()) for _ in range(copies)]
    return sets, moved >= LEAST_ROTATED and copies * moved > last_level_cache()


def peers(op, case: dict, args: dict) -> dict[str, Callable]:
    """Kernels of other libraries for the same op, by name, as far as the libraries can be imported."""
    found: dict[str, Callable] = {}
    plain = case.get("causal", True) and not any(case.get(k) for k in ("mask", "bias", "window", "dropout_p"))
    if op.name == "attention_backward" and plain and case["T"] == case["S"]:
        q, k, v = (args[n].transpose(1, 2).detach().requires_grad_() for n in "qkv")
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        dout = args["dout"].transpose(1, 2)
        found["sdpa"] = lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    if op.name not in ("layer_norm", "layer_norm_backward"):
        return found
    with contextlib.suppress(ImportError):
        from liger_kernel.ops.layer_norm import layer_norm_backward, layer_norm_forward

        if op.name == "layer_norm":
            found["liger"] = functools.partial(layer_norm_forward, *args.values())
        else:
            dy, x, weight, mean, rstd = (t.reshape(-1, t.shape[-1]) if t.dim() > 2 else t for t in args.values())
            found["liger"] = functools.partial(
                layer_norm_backward, dy, x, weight, weight, mean.reshape(-1), rstd.reshape(-1)
            )
    if op.name == "layer_norm":
        with contextlib.suppress(ImportError):
            from quack.layernorm import _layernorm_fwd

            x = args["x"].reshape(-1, args["x"].shape[-1])
            found["quack (no bias)"] = functools.partial(_layernorm_fwd, x, args["weight"].float(), args["eps"])
    return found
