"""Text to tokens and back: GPT-2's byte-level BPE, by the tokenizers library. Streaming never splits a character.

What stands beside the vocabulary is obeyed as transformers' GPT2Tokenizer does: added and special tokens,
``add_prefix_space``, ``add_bos_token``. Text is never "cleaned up": ``decode`` gives what the tokens say.
"""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .weights import locate, read_object

END = "<|endoftext|>"


def _bytes_by_character() -> dict[str, int]:
    """The printable stand-in that GPT-2's vocabulary has for each byte: itself, or one from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """A tokenizer from ``tokenizer.json``, or GPT-2's byte-level BPE from ``vocab.json`` and ``merges.txt``.

    ``end`` is the end-of-text token, ``pad`` what ``batch`` fills rows with, ``start`` and ``stop`` are what ``encode``
    puts before and after every text; None where there is none.
    """

    def __init__(
        self, tokenizer, end: str = END, pad: str | None = None, start: str | None = None, stop: str | None = None
    ):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._bytes = _bytes_by_character()
        self._added = {number: str(token) for number, token in tokenizer.get_added_tokens_decoder().items()}
        decoder = None if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
        if found := _decoder_obstacle(decoder):
            raise ValueError(
                "gpt2fast.Tokenizer: the decoder must be one whose text only grows with every token: "
                f"{', '.join(ALONE)}, or ByteFallback and Replace of single tokens before Fuse, got {found}"
            )
        kinds = [] if decoder is None else [part["type"] for part in decoder.get("decoders", [decoder])]
        self._falls_back, self.is_byte_level = "ByteFallback" in kinds, kinds == ["ByteLevel"]
        self.end, self.pad, self.start, self.stop = (
            None if token is None else tokenizer.token_to_id(token) for token in (end, pad, start, stop)
        )

    @classmethod
    def from_pretrained(cls, source: str | Path, **hub: Any) -> "Tokenizer":
        """From a folder or, by name, from the Hugging Face hub (``hub``: revision, token, cache_dir).

        ``tokenizer_config.json``, ``special_tokens_map.json`` and ``added_tokens.json`` are read where they are.
        Errors: FileNotFoundError where neither is in the folder, ValueError where a file is corrupt or asks for what
        cannot be done, OSError where the hub does not give it.
        """
        try:
            from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        except ImportError:
            raise ImportError("gpt2fast.Tokenizer needs the tokenizers library (pip install tokenizers)") from None
        folder = locate(source, weights=False, **hub)
        whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
        if not whole.is_file() and not (vocab.is_file() and merges.is_file()):
            raise FileNotFoundError(f"gpt2fast: {folder} must hold tokenizer.json, or vocab.json and merges.txt")
        try:
            if whole.is_file():
                tokenizer = Tokenizer.from_file(str(whole))
            else:
                tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
                tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
                tokenizer.decoder = decoders.ByteLevel()
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"gpt2fast: the tokenizer in {folder} cannot be read: {error}") from error
        beside = SideFiles(folder)
        beside.add_tokens(tokenizer)
        beside.set_switches(tokenizer)
        return cls(tokenizer, beside.name("eos_token", END), beside.name("pad_token"), **beside.frame(whole.is_file()))

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [*([] if self.start is None else [self.start]), *ids, *([] if self.stop is None else [self.stop])]

    def decode(self, tokens: Sequence[int] | Tensor, skip_special_tokens: bool = False) -> str:
        tokens = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        return self._tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def batch(self, texts: Iterable[str], pad: int | None = None) -> tuple[Tensor, Tensor]:
        """input_ids and attention_mask, (B, T) int64, padded on the left as ``generate`` wants it."""
        rows = [self.encode(text) for text in texts]
        longest = max(map(len, rows), default=0)
        pad = next(token for token in (pad, self.pad, self.end, 0) if token is not None)
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], dtype=torch.int64)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], dtype=torch.int64)
        return ids, mask

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; none for a number that is no token."""
        text = self._added.get(token) or self._tokenizer.id_to_token(token) or ""
        if all(c in self._bytes for c in text):  # of added tokens too, as the library's decoder has it
            return bytes(self._bytes[c] for c in text)
        return text.encode()

    def is_part(self, token: int) -> bool:
        """Whether it is one of several bytes that are decoded together, in a tokenizer with tokens like ``<0xE2>``."""
        return (
            self._falls_back and re.fullmatch("<0x[0-9A-F]{2}>", self._tokenizer.id_to_token(token) or "") is not None
        )

    def stream(self) -> "Stream | StreamOfAny":
        return Stream(self) if self.is_byte_level else StreamOfAny(self)


class SideFiles:
    """What stands beside a vocabulary, as transformers reads it: the config and, where it lists no tokens, the maps."""

    NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = self._read("tokenizer_config.json")
        self.listed = "added_tokens_decoder" in self.config
        if not self.listed:
            self.config |= self._read("special_tokens_map.json")

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return read_object(path) if path.is_file() else {}

    def name(self, key: str, default: str | None = None) -> str | None:
        """The text of a named token, which may be written as a string or as an object with its ``content``."""
        value = self.config.get(key, default)
        return None if value is None else str(_token(f"{key} of {self.folder}", value))

    def _switch(self, key: str) -> bool | None:
        wanted = self.config.get(key)
        if wanted is not None and not isinstance(wanted, bool):
            raise ValueError(f"gpt2fast: {key} of {self.folder} must be true or false, got {wanted!r}")
        return wanted

    def frame(self, whole: bool) -> dict[str, str | None]:
        """What every text begins and ends with; a tokenizer.json (``whole``) says that itself."""
        begins, ends = self._switch("add_bos_token"), self._switch("add_eos_token")
        return dict(
            start=self.name("bos_token", END) if begins and not whole else None,
            stop=self.name("eos_token", END) if ends and not whole else None,
        )

    def set_switches(self, tokenizer) -> None:
        wanted = self._switch("add_prefix_space")
        if wanted is not None and hasattr(tokenizer.pre_tokenizer, "add_prefix_space"):
            tokenizer.pre_tokenizer.add_prefix_space = wanted
        tokenizer.encode_special_tokens = bool(self._switch("split_special_tokens"))

    def add_tokens(self, tokenizer) -> None:
        """Adds the tokens that are listed, by their numbers, then the named ones; what the vocabulary has stays so."""
        specials = self._specials(tokenizer, self.NAMED, "extra_special_tokens")
        listed = self._listed({str(token) for token in specials})
        specials += self._specials(tokenizer, (), "additional_special_tokens")
        known = {str(token) for token in tokenizer.get_added_tokens_decoder().values()}
        known |= {str(token) for token in listed.values()}
        tokenizer.add_tokens([token for _, token in sorted(listed.items())])
        for token in specials:
            if str(token) not in known:
                tokenizer.add_tokens([token])
        for number, token in listed.items():
            if (got := tokenizer.token_to_id(str(token))) != number:
                raise ValueError(f"gpt2fast: token {str(token)!r} of {self.folder} must be number {number}, got {got}")

    def _listed(self, specials: set[str]) -> dict[int, Any]:
        from tokenizers import AddedToken

        if self.listed:
            where = f"added_tokens_decoder of {self.folder / 'tokenizer_config.json'}"
            tokens = self.config["added_tokens_decoder"]
            if not isinstance(tokens, dict) or not all(number.isdecimal() for number in tokens):
                raise ValueError(f"gpt2fast: {where} must be an object of tokens by their numbers, got {tokens!r}")
            return {int(number): _token(where, token) for number, token in tokens.items()}
        numbers = self._read("added_tokens.json")
        if not all(type(number) is int for number in numbers.values()):
            path = self.folder / "added_tokens.json"
            raise ValueError(f"gpt2fast: {path} must hold numbers by their tokens, got {numbers!r}")
        return {
            number: AddedToken(text, normalized=text not in specials, special=text in specials)
            for text, number in numbers.items()
        }

    def _specials(self, tokenizer, named: Sequence[str], further: str) -> list[Any]:
        """Special tokens by their names and of a list; GPT-2's end of text where the vocabulary has it."""
        found = [(name, self.config.get(name)) for name in named]
        more = self.config.get(further) or []
        found += [(further, token) for token in (more.values() if isinstance(more, dict) else more)]
        if tokenizer.token_to_id(END) is not None:
            found.append(("eos_token", END))
        return [_token(f"{key} of {self.folder}", token, special=True) for key, token in found if token]


def _token(where: str, token: Any, **flags: bool) -> Any:
    """An AddedToken of what a file has: its text, or an object with ``content`` and flags."""
    from tokenizers import AddedToken

    try:
        if isinstance(token, str):
            return AddedToken(token, **flags)
        return AddedToken(**{key: value for key, value in token.items() if key != "__type"} | flags)
    except (TypeError, ValueError, AttributeError):
        raise ValueError(
            f"gpt2fast: {where} must be a text or an object with content and flags, got {token!r}"
        ) from None


ALONE = ("ByteLevel", "WordPiece", "Metaspace", "BPEDecoder")
BY_TOKEN = ("Replace", "ByteFallback")  # they see one token each, or the bytes of a run of them


def _decoder_obstacle(decoder: dict[str, Any] | None) -> str | None:
    """What of a decoder is none of those whose text only grows with every token; None where all is."""
    if decoder is None or decoder["type"] in ALONE:
        return None
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    if len(parts) == 1 and parts[0]["type"] in ALONE:
        return None
    fused = False  # from then on a part sees the whole text
    for part in parts:
        kind = part["type"]
        strips_first = kind == "Strip" and part["start"] <= 1 and not part["stop"]
        if not (kind == "Fuse" or strips_first or (kind in BY_TOKEN and not fused)):
            return kind
        fused = fused or kind == "Fuse"
    return None


class StreamOfAny:
    """As Stream, for tokenizers whose tokens are no bytes: a token's text may depend on those around it.

    It decodes the tokens since the last but one piece, and gives what that adds to the last piece.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._begin()

    def _begin(self) -> None:
        self._tokens: list[int] = []
        self._from, self._to, self._given = 0, 0, 0  # the last piece is of tokens [from, to); characters given so far

    def put(self, token: int) -> str:
        self._tokens.append(token)
        if self._tokenizer.is_part(token):
            return ""
        known = self._tokenizer.decode(self._tokens[self._from : self._to])
        piece = self._tokenizer.decode(self._tokens[self._from :])[len(known) :]
        if known:  # without it the next token would be the window's first, of which some decoders take off the space
            self._from = self._to
        self._to = len(self._tokens)
        self._given += len(piece)
        return piece

    def end(self) -> str:
        """What is left where the last tokens were not yet a whole character."""
        rest = self._tokenizer.decode(self._tokens)[self._given :]
        self._begin()
        return rest


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
