"""``generate_many``: the tokens of one prompt at a time, whatever shares the batch, and the command that uses it."""

import io
import json
import re

import pytest
import torch

from gpt2fast import cli, generate_many, packed, step
from gpt2fast.config import Config
from gpt2fast.many import LEAST_PREFIX, MOST_WAITING
from gpt2fast.model import GPT2

SIZES = dict(n_embd=48, n_layer=2, n_head=4, n_positions=64, vocab_size=97, initializer_range=0.3)
EOS = [3, 7, 50]


def make(weights="float32") -> GPT2:
    torch.manual_seed(0)
    model = GPT2(Config(**SIZES)).eval()
    return packed.pack(model, weights) if weights in packed.BITS else model.to(getattr(torch, weights))


@pytest.fixture(scope="module")
def model() -> GPT2:
    return make()


def some_prompts(count: int = 25) -> tuple[list[list[int]], list[int]]:
    """Prompts of 1 to 50 tokens, many of which begin alike, and how many new tokens each may have."""
    draw = torch.Generator().manual_seed(1)

    def tokens(n: int) -> list[int]:
        return torch.randint(8, 50, (n,), generator=draw).tolist()

    start = tokens(LEAST_PREFIX + 4)
    lengths = torch.randint(1, 30, (count,), generator=draw).tolist()
    prompts = [(start if i % 3 else []) + tokens(n) for i, n in enumerate(lengths)]
    return prompts, [min(64 - len(p), 1 + 7 * i % 40) for i, p in enumerate(prompts)]


def alone(model, prompts, mosts, **options) -> list[list[int]]:
    results = []
    for prompt, most in zip(prompts, mosts):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=most, **options)
        results.append(out[0, len(prompt) :].tolist())
    return results


@pytest.mark.parametrize("size", (1, 2, 5, 30))
@pytest.mark.parametrize("weights", ("float32", "bfloat16", "int8"))
def test_greedy_is_one_prompt_at_a_time(weights, size):
    model, (prompts, mosts) = make(weights), some_prompts()
    found = list(generate_many(model, prompts, batch_size=size, max_new_tokens=mosts, eos_token_id=EOS))
    assert found == alone(model, prompts, mosts, eos_token_id=EOS)
    ends = [new[-1] in EOS for new in found]
    assert any(ends) and not all(ends)


@pytest.mark.parametrize("options", [
    dict(),
    dict(temperature=0.7, top_k=9, top_p=0.9),
    dict(repetition_penalty=1.3),
    dict(min_new_tokens=6),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("native", (True, False))
def test_draws_do_not_depend_on_the_batch(model, options, native, monkeypatch):
    if not native:
        monkeypatch.setattr(step, "obstacle", lambda model: "a test")
    prompts, mosts = some_prompts(14)
    options = dict(do_sample=True, seed=5, max_new_tokens=mosts, eos_token_id=EOS) | options
    expected = []
    for index, (prompt, most) in enumerate(zip(prompts, mosts)):
        one = options | dict(max_new_tokens=most, first_index=index)
        expected += generate_many(model, [prompt], **one)
    for size in (1, 3, 20):
        assert list(generate_many(model, prompts, batch_size=size, **options)) == expected


def test_draws_are_those_of_the_rows_of_generate(model):
    prompts = torch.randint(8, 50, (6, 9), generator=torch.Generator().manual_seed(2))
    options = dict(do_sample=True, seed=11, max_new_tokens=20, eos_token_id=[])
    found = list(generate_many(model, prompts, batch_size=4, **options))
    assert found == model.generate(prompts, **options)[:, 9:].tolist()


def test_stop_strings(model):
    class Letters:
        def decode(self, ids):
            return "".join(chr(40 + i) for i in ids)

    prompts, mosts = some_prompts(8)
    mosts = [max(most, 12) if len(prompt) < 50 else most for prompt, most in zip(prompts, mosts)]
    plain = alone(model, prompts, mosts, eos_token_id=[])
    options = dict(stop_strings=Letters().decode(plain[0][4:6]), tokenizer=Letters(), eos_token_id=[])
    found = list(generate_many(model, prompts, batch_size=3, max_new_tokens=mosts, **options))
    assert found == alone(model, prompts, mosts, **options) and len(found[0]) <= 6 < len(plain[0])


def test_a_shared_beginning_is_read_once(model, monkeypatch):
    """The model reads each prompt's own tokens, and the shared ones once."""
    read, forward = [], GPT2.forward

    def counting(self, ids, *args, **kwargs):
        read.append(ids.numel())
        return forward(self, ids, *args, **kwargs)

    monkeypatch.setattr(GPT2, "forward", counting)
    start = list(range(8, 8 + LEAST_PREFIX))
    prompts = [[*start, 30 + i] for i in range(5)]
    list(generate_many(model, prompts, max_new_tokens=1))
    assert read == [LEAST_PREFIX + 1, 1, 1, 1, 1]
    read.clear()
    list(generate_many(model, [p[1:] for p in prompts], max_new_tokens=1))  # one token less: not worth it
    assert read == [LEAST_PREFIX] * 5


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_prompt_read_in_two_chunks_has_the_same_bits(dtype):
    """Sharing a beginning relies on it."""
    model, ids = make().to(dtype), torch.randint(0, 97, (1, 60))
    with torch.inference_mode():
        whole = model(ids)
        for cut in (1, 8, 9, 16, 31, 52, 59):
            cache = model.new_cache(1)
            model(ids[:, :cut], cache=cache)
            assert torch.equal(model(ids[:, cut:], cache=cache), whole[:, cut:]), cut


def test_order_and_laziness(model):
    """Results come in order, and prompts are taken when there is room for them."""
    taken = []

    def prompts():
        for i in range(40):
            taken.append(i)
            yield [8 + i % 40, 9]

    results = generate_many(model, prompts(), batch_size=4, max_new_tokens=5, eos_token_id=[])
    assert taken == []
    first = next(results)
    assert len(first) == 5 and len(taken) <= 8
    assert [first, *results] == alone(model, [[8 + i % 40, 9] for i in range(40)], [5] * 40, eos_token_id=[])
    assert len(taken) == 40


def test_a_long_prompt_does_not_hold_up_the_others(model):
    """The rows beside a long text go on with later prompts; their results wait."""
    steps = []
    mosts = [60] + [2] * 59
    list(generate_many(model, [[9]] * 60, batch_size=2, max_new_tokens=mosts, eos_token_id=[],
                       progress=lambda ended, tokens: steps.append(ended)))  # fmt: skip
    assert len(steps) < 60 + 10 and MOST_WAITING > 60


def test_counts(model):
    seen = []
    prompts, mosts = some_prompts(9)
    found = list(generate_many(model, prompts, max_new_tokens=mosts, progress=lambda *counts: seen.append(counts)))
    assert seen[-1] == (9, sum(map(len, found))) and seen == sorted(seen)


def test_no_prompts_and_no_tokens(model):
    assert list(generate_many(model, [])) == []
    assert list(generate_many(model, [[1], [2]], max_new_tokens=[0, 3], eos_token_id=[]))[0] == []


@pytest.mark.parametrize("prompts, options, said", [
    ([[1], []], {}, "prompt 1: input_ids must be at least one token"),
    ([[1, 97]], {}, r"prompt 0: input_ids must be tokens in \[0, vocab_size = 97\), got 97"),
    ([[1] * 60], {}, "prompt 0: prompt [+] max_new_tokens must be at most n_positions = 64, got 60 [+] 20"),
    ([torch.zeros(1, 2, dtype=torch.int64)], {}, r"prompt 0: must have shape \(T,\), got \(1, 2\)"),
    ([torch.zeros(2)], {}, "prompt 0: input_ids must have dtype int64, got float32"),
    ([[1], [1]], dict(max_new_tokens=[3]), "prompt 1: max_new_tokens must be an integer at least 0 .* got None"),
    ([[1]], dict(batch_size=0), "batch_size must be an integer at least 1, got 0"),
    ([[1]], dict(do_sample=True, top_p=2.0), "top_p must lie in"),
])  # fmt: skip
def test_bad_input(model, prompts, options, said):
    with pytest.raises((ValueError, TypeError), match=said):
        list(generate_many(model, prompts, **options))


def test_other_models_are_refused():
    with pytest.raises(TypeError, match=r"must be a gpt2fast.GPT2, got torch.nn.*Linear; take GPT2.from_transformers"):
        generate_many(torch.nn.Linear(1, 1), [])


def test_moves_of_the_cache(model):
    ids = torch.randint(0, 97, (1, 10))
    cache, rows = model.new_cache(2, 12), [model.new_cache(1) for _ in range(2)]
    cache.starts = torch.zeros_like(cache.lengths)
    with torch.inference_mode():
        for row, count in zip(rows, (6, 10)):
            model(ids[:, :count], cache=row)
        cache.place(0, rows[0])
        cache.place(1, rows[1])  # longer: row 0 moves right
        assert cache.length == 10 and cache.starts.tolist() == [4, 0]
        cache.shift(30)
        assert cache.length == 40 <= cache.capacity and cache.starts.tolist() == [34, 30]
        cache.shift(-30)
        for keys, *singles in zip(cache.keys, rows[0].keys, rows[1].keys):
            assert torch.equal(keys[0, 4:10], singles[0][0, :6]) and torch.equal(keys[1, :10], singles[1][0, :10])
    with pytest.raises(ValueError, match="shift must keep all columns in use, got -1"):
        cache.shift(-1)
    with pytest.raises(ValueError, match="at most 64 columns fit"):
        cache.shift(60)


def run(args, capsys) -> list[dict]:
    assert cli.main(["generate", "-n", "9", "--seed", "1", *args]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_command(tmp_path, capsys, monkeypatch):
    lines = ["import os", "def main(", "class A:"]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "a.jsonl").write_text(
        "\n".join([json.dumps(lines[0]), *(json.dumps(dict(prompt=p)) for p in lines[1:])])
    )
    found = run(["--file", str(tmp_path / "a.txt"), "--jsonl"], capsys)
    assert [row["prompt"] for row in found] == lines and [row["index"] for row in found] == [0, 1, 2]
    for row in found:
        assert row["text"].startswith(row["prompt"]) and 0 < len(row["tokens"]) == row["new_tokens"] <= 9
    assert run(["--file", str(tmp_path / "a.jsonl"), "--jsonl", "--batch-size", "1"], capsys) == found
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    assert run(["--file", "-", "--jsonl"], capsys) == found
    assert cli.main(["generate", "-n", "9", "--seed", "1", "--file", str(tmp_path / "a.txt")]) == 0
    text = capsys.readouterr().out
    assert text == "".join(f"--- {row['index'] + 1}\n{row['text']}\n" for row in found)
    one = json.dumps(dict(prompt="import os", max_new_tokens=2))
    (tmp_path / "a.jsonl").write_text(f"{one}\n")
    assert run(["--file", str(tmp_path / "a.jsonl"), "--jsonl"], capsys)[0]["new_tokens"] <= 2


@pytest.mark.parametrize("name, content, more, said", [
    ("a.txt", b"", [], "must have a prompt a line, got an empty file"),
    ("a.txt", b"x\n\ny\n", [], "line 2 of .* must have a prompt, got none"),
    ("a.txt", b"x\ny\xff\n", [], "line 2 of .* must be UTF-8"),
    ("a.jsonl", b'"x"\n{"prompt": 3}\n', [], 'line 2 of .* must be a string or an object with "prompt"'),
    ("a.jsonl", b"x\n", [], "line 1 of .* must be JSON"),
    ("a.jsonl", b'{"prompt": "x", "n": 3}\n', [], "line 1 of .* only, got 'n'"),
    ("a.jsonl", b'{"prompt": "x", "max_new_tokens": -3}\n', [], "line 1 of .* an integer at least 0 .* got -3"),
    ("a.txt", b"x\n" + b"word " * 600, [], "line 2 of .* must be at most n_positions = 512"),
    ("a.txt", b"x\n", ["prompt"], "a prompt or --file must be given, got both"),
    ("a.txt", b"x\n", ["--batch-size", "0"], "batch_size must be an integer at least 1, got 0"),
    ("a.txt", b"x\n", ["--prompt-lookup", "3"], "--prompt-lookup must come with one prompt"),
])  # fmt: skip
def test_bad_input_of_the_command(tmp_path, capsys, name, content, more, said):
    (tmp_path / name).write_bytes(content)
    assert cli.main(["generate", *more, "--file", str(tmp_path / name)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(said, err), err
