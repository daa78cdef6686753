"""How well a model predicts a text, and how near one model's predictions are to another's. What ``gpt2fast eval`` runs.

Perplexity by a sliding window, as in Hugging Face's "Perplexity of fixed-length models": the windows begin ``stride``
tokens apart, and each scores the tokens that no earlier one has scored. So every token but the first is scored once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dtypes import dtype_name
from .model import GPT2
from .progress import progress
from .text import Tokenizer
from .values import within
from .weights import FORMATS, load_config

REFERENCE = "float32"
ROWS = 64  # the tokens whose probabilities are computed at a time


@dataclass
class Score:
    """The result of ``evaluate``. The last two compare with the reference model and are None without one."""

    tokens: int  # that were scored
    perplexity: float  # exp of the mean of -log p(token), natural logarithm
    kl: float | None = None  # mean over the tokens of KL(reference || model), in nats
    agreement: float | None = None  # the part of the tokens where both find the same token likeliest


def windows(count: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yields (begin, end, first): tokens [begin, end) are a window, which scores the tokens [first, end)."""
    first = 1
    for begin in range(0, count, stride):
        end = min(begin + window, count)
        if first < end:
            yield begin, end, first
        first = end
        if end == count:
            return


def evaluate(
    model: Any,
    tokens: Tensor,
    reference: Any = None,
    window: int | None = None,
    stride: int | None = None,
    shown: Callable[[int], None] | None = None,
) -> Score:
    """Scores a text.

    Args:
        model, reference: two ``GPT2`` in evaluation mode on one device, with the same vocabulary; reference may be
            None.
        tokens: (T,) int64, T at least 2.
        window: the number of tokens that the model sees at a time, by default n_positions.
        stride: how far windows are apart, by default half a window. Each scored token but those of the first window
            has at least window - stride tokens before it.
        shown: called with the number of tokens that are scored, after each window.

    The logits of one window of each model are in memory at a time. Probabilities and sums are computed in float64.
    Errors: ValueError or TypeError before anything is computed.
    """
    window, stride = check_windows(model.config.n_positions, window, stride)
    for name, other in dict(model=model, reference=reference).items():
        if other is not None and other.training:
            raise ValueError(f"gpt2fast.evaluate: {name} must be in evaluation mode, got one in training mode")
    if tokens.dim() != 1 or tokens.dtype != torch.int64:
        found = f"{tuple(tokens.shape)} of {dtype_name(tokens.dtype)}"
        raise TypeError(f"gpt2fast.evaluate: tokens must be (T,) of int64, got {found}")
    if len(tokens) < 2:
        raise ValueError(f"gpt2fast.evaluate: tokens must be at least 2, got {len(tokens)}")
    within("evaluate", "tokens", tokens, model.config.vocab_size)
    if reference is not None and reference.config.n_positions < window:
        most = reference.config.n_positions
        raise ValueError(f"gpt2fast.evaluate: window must be at most reference's n_positions = {most}, got {window}")
    if reference is not None and reference.config.vocab_size != model.config.vocab_size:
        sizes = reference.config.vocab_size, model.config.vocab_size
        raise ValueError(f"gpt2fast.evaluate: reference must have vocab_size {sizes[1]} as model has, got {sizes[0]}")
    loss, kl, same = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    with torch.inference_mode():
        for begin, end, first in windows(len(tokens), window, stride):
            logits = [_logits(m, tokens[begin:end], first - begin) for m in (model, reference) if m is not None]
            for at in range(0, end - first, ROWS):
                log_p, *log_q = (rows[at : at + ROWS].double().log_softmax(-1) for rows in logits)
                targets = tokens[first + at : first + at + len(log_p)]
                loss -= log_p.gather(1, targets[:, None]).sum().cpu()
                for other in log_q:
                    same += (other.argmax(1) == log_p.argmax(1)).sum().cpu()
                    kl += (other.exp() * (other - log_p)).sum().cpu()
            if shown is not None:
                shown(end - 1)
    count = len(tokens) - 1
    compared = dict(kl=kl.item() / count, agreement=same.item() / count) if reference is not None else {}
    return Score(count, _exp(loss.item() / count), **compared)


def _logits(model: Any, tokens: Tensor, first: int) -> Tensor:
    """The logits (n, V) of the tokens from ``first`` on, each after those before it in the window."""
    return model(tokens[None, :-1], logits_to_keep=len(tokens) - first)[0]


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)  # NaN stays NaN


def check_windows(n_positions: int, window: int | None, stride: int | None) -> tuple[int, int]:
    """Window and stride with their defaults. Raises ValueError where they are out of range."""
    window = n_positions if window is None else window
    if not 2 <= window <= n_positions:
        raise ValueError(f"gpt2fast.evaluate: window must lie in [2, n_positions = {n_positions}], got {window}")
    stride = max(window // 2, 1) if stride is None else stride
    if not 1 <= stride < window:
        raise ValueError(f"gpt2fast.evaluate: stride must lie in [1, window = {window}), got {stride}")
    return window, stride


def compare_formats(
    folder: Path,
    texts: Sequence[Path],
    formats: Sequence[str] = FORMATS,
    window: int | None = None,
    stride: int | None = None,
    most_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """A row for each format of weights: the fields of Score, the format, its bytes, and its perplexity to float32's.

    Each model is compared with the float32 model of the same folder. Errors: ValueError or OSError, before any weight
    is read, for an unknown format, a text that cannot be read, or a window out of range.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ValueError(f"gpt2fast.evaluate: weights must be one of {', '.join(FORMATS)}, got {unknown[0]!r}")
    check_windows(load_config(folder).n_positions, window, stride)
    if most_tokens is not None and most_tokens < 2:
        raise ValueError(f"gpt2fast.evaluate: tokens must be at least 2, got {most_tokens}")
    tokens = read_tokens(folder, texts)[:most_tokens]
    if len(tokens) < 2:
        raise ValueError(f"gpt2fast.evaluate: the text must have at least 2 tokens, got {len(tokens)}")
    reference, rows = GPT2.from_pretrained(folder, weights=REFERENCE), []
    wide, count = None, len(tokens) - 1
    for name in [REFERENCE, *(name for name in dict.fromkeys(formats) if name != REFERENCE)]:
        model = reference if name == REFERENCE else GPT2.from_pretrained(folder, weights=name)
        shown = progress(count, lambda done, name=name: f"{name}: {done} of {count} tokens")
        score = evaluate(model, tokens, reference, window, stride, shown)
        wide = wide or score.perplexity
        rows.append(dict(weights=name, **asdict(score), change=score.perplexity / wide - 1, bytes=bytes_of(model)))
    return [row for row in rows if row["weights"] in formats]


def read_tokens(folder: Path, texts: Sequence[Path]) -> Tensor:
    """The tokens (T,) of the texts by the tokenizer of a folder, with an end-of-text token between two texts."""
    tokenizer, config = Tokenizer.from_pretrained(folder), load_config(folder)
    eos = config.eos_token_id
    between = [eos] if isinstance(eos, int) else list(eos or [])[:1]
    tokens: list[int] = []
    for path in texts:
        try:
            text = Path(path).read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"gpt2fast.evaluate: {path} must be UTF-8, got other bytes at byte {error.start}"
            ) from None
        if not text:
            raise ValueError(f"gpt2fast.evaluate: {path} must have a text, got an empty file")
        tokens += (between if tokens else []) + tokenizer.encode(text)
    return torch.tensor(tokens, dtype=torch.int64)


def bytes_of(model: torch.nn.Module) -> int:
    """The bytes of a model's parameters and buffers, with shared ones counted once."""
    held = {id(t): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}
    return sum(held.values())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of ``compare_formats`` as text."""
    lines = [f"{'weights':9} {'perplexity':>11} {'change':>9} {'KL (nats)':>10} {'agreement':>10} {'MB':>8}"]
    for row in rows:
        lines.append(
            f"{row['weights']:9} {row['perplexity']:11.4f} {row['change']:+9.3%} {row['kl']:10.6f} "
            f"{row['agreement']:10.2%} {row['bytes'] / 1e6:8.1f}"
        )
    return "\n".join([*lines, f"{rows[0]['tokens']} tokens; change, KL and agreement: against float32"])
