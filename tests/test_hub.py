"""Models and tokenizers by their hub name, from a cache with the hub's layout; effects of generation_config.json."""

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from test_text import train
from transformers import GPT2Config, GPT2LMHeadModel

import gpt2fast
from gpt2fast import GPT2, Tokenizer, cli

SIZES = dict(n_layer=1, n_embd=32, n_head=2, vocab_size=500, n_positions=24, initializer_range=0.3)
IDS = torch.tensor([[5, 17, 400]])


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def make(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0)).eval()


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache with two revisions of someone/tiny, with blobs, as snapshot_download leaves it."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / "models--someone--tiny"
    for seed, (branch, commit) in enumerate((("main", "a" * 40), ("v2", "b" * 40))):
        snapshot, blobs, refs = (repository / part for part in (f"snapshots/{commit}", "blobs", "refs"))
        for folder in (snapshot, blobs, refs):
            folder.mkdir(parents=True, exist_ok=True)
        (refs / branch).write_text(commit)
        made = cache / f"made-{branch}"
        make(seed).save_pretrained(made)
        train().save(str(made / "tokenizer.json"))
        (made / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
        for number, file in enumerate(sorted(made.iterdir())):
            blob = blobs / f"{commit}{number}"
            shutil.move(file, blob)
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return cache


def test_model_by_hub_name_and_revision(cache):
    for seed, hub in enumerate((dict(), dict(revision="v2"))):
        model = GPT2.from_pretrained("someone/tiny", cache_dir=cache, **hub)
        assert torch.equal(model.wte.weight, make(seed).transformer.wte.weight)
    assert torch.equal(
        GPT2.from_pretrained("someone/tiny", cache_dir=cache, revision="b" * 40).wte.weight, model.wte.weight
    )
    ours = gpt2fast.GPT2LMHeadModel.from_pretrained("someone/tiny", cache_dir=cache, revision="v2")
    assert torch.equal(ours.transformer.wte.weight, model.wte.weight)


def test_tokenizer_by_hub_name(cache):
    tokenizer = Tokenizer.from_pretrained("someone/tiny", cache_dir=cache)
    assert tokenizer.encode("def f(x):") == train().encode(" def f(x):").ids, "the file beside it is obeyed"


def test_command_line_by_hub_name(cache, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    assert cli.main(["generate", "def", "-m", "someone/tiny", "-n", "3", "-t", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "someone/tiny"


def test_what_is_asked_of_the_hub(monkeypatch, tmp_path, cache):
    asked = []

    def snapshot(name, allow_patterns, **where):
        asked.append((name, where, any("safetensors" in pattern for pattern in allow_patterns)))
        return str(cache / "models--someone--tiny" / "snapshots" / ("a" * 40))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    where = dict(revision="v1", token="secret", cache_dir=tmp_path)
    GPT2.from_pretrained("someone/tiny", **where)
    Tokenizer.from_pretrained("someone/tiny", **where)
    assert asked == [("someone/tiny", where, True), ("someone/tiny", where, False)]


def test_names_that_are_not_there(tmp_path):
    for kind in (GPT2, Tokenizer):
        with pytest.raises(OSError, match="'someone/gone' is no folder here and could not be fetched from the hub"):
            kind.from_pretrained("someone/gone", cache_dir=tmp_path)
        with pytest.raises(FileNotFoundError, match="must be a folder or a hub name"):
            kind.from_pretrained(tmp_path / "nowhere")
        with pytest.raises(TypeError, match="subfolder"):
            kind.from_pretrained("someone/gone", subfolder="x")


@pytest.mark.parametrize("ends", (0, 7, list(range(100, 400)), None), ids=("same", "one", "several", "none"))
def test_generation_config_says_what_ends_a_text(tmp_path, ends):
    theirs = make(3)
    theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id = ends, 9
    theirs.save_pretrained(tmp_path)
    reloaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    model = GPT2.from_pretrained(tmp_path)
    ids, mask = IDS.repeat(2, 1), torch.tensor([[1, 1, 1], [0, 1, 1]])
    expected = reloaded.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    found = model.generate(ids, mask, max_new_tokens=12)
    assert torch.equal(found, expected)
    assert isinstance(ends, list) is (found.shape[1] < 15)
    model.save_pretrained(tmp_path / "again")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "again")
    assert torch.equal(again.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False), expected)


def test_generation_config_that_is_wrong(tmp_path):
    make(0).save_pretrained(tmp_path)
    for text, message in (
        ("{", "generation_config.json is not valid JSON"),
        ("[]", "generation_config.json must hold a JSON object, got list"),
        ('{"eos_token_id": "x"}', "eos_token_id must be None, an integer or a list"),
    ):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            GPT2.from_pretrained(tmp_path)
