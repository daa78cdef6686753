"""The command line: what it prints, its JSON, its errors, and how soon the first token comes."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from test_text import train

from gpt2fast import cli
from gpt2fast.config import Config
from gpt2fast.model import GPT2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train()
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = Config(n_layer=2, n_embd=64, n_head=2, vocab_size=500, n_positions=64, eos_token_id=None)
    GPT2(config).save_pretrained(folder)
    return str(folder)


def run(*args: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gpt2fast", *args]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, input="")


def test_generate_streams_text_and_ends_with_its_speed(folder, capsys):
    assert cli.main(["generate", "def main(", "--model", folder, "-n", "12", "--seed", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("def main(") and len(out) > len("def main(")
    assert "tokens/s · first token after" in err and "12 tokens · float32 ·" in err


def test_generate_json_and_its_flags(folder, capsys, monkeypatch):
    def generate(*flags, stdin=None):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        prompt = [] if stdin is not None else ["def main("]
        assert cli.main(["generate", *prompt, "-m", folder, "-n", "20", "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)

    first = generate("--seed", "7")
    assert first["text"].startswith("def main(") and first["new_tokens"] == 20
    assert first["tokens_per_second"] > 0 and 0 < first["time_to_first_token_s"] < first["start_to_first_token_s"]
    assert (
        first["tokens"] == generate("--seed", "7")["tokens"] == generate("--seed", "7", stdin="def main(\n")["tokens"]
    )
    assert first["tokens"] != generate("--seed", "8")["tokens"]
    greedy = generate("-t", "0")
    assert greedy["tokens"] == generate("--temperature", "0", "--seed", "3")["tokens"]
    assert greedy["tokens"] == generate("--top-k", "1")["tokens"]
    assert generate("--weights", "bfloat16")["weights"] == "bfloat16"
    end = greedy["text"][len("def main(") :][:3]
    assert generate("-t", "0", "--stop", end)["new_tokens"] < 20
    generate("--top-p", "0.9", "--min-p", "0.01", "--repetition-penalty", "1.2", "--min-new-tokens", "3")


def test_generate_fills_what_the_model_has_room_for(folder, capsys):
    assert cli.main(["generate", "def main(", "-m", folder, "-t", "0", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 64


def test_info(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"machine", "isa", "backends", "versions"}
    assert found["versions"]["torch"].split("+")[0] in text and "reference" in found["backends"]["found"]


def test_check_and_bench_pass_names_and_json_on(monkeypatch):
    import gpt2fast.testing

    calls = []
    monkeypatch.setattr(gpt2fast.testing, "run_check", lambda *a: calls.append(("check", *a)) or 0)
    monkeypatch.setattr(gpt2fast.testing, "run_bench", lambda *a: calls.append(("bench", *a)) or 3)
    assert cli.main(["check", "gelu", "linear", "--json"]) == 0 and cli.main(["bench"]) == 3
    assert calls == [("check", ["gelu", "linear"], True), ("bench", [], False)]


@pytest.mark.parametrize("args, message", [
    (["generate", ""], "the prompt must not be empty"),
    (["generate", "x", "-m", "not/a/model"], "a folder or a hub name"),
    (["generate", "x", "-n", "64"], r"n_positions = 64"),
    (["generate", "x", "--top-p", "0"], r"top_p must lie in \(0, 1\]"),
    (["generate", "x", "--temperature", "-1"], "temperature must"),
    (["generate", "x", "--weights", "int3"], "weights must be one of float32"),
    (["generate", "x", "--backend", "magic"], "backend must be one of auto"),
    (["check", "nonsense"], "op must be one of"),
])  # fmt: skip
def test_errors_are_one_line(folder, capsys, args, message):
    if args[0] == "generate" and "-m" not in args:
        args = [*args, "-m", folder] + ["-n", "4"] * ("-n" not in args)
    assert cli.main(args) == 1
    out, err = capsys.readouterr()
    assert out == "" and re.search(message, err) and err.startswith("gpt2fast") and err.count("\n") == 1


def test_unknown_isa_and_backend_before_anything_runs(folder):
    for done, message in (
        (run("generate", "x", "-m", folder, "--isa", "mmx"), "mmx"),
        (run("generate", "x", "-m", folder, GPT2FAST_BACKEND="magic"), "backend must be one of"),
    ):
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


LIGHT = """
import sys
from gpt2fast import cli
assert cli.main(["generate", "def main(", "-m", sys.argv[1], "-n", "2", "--json"]) == 0
print([m for m in ("transformers", "safetensors", "huggingface_hub", "rich", "triton") if m in sys.modules])
"""


def test_generate_imports_nothing_it_does_not_need(folder):
    done = subprocess.run([sys.executable, "-c", LIGHT, folder], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_a_closed_pipe_is_no_error(folder):
    command = f"{sys.executable} -m gpt2fast generate 'def main(' -m {folder} -n 50 | head -c 3"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout == "def" and "Traceback" not in done.stderr
