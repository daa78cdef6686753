"""The text of the demo model, its tokenizer, and n-gram models to compare it with.

The text is Python's standard library. Files are read in a fixed order and split by a hash of their path, so that a file
is always in the same part.
"""

import hashlib
import math
import sysconfig
from pathlib import Path

import numpy as np

END = "<|endoftext|>"
# Left out: test suites (two thirds of the whole, some in odd encodings), installed packages and generated tables.
EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
BUILT = ("config-", "__phello__", "_sysconfigdata")


def read() -> dict[str, str]:
    """The texts by their paths below the standard library, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if EXCLUDED.isdisjoint(name.parts) and not name.parts[0].startswith(BUILT):
            try:
                texts[name.as_posix()] = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError:
                continue
    return texts


def held_out(name: str) -> bool:
    """Whether a file is for validation. About one file in twenty is, by a hash of its path."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 20 == 0


def split(texts: dict[str, str]) -> tuple[list[str], list[str]]:
    """Training and validation texts."""
    return [t for n, t in texts.items() if not held_out(n)], [t for n, t in texts.items() if held_out(n)]


def train_tokenizer(texts: list[str], vocab_size: int):
    """Trains a tokenizer like GPT-2's: its pre-tokenizer and byte-level BPE, with ``<|endoftext|>`` as token 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer, texts: list[str]) -> list[np.ndarray]:
    """The tokens of each text as an int64 array that ends with ``<|endoftext|>``."""
    end = tokenizer.token_to_id(END)
    return [np.array([*e.ids, end], dtype=np.int64) for e in tokenizer.encode_batch(texts)]


class NGram:
    """Interpolated n-grams with absolute discounting: p(w|uv) = (c(uvw) - d)+ / c(uv) + d n(uv) / c(uv) p(w|v).

    c counts occurrences, n(uv) is the number of different tokens that follow uv, and d is ``discount``. Unigrams are
    interpolated with the uniform distribution. Source: Ney et al., 1994.
    """

    def __init__(self, tokens: np.ndarray, order: int, vocab_size: int, discount: float = 0.75):
        self.order, self.vocab_size, self.discount = order, vocab_size, discount
        self.counts = []
        for n in range(1, order + 1):
            grams, counts = np.unique(self._keys(tokens, n), return_counts=True)
            contexts, first = np.unique(grams // vocab_size, return_index=True)
            self.counts.append((grams, counts, contexts, np.add.reduceat(counts, first), np.diff([*first, len(grams)])))

    def _keys(self, tokens: np.ndarray, n: int) -> np.ndarray:
        """A number for each n tokens in a row. Equal runs have equal numbers."""
        keys = np.zeros(len(tokens) - n + 1, dtype=np.int64)
        for i in range(n):
            keys = keys * self.vocab_size + tokens[i : len(tokens) - n + 1 + i]
        return keys

    def loss(self, tokens: np.ndarray) -> float:
        """The mean loss in nats per token, from the second on. A context that is not known is replaced by a shorter."""
        probability = np.full(len(tokens), 1 / self.vocab_size)
        for n, (grams, counts, contexts, totals, distinct) in enumerate(self.counts, start=1):
            keys = self._keys(tokens, n)
            count = _look_up(grams, counts, keys)
            total = _look_up(contexts, totals, keys // self.vocab_size)
            followers = _look_up(contexts, distinct, keys // self.vocab_size)
            seen, safe = total > 0, np.maximum(total, 1)
            shorter = probability[n - 1 :]
            mixed = (np.maximum(count - self.discount, 0) + self.discount * followers * shorter) / safe
            probability[n - 1 :] = np.where(seen, mixed, shorter)
        return float(-np.log(probability[1:]).mean())


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def bits_per_byte(nats: float, tokens: int, size: int) -> float:
    """Converts nats per token to bits per byte, for a text of ``tokens`` tokens and ``size`` bytes."""
    return nats * tokens / size / math.log(2)
