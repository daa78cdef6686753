"""embedding and its gradients by csrc/cuda/embedding.cu."""

from ..tensors import dense_rows, table_gradients
from .library import DTYPES, call, objection

SOURCE = "embedding.cu"


def embedding(tokens, wte, wpe, positions=None, token_types=None, start=0):
    (B, T), (V, C), P = tokens.shape, wte.shape, wpe.shape[0]
    y = wte.new_empty((B, T, C))
    (wte, stride_wte), (wpe, stride_wpe) = dense_rows(wte), dense_rows(wpe)
    stride_positions_b = 0 if positions is None or positions.shape[0] == 1 else T
    positions, token_types = (None if x is None else x.contiguous() for x in (positions, token_types))
    call(
        SOURCE, "gpt2fast_embedding", tokens.contiguous(), positions, token_types, wte, wpe, y, B, T, C, V, P, start,
        stride_positions_b, stride_wte, stride_wpe, DTYPES[wte.dtype],
    )  # fmt: skip
    return y


def _add_rows(row, source, dy, stride, out, parts):
    (count, C), N = out.shape, row.numel()
    R, dtype = dy.numel() // C, DTYPES[dy.dtype]
    call(SOURCE, "gpt2fast_embedding_backward", row, source, dy, out, parts, N, R, C, count, stride, dtype)


def embedding_backward(dy, tokens, V, P, positions=None, token_types=None, start=0):
    return table_gradients(_add_rows, dy, tokens, V, P, positions, token_types, start)


def supports(tokens, wte, wpe, positions=None, token_types=None, start=0):
    return objection("embedding", wte)


def supports_backward(dy, tokens, V, P, positions=None, token_types=None, start=0):
    return objection("embedding", dy)


KERNELS = {"embedding": (embedding, supports), "embedding_backward": (embedding_backward, supports_backward)}
