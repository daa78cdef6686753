"""The files beside a vocabulary, against transformers' GPT2Tokenizer, and streams of tokenizers of any kind."""

import json
import random

import pytest
import tokenizers
from test_text import TEXTS, train
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2Tokenizer

from gpt2fast.text import END, Tokenizer

NEXT = 500  # the first number that is free in the vocabulary
ADDED = {"<tool>": NEXT, "New York": NEXT + 1, "<pad>": NEXT + 2}
SPECIAL = dict(lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)
PROMPTS = [
    "call <tool>  now in New York, NewYork",
    f"Hello{END}<pad> world<mask>!",
    "<tool><tool>",
    " leading",
    "",
    "leading  <strip>  both",
    "a café Ġqzx, é 日",
    *TEXTS[:3],
]

FILES = {
    "no side files": {},
    "added tokens": {"added_tokens.json": ADDED},
    "added tokens and their roles": {
        "added_tokens.json": ADDED,
        "special_tokens_map.json": dict(pad_token="<pad>", additional_special_tokens=["<tool>"]),
    },
    "roles as objects": {
        "special_tokens_map.json": dict(
            mask_token=dict(content="<mask>", lstrip=True, rstrip=False, normalized=False, single_word=False),
            eos_token=END,
        )
    },
    "a prefix space": {"tokenizer_config.json": dict(add_prefix_space=True)},
    "a start of text": {"tokenizer_config.json": dict(add_bos_token=True, bos_token="<s>")},
    "an end of text": {"tokenizer_config.json": dict(add_eos_token=True, add_bos_token=True)},
    "special tokens split": {"tokenizer_config.json": dict(split_special_tokens=True)},
    "tokens beyond ASCII": {"added_tokens.json": {"café": NEXT, "Ġqzx": NEXT + 1, "é 日": NEXT + 2}},
    "tokens in the config": {
        "tokenizer_config.json": dict(
            add_prefix_space=False,
            added_tokens_decoder={
                str(NEXT): dict(content="<strip>") | SPECIAL | dict(lstrip=True, rstrip=True),
                str(NEXT + 1): dict(content="New York") | SPECIAL | dict(special=False, normalized=True),
                str(NEXT + 2): dict(content="<pad>") | SPECIAL,
            },
            pad_token="<pad>",
        )
    },
}


def write(folder, files, whole=False):
    made = train()
    if whole:
        made.save(str(folder / "tokenizer.json"))
    else:
        made.model.save(str(folder))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize("whole", [False, True], ids=["vocabulary", "tokenizer.json"])
@pytest.mark.parametrize("name", FILES)
def test_as_transformers(tmp_path, name, whole):
    write(tmp_path, FILES[name], whole)
    ours, theirs = Tokenizer.from_pretrained(tmp_path), GPT2Tokenizer.from_pretrained(tmp_path)
    for text in PROMPTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, text
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
        stream = ours.stream()
        assert "".join([*map(stream.put, ids), stream.end()]) == ours.decode(ids)
    assert len(ours) == len(theirs) and ours.end == theirs.eos_token_id
    if theirs.pad_token_id is not None:
        assert ours.batch(["a", "a b c"])[0][0, 0] == theirs.pad_token_id


@pytest.mark.parametrize(
    "files, said",
    [
        ({"added_tokens.json": {"<tool>": NEXT + 7}}, "token '<tool>' of .* must be number 507, got 500"),
        ({"tokenizer_config.json": dict(add_prefix_space="yes")}, "add_prefix_space of .* must be true or false"),
        ({"tokenizer_config.json": dict(add_bos_token="no")}, "add_bos_token of .* must be true or false, got 'no'"),
        ({"tokenizer_config.json": dict(pad_token=5)}, "pad_token of .* must be a text or an object .*, got 5"),
        ({"tokenizer_config.json": dict(added_tokens_decoder=[])}, "added_tokens_decoder of .* must be an object"),
        ({"tokenizer_config.json": dict(added_tokens_decoder={"x": "a"})}, "must be an object of tokens by their"),
        (
            {"tokenizer_config.json": dict(added_tokens_decoder={"500": dict(content="a", lstrip="yes")})},
            "added_tokens_decoder of .* must be a text or an object with content and flags",
        ),
        ({"added_tokens.json": {"a": "500"}}, "added_tokens.json must hold numbers by their tokens"),
        ({"tokenizer_config.json": []}, "tokenizer_config.json must hold a JSON object, got list"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(tmp_path, files, said):
    with pytest.raises(ValueError, match=said):
        Tokenizer.from_pretrained(write(tmp_path, files))


def word_piece():
    found = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    found.normalizer, found.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    found.decoder = decoders.WordPiece()
    return found, trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False)


def unigram():
    found = tokenizers.Tokenizer(models.Unigram())
    found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return found, trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )


def byte_fallback():
    """The tokens are all bytes and some letters, so that most characters are several tokens."""
    names = [f"<0x{byte:02X}>" for byte in range(256)] + list("abcdefghij ")
    vocabulary = {name: number for number, name in enumerate(names)}
    found = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    found.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return found, None


@pytest.mark.parametrize("make", [word_piece, unigram, byte_fallback])
def test_streams_of_any_tokenizer_give_what_decode_gives(make, tmp_path):
    made, trainer = make()
    words = ["playing football, it's played. don't stop !", "unplayable balls; the players' foot", *TEXTS]
    if trainer is not None:
        made.train_from_iterator(words, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    chooser = random.Random(0)
    sequences = [tokenizer.encode(text) for text in [*words, "größer 日本 👍🏽"]]
    sequences += [[chooser.randrange(len(tokenizer)) for _ in range(40)] for _ in range(100)]
    stream = tokenizer.stream()
    for tokens in sequences:
        pieces = [*map(stream.put, tokens), stream.end()]
        assert "".join(pieces) == tokenizer.decode(tokens)
    assert len([piece for piece in map(stream.put, sequences[0]) if piece]) > 1, "text must come as it is made"


REFUSED = {
    "CTC": decoders.CTC(),
    "Strip": decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 3, 0)]),
    "Replace": decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("ab", "Z")]),
    "ByteLevel": decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_decoder_whose_text_does_not_only_grow_is_refused(kind):
    made, _ = word_piece()
    made.decoder = REFUSED[kind]
    with pytest.raises(ValueError, match=f"one whose text only grows with every token: .*, got {kind}"):
        Tokenizer(made)


def test_a_sequence_of_one_decoder_and_llama_s_stream():
    made = train()
    made.decoder = decoders.Sequence([decoders.ByteLevel()])
    chooser = random.Random(0)
    llama, _ = byte_fallback()
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    llama.decoder = decoders.Sequence(parts)
    for one in (made, llama):
        tokenizer = Tokenizer(one)
        stream = tokenizer.stream()
        for _ in range(300):
            tokens = [chooser.randrange(len(tokenizer)) for _ in range(30)]
            assert "".join([*map(stream.put, tokens), stream.end()]) == tokenizer.decode(tokens)
