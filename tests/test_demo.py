"""The shipped model: small enough, better than a trigram on text it has not seen, and ``generate`` streams it."""

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
from gpt2fast.demo_model import corpus

WINDOW, WINDOWS = 512, 16
AS_DEMO = dict(repetition_penalty=1.1, seed=0)  # as `make demo` writes


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
    """On the held-out files of the Python that runs this, against a trigram of its other files."""
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
    """Text arrives piece by piece while the process runs, with nothing fetched from anywhere."""
    command = [sys.executable, "-m", "gpt2fast", "generate", "def main(", "-n", "40", "--seed", "1"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        pieces = list(iter(lambda: os.read(process.stdout.fileno(), 4096), b""))
        report = process.stderr.read().decode()
    assert process.returncode == 0, report
    assert b"".join(pieces).decode().startswith("def main(")
    assert len(pieces) > 5
    assert "tokens/s" in report and "first token" in report
