"""Text to tokens and back: GPT-2's byte-level BPE, by the tokenizers library. Streaming never splits a character."""

import codecs
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .weights import locate

END = "<|endoftext|>"


def _bytes_by_character() -> dict[str, int]:
    """The printable stand-in that GPT-2's vocabulary has for each byte: itself, or one from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """A byte-level BPE tokenizer, from ``tokenizer.json`` or from ``vocab.json`` and ``merges.txt``."""

    def __init__(self, tokenizer):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._bytes = _bytes_by_character()
        self._added = {number: str(token) for number, token in tokenizer.get_added_tokens_decoder().items()}

    @classmethod
    def from_pretrained(cls, source: str | Path, **hub: Any) -> "Tokenizer":
        """From a folder or, by name, from the Hugging Face hub (``hub``: revision, token, cache_dir).

        Errors: FileNotFoundError where neither is in the folder, ValueError where a file is corrupt, OSError where the
        hub does not give it.
        """
        try:
            from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        except ImportError:
            raise ImportError("gpt2fast.Tokenizer needs the tokenizers library (pip install tokenizers)") from None
        folder = locate(source, weights=False, **hub)
        whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
        if not whole.is_file() and not (vocab.is_file() and merges.is_file()):
            raise FileNotFoundError(f"gpt2fast: {folder} must hold tokenizer.json, or vocab.json and merges.txt")
        try:
            if whole.is_file():
                return cls(Tokenizer.from_file(str(whole)))
            tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"gpt2fast: the tokenizer in {folder} cannot be read: {error}") from error
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        if tokenizer.token_to_id(END) is not None:
            tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
        return cls(tokenizer)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    @property
    def end(self) -> int | None:
        """The end-of-text token, None without one."""
        return self._tokenizer.token_to_id(END)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int] | Tensor, skip_special_tokens: bool = False) -> str:
        tokens = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        return self._tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def batch(self, texts: Iterable[str], pad: int | None = None) -> tuple[Tensor, Tensor]:
        """input_ids and attention_mask, (B, T) int64, padded on the left as ``generate`` wants it."""
        rows = [self.encode(text) for text in texts]
        longest = max(map(len, rows), default=0)
        pad = (self.end or 0) if pad is None else pad
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], dtype=torch.int64)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], dtype=torch.int64)
        return ids, mask

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; none for a number that is no token."""
        if token in self._added:
            return self._added[token].encode()
        text = self._tokenizer.id_to_token(token) or ""
        return b"".join(bytes([self._bytes[c]]) if c in self._bytes else c.encode() for c in text)

    def stream(self) -> "Stream":
        return Stream(self)


class Stream:
    """Decodes token by token: the pieces joined are ``decode`` of all, and a character comes when it is whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def put(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def end(self) -> str:
        """What is left of a character that never became whole, as a replacement character."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
