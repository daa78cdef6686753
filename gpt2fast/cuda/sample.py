"""sample by csrc/cuda/sample.cu. The host does not wait for the result."""

import torch

from ..tensors import dense_rows, float64_bits
from .library import DTYPES, call, objection

SOURCE = "sample.cu"
MOST_COLUMNS = 2**31 - 1 - 16384  # kMostColumns in csrc/cuda/cross_entropy.cuh
ALIGNED = 16  # a row of workspace has a multiple of this number of elements


def sample(
    logits, seed, positions, tokens=None, rows=None, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
    repetition_penalty=1.0,
):  # fmt: skip
    B, V = logits.shape
    out = positions.new_empty(B)
    logits, stride = dense_rows(logits)
    if repetition_penalty == 1:
        tokens = None
    T, stride_tokens = 0, 0
    if tokens is not None:
        T = tokens.shape[1]
        tokens, stride_tokens = dense_rows(tokens)
    cuts = temperature != 0 and (0 < top_k < V or top_p < 1)
    room = (V + 2 * ALIGNED - 2) // ALIGNED * ALIGNED
    floats = logits.new_empty(((tokens is not None) + 2 * cuts, B, room), dtype=torch.float32)
    changed = None if tokens is None else floats[0]
    scores, shorter = floats[-2:] if cuts else (None, None)
    ids = floats.new_empty((B, room), dtype=torch.int32) if cuts else None
    call(
        SOURCE, "gpt2fast_sample", logits, tokens, seed, positions.contiguous(),
        None if rows is None else rows.contiguous(), out, changed, scores, shorter, ids, B, T, V, stride,
        stride_tokens, room, float(temperature), float(top_p), float(min_p), float(repetition_penalty), top_k,
        float64_bits(1 - top_p), DTYPES[logits.dtype],
    )  # fmt: skip
    return out


def supports(
    logits, seed, positions, tokens=None, rows=None, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
    repetition_penalty=1.0,
):  # fmt: skip
    if found := objection("sample", logits):
        return found
    return None if logits.shape[1] <= MOST_COLUMNS else f"sample in CUDA covers up to {MOST_COLUMNS} columns"


KERNELS = {"sample": (sample, supports)}
