"""The tokenizer against tiktoken with GPT-2's true ranks, and streaming, which never splits a character."""

import base64
import inspect
import json
import random

import fetch_ranks
import pytest
import tiktoken
import tokenizers
import torch

from gpt2fast.streaming import TextStreamer
from gpt2fast.text import END, Tokenizer, _bytes_by_character

PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
TEXTS = [
    "Hello, world! It's 10:45, they've won't I'LL 1234567",
    "  leading,\ttabs \n\n\n and trailing   ",
    "def f(x):\n    return {k: v**2 for k, v in x.items()}  # naïve\r\n",
    "Größe, ça va, Ελληνικά, русский, עברית, हिन्दी, 日本語, 한국어, 𝔘𝔫𝔦",
    "👩‍👩‍👧‍👦 🇫🇷 👍🏽 \u200b\ufeff\x00\x7f\xa0\u2028",
    inspect.getsource(random)[:20_000],
]


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer(train())


def train() -> tokenizers.Tokenizer:
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(TEXTS, trainer)
    return found


def merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts that byte-pair encoding joins in its last step for ``token``."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


@pytest.fixture(scope="module")
def true_ranks() -> dict[bytes, int]:
    try:
        lines = fetch_ranks.ranks(fetch=False).read_bytes().splitlines()
    except OSError as error:
        pytest.skip(str(error))
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


@pytest.fixture(scope="module")
def gpt2(true_ranks, tmp_path_factory) -> Tokenizer:
    """A tokenizer from vocab.json and merges.txt, which follow from the ranks."""
    folder = tmp_path_factory.mktemp("gpt2")
    character = {byte: c for c, byte in _bytes_by_character().items()}
    words = {token: "".join(character[b] for b in token) for token in true_ranks}
    ordered = sorted((t for t in true_ranks if len(t) > 1), key=true_ranks.get)
    merges = [" ".join(words[part] for part in merge(token, true_ranks)) for token in ordered]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    vocab = {words[token]: rank for token, rank in true_ranks.items()} | {END: len(true_ranks)}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    return Tokenizer.from_pretrained(folder)


def random_texts(count: int) -> list[str]:
    chooser = random.Random(0)
    ranges = [(0x20, 0x7F), (0x20, 0x7F), (0, 0x250), (0x370, 0x600), (0x3000, 0x3400), (0x1F300, 0x1F700), (9, 14)]
    return [
        "".join(chr(chooser.randrange(*chooser.choice(ranges))) for _ in range(chooser.randrange(60)))
        for _ in range(count)
    ]


def test_equals_tiktoken_with_gpt2_s_ranks(gpt2, true_ranks):
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=PATTERN, mergeable_ranks=true_ranks, special_tokens={END: len(true_ranks)}
    )
    assert len(gpt2) == 50257 and gpt2.end == 50256
    for text in TEXTS + random_texts(500):
        expected = encoding.encode(text, disallowed_special=())
        assert gpt2.encode(text) == expected, text
        assert gpt2.decode(expected) == encoding.decode(expected) == text
    assert gpt2.encode(f"a{END}b") == encoding.encode(f"a{END}b", allowed_special="all")
    for _ in range(200):
        drawn = [random.Random(_).randrange(50257) for _ in range(30)]
        assert gpt2.decode(drawn) == encoding.decode(drawn)


def test_round_trip_and_bytes(small):
    for text in TEXTS + random_texts(100):
        assert small.decode(small.encode(text)) == text
        assert b"".join(map(small.token_bytes, small.encode(text))) == text.encode()
    assert small.token_bytes(10**6) == b""


def test_streaming_gives_whole_characters_and_the_same_text(small):
    chooser = random.Random(1)
    sequences = [small.encode(text) for text in TEXTS]
    sequences += [[chooser.randrange(len(small)) for _ in range(50)] for _ in range(200)]
    for tokens in sequences:
        stream = small.stream()
        pieces = [stream.put(token) for token in tokens] + [stream.end()]
        assert "".join(pieces) == small.decode(tokens)
    stream = small.stream()
    euro = [stream.put(token) for byte in "€".encode() for token in small_tokens(small, byte)]
    assert euro == ["", "", "€"]


def small_tokens(small, byte: int) -> list[int]:
    return [t for t in range(len(small)) if small.token_bytes(t) == bytes([byte])][:1]


def test_text_streamer(small):
    tokens, pieces = small.encode("naïve 日本"), []
    streamer = TextStreamer(small, pieces.append)
    streamer.put(torch.tensor([tokens[:2]]))
    for token in tokens[2:]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == "naïve 日本"
    pieces.clear()
    streamer = TextStreamer(small, pieces.append, skip_prompt=True)
    streamer.put(torch.tensor([tokens]))
    streamer.put(torch.tensor([small.encode("!")[0]]))
    streamer.end()
    assert pieces == ["!"]
    with pytest.raises(ValueError, match="one row can be streamed, got 2"):
        streamer.put(torch.tensor([[1], [2]]))


def test_batch_is_padded_on_the_left(small):
    ids, mask = small.batch(["a long first text", "b"])
    assert ids.shape == mask.shape and ids.dtype == mask.dtype == torch.int64
    assert mask[0].all() and mask[1].tolist() == [0] * (ids.shape[1] - 1) + [1]
    assert small.decode(ids[1], skip_special_tokens=True) == "b"


def test_tokenizer_json(tmp_path, small):
    found = train()
    found.enable_truncation(3)
    found.enable_padding()
    found.save(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert Tokenizer.from_pretrained(tmp_path).encode(text) == small.encode(text)


def test_bad_files(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="must hold tokenizer.json, or vocab.json and merges.txt"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        Tokenizer.from_pretrained(tmp_path)
    import sys

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        Tokenizer.from_pretrained(tmp_path)
