"""Converts text to tokens and back: GPT-2's byte-level BPE, by the tokenizers library.

The files next to the vocabulary are read as transformers' GPT2Tokenizer reads them: added and special tokens,
``add_prefix_space``, ``add_bos_token``. ``decode`` returns exactly the text of the tokens and does not "clean it up".
Streaming never splits a character.
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
    """The byte for each character of GPT-2's vocabulary.

    The vocabulary writes each byte as a printable character: the character of that number, or one from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """A tokenizer from ``tokenizer.json``, or GPT-2's byte-level BPE from ``vocab.json`` and ``merges.txt``.

    ``end`` is the end-of-text token, ``pad`` is the token that ``batch`` fills rows with, and ``start`` and ``stop``
    are the tokens that ``encode`` puts before and after every text. Each of them is None where there is none.
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
        """Reads a tokenizer from a folder, or by name from the Hugging Face hub (``hub``: revision, token, cache_dir).

        ``tokenizer_config.json``, ``special_tokens_map.json`` and ``added_tokens.json`` are read if they exist.
        Errors: FileNotFoundError where the folder has no tokenizer, ValueError where a file is corrupt or needs
        something that is not supported, OSError where the hub cannot be read.
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
        """The bytes of a token; empty for a number that is not a token."""
        text = self._added.get(token) or self._tokenizer.id_to_token(token) or ""
        if all(c in self._bytes for c in text):  # for added tokens too, as in the library's decoder
            return bytes(self._bytes[c] for c in text)
        return text.encode()

    def is_part(self, token: int) -> bool:
        """Whether the token is a single byte such as ``<0xE2>``, which is decoded together with those next to it."""
        return (
            self._falls_back and re.fullmatch("<0x[0-9A-F]{2}>", self._tokenizer.id_to_token(token) or "") is not None
        )

    def stream(self) -> "Stream | StreamOfAny":
        return Stream(self) if self.is_byte_level else StreamOfAny(self)


class SideFiles:
    """The files next to a vocabulary, read as transformers does: the config, and the maps if it lists no tokens."""

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
        """The text of a named token. A file has it as a string or as an object with ``content``."""
        value = self.config.get(key, default)
        return None if value is None else str(_token(f"{key} of {self.folder}", value))

    def _switch(self, key: str) -> bool | None:
        wanted = self.config.get(key)
        if wanted is not None and not isinstance(wanted, bool):
            raise ValueError(f"gpt2fast: {key} of {self.folder} must be true or false, got {wanted!r}")
        return wanted

    def frame(self, whole: bool) -> dict[str, str | None]:
        """The tokens before and after every text. With ``whole``, a tokenizer.json, that file itself has them."""
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
        """Adds the listed tokens in the order of their numbers, then the named ones. Known tokens are not changed."""
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
        """The special tokens with these names, those of a list, and GPT-2's end of text if the vocabulary has it."""
        found = [(name, self.config.get(name)) for name in named]
        more = self.config.get(further) or []
        found += [(further, token) for token in (more.values() if isinstance(more, dict) else more)]
        if tokenizer.token_to_id(END) is not None:
            found.append(("eos_token", END))
        return [_token(f"{key} of {self.folder}", token, special=True) for key, token in found if token]


def _token(where: str, token: Any, **flags: bool) -> Any:
    """The AddedToken of an entry in a file, which is its text or an object with ``content`` and flags."""
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
BY_TOKEN = ("Replace", "ByteFallback")  # these decode each token alone, or a run of byte tokens


def _decoder_obstacle(decoder: dict[str, Any] | None) -> str | None:
    """The part of a decoder that could change text it has already given when a token follows; None if there is none."""
    if decoder is None or decoder["type"] in ALONE:
        return None
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    if len(parts) == 1 and parts[0]["type"] in ALONE:
        return None
    fused = False  # after Fuse, a part sees the whole text
    for part in parts:
        kind = part["type"]
        strips_first = kind == "Strip" and part["start"] <= 1 and not part["stop"]
        if not (kind == "Fuse" or strips_first or (kind in BY_TOKEN and not fused)):
            return kind
        fused = fused or kind == "Fuse"
    return None


class StreamOfAny:
    """As Stream, for tokenizers that are not byte-level. There, the text of a token may depend on those around it.

    It decodes the tokens of the last piece together with the new ones, and returns what is new.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._begin()

    def _begin(self) -> None:
        self._tokens: list[int] = []
        self._from, self._to, self._given = 0, 0, 0  # the last piece has the tokens [from, to); characters so far

    def put(self, token: int) -> str:
        self._tokens.append(token)
        if self._tokenizer.is_part(token):
            return ""
        known = self._tokenizer.decode(self._tokens[self._from : self._to])
        piece = self._tokenizer.decode(self._tokens[self._from :])[len(known) :]
        if known:  # else the next token would be the first decoded, where some decoders drop a space
            self._from = self._to
        self._to = len(self._tokens)
        self._given += len(piece)
        return piece

    def end(self) -> str:
        """The rest of the text, where the last tokens did not complete a character."""
        rest = self._tokenizer.decode(self._tokens)[self._given :]
        self._begin()
        return rest


class Stream:
    """Decodes token by token. A character is returned when it is complete. The pieces joined are ``decode`` of all."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def put(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def end(self) -> str:
        """A replacement character for an incomplete character at the end, or an empty text."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
