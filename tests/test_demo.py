"""The shipped model: it is small, beats a trigram on text that it has not seen, and ``generate`` streams its text."""

import keyword
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt2fast import GPT2, Tokenizer
from gpt2fast.cli import DEMO_MODEL
from gpt2fast.demo_model import corpus, train

WINDOW, WINDOWS = 512, 16
AS_DEMO = dict(repetition_penalty=1.1, seed=0)  # the options of `make demo`


@pytest.fixture(scope="module")
def model():
    return GPT2.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(DEMO_MODEL)


def test_files_are_small():
    assert (DEMO_MODEL / "model.safetensors").stat().st_size <= 8_000_000
    assert (DEMO_MODEL / "tokenizer.json").stat().st_size <= 400_000


def test_tokenizer_fits_the_model(model, tokenizer):
    text = 'def f(x):\n\treturn "naïve — 中文 🐍"  # ...\n'
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert max(tokens) < model.config.vocab_size
    assert model.config.eos_tokens == tokenizer.encode(corpus.END) == [0]


@torch.no_grad()
def test_better_than_a_trigram(model):
    """Compares with a trigram on the held-out files of this Python; the trigram has counted its other files."""
    from tokenizers import Tokenizer as FileTokenizer

    tokenizer = FileTokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    training, validation = corpus.split(corpus.read())
    stream = np.concatenate(corpus.encode(tokenizer, validation))
    starts = np.linspace(0, len(stream) - WINDOW - 1, WINDOWS).astype(int)
    rows = np.stack([stream[s : s + WINDOW + 1] for s in starts])
    batch = torch.from_numpy(rows)
    logits = model(batch[:, :-1]).float()
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item()
    trigram = corpus.NGram(np.concatenate(corpus.encode(tokenizer, training)), 3, model.config.vocab_size)
    assert loss < np.mean([trigram.loss(row) for row in rows])


@pytest.mark.parametrize("prompt", ["def main(", "import os\n", "class "])
def test_writes_python(model, tokenizer, prompt):
    input_ids = torch.tensor([tokenizer.encode(prompt)])
    out = model.generate(input_ids, max_new_tokens=120, do_sample=True, temperature=0.8, top_k=50, **AS_DEMO)
    text = tokenizer.decode(out[0].tolist())
    assert text.startswith(prompt)
    words = re.findall(r"\w+", text[len(prompt) :])
    assert sum(map(keyword.iskeyword, words)) >= 5, text
    assert "\n    " in text or "\nimport " in text, text


def test_generate_streams():
    """Text arrives piece by piece while the process runs, and nothing is fetched."""
    command = [sys.executable, "-m", "gpt2fast", "generate", "def main(", "-n", "40", "--seed", "1"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        pieces = list(iter(lambda: os.read(process.stdout.fileno(), 4096), b""))
        report = process.stderr.read().decode()
    assert process.returncode == 0, report
    assert b"".join(pieces).decode().startswith("def main(")
    assert len(pieces) > 5
    assert "tokens/s" in report and "first token" in report


@pytest.fixture
def small_training(monkeypatch):
    """Trains for two steps on some forty files instead of hours on all."""
    texts = dict(list(corpus.read().items())[:40])
    assert any(map(corpus.held_out, texts))
    monkeypatch.setattr(corpus, "read", lambda: texts)
    for name, value in dict(STEPS=2, BATCH=1, WARMUP=1).items():
        monkeypatch.setattr(train, name, value)


def shipped() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in DEMO_MODEL.iterdir() if path.is_file()}


def test_train_writes_a_whole_model_and_only_at_its_end(small_training, tmp_path, monkeypatch):
    """It writes into --out, by default a new folder: the shipped tokenizer must still fit the shipped weights."""
    before, run = shipped(), train.train
    monkeypatch.chdir(tmp_path)
    for options, out in (([], tmp_path / "build/demo_model"), (["--out", "o", "--checkpoint", "c.pt"], tmp_path / "o")):

        def watched(*args, out=out):
            assert list(out.iterdir()) == []
            return run(*args)

        monkeypatch.setattr(train, "train", watched)
        train.main(options)
        names = {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
        assert {path.name for path in out.iterdir()} == names
        tokenizer, model = Tokenizer.from_pretrained(out), GPT2.from_pretrained(out)
        text = tokenizer.decode(model.generate(torch.tensor([tokenizer.encode("def f")]), max_new_tokens=3)[0].tolist())
        assert text.startswith("def f")
        assert "| 2 steps of 1 x 512 tokens: 1,024" in (out / "README.md").read_text()
    assert shipped() == before


def test_train_that_stops_leaves_what_was_there(small_training, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.json").write_text("the old one")

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        train.main(["--out", str(out), "--checkpoint", str(tmp_path / "c.pt")])
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("tokenizer.json", "the old one")]


@pytest.mark.parametrize("option", ("--out", "--checkpoint"))
def test_train_refuses_what_it_could_not_write(option, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "read", lambda: pytest.fail("something was done first"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        train.main([option, str(tmp_path / "file" / "x")])
    assert f"argument {option}: cannot write into" in capsys.readouterr().err
