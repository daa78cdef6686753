"""benchmarks.peers: every engine's tokens are judged before it is timed, and the engines take turns."""

import json
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from gpt2fast.benchmarks import peer_engines, peer_onnx, peer_process, peers
from gpt2fast.benchmarks.peer_agreement import Judge, refusal, share

FEW = dict(decode=(1, 12, 6), batch=(2, 9, 4), prefill=(1, 20, 1))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return peers.make_checkpoint(tmp_path_factory.mktemp("peers"), "tiny")


@pytest.fixture(scope="module")
def judge(checkpoint):
    return Judge(checkpoint)


class Liar(peer_engines.Transformers):
    """transformers, but its third new token is one too high. In bfloat16, it chooses by the prompt's length."""

    name = "liar"

    def decode(self, tokens, new):
        if self.width == "bfloat16":
            return [[len(row) + i for i in range(new)] for row in tokens]
        found = super().decode(tokens, new)
        return [[token + (i == 2) for i, token in enumerate(row)] for row in found]


class Absent(peer_engines.Engine):
    name = "absent"
    modules = {"no-such-package": "no_such_module", "torch": "torch"}


class Single(peer_engines.Transformers):
    name = "single"
    batches = False


def test_the_whole_way(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "WORK", FEW)
    monkeypatch.setattr(peers, "PAUSE", 0)
    out = tmp_path / "peers.json"
    order, clock = [], peer_process.Process.clock

    def watched(self, tokens, new):
        order.append(self.name)
        return clock(self, tokens, new)

    monkeypatch.setattr(peer_process.Process, "clock", watched)
    command = ["--size", "tiny", "--rounds", "2", "--widths", "float32,bfloat16", "--out", str(out)]
    assert peers.main([*command, "--engines", "gpt2fast,transformers", "--work", "decode,batch,prefill"]) == 0
    found = json.loads(out.read_text())
    assert found["kind"] == "peers" and found["machine"]["threads"] and found["versions"]["transformers"]
    assert [(row["case"], row["dtype"], row["what"]) for row in found["rows"]] == [
        (case, dtype, what)
        for dtype in ("float32", "bfloat16")
        for case, what in (("1x12", "decode"), ("2x9", "decode"), ("1x20", "prefill"))
    ]
    both = ["transformers", "gpt2fast"]
    assert order == 6 * (both + both[::-1])  # every second round begins with the other one
    for row in found["rows"]:
        assert row["rounds"] == 2 and set(row["seconds"]) == set(both) and set(row["ratio"]) == {"transformers"}
        B, P = map(int, row["case"].split("x"))
        work = B * P if row["what"] == "prefill" else B * (row["new"] - 1)
        for name, turns in row["figures"].items():
            times = sorted(turn["seconds"][row["what"]] for turn in turns)
            assert row["rate"][name] == pytest.approx(work / (sum(times) / 2)) and times[0] > 0
            assert all(len(turn["read"]) == 2 and min(turn["read"]) > 0 for turn in turns)
            agreement = row["agreement"][name]
            assert agreement["tokens"] == B * row["new"]
            if row["dtype"] == "float32":
                assert agreement["same"] + len(agreement["near_ties"]) == agreement["tokens"]
        assert ("share" in row) == (row["what"] == "decode")
    printed = capsys.readouterr().out
    assert "threads for every engine" in printed and "batch 2, after 9" in printed


def test_an_engine_that_lies_is_not_timed(checkpoint, judge, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "WORK", FEW)
    monkeypatch.setattr(peers, "PAUSE", 0)
    kinds = [Liar, peer_engines.Transformers]
    found = peers.run(kinds, ["float32", "bfloat16"], ["decode"], str(checkpoint), 1, tmp_path)
    row, narrow = found["rows"]
    for each in (row, narrow):
        heights = [each["agreement"][name]["height"] for name in ("liar", "transformers")]
        assert heights[0] < heights[1] <= 1 and heights[1] > 0.9
    assert set(narrow["seconds"]) == {"transformers"} and "of all tokens agree" in narrow["refused"]["liar"]
    assert set(row["seconds"]) == {"transformers"} and set(row["refused"]) == {"liar"}
    first = row["agreement"]["liar"]["first_difference"]
    assert (first["row"], first["token"], first["got"]) == (0, 2, first["expected"] + 1)
    assert first["gap"] > first["near_tie_below"] > 0
    assert "new token 2" in row["refused"]["liar"] and "FAILED" in peers.cells(row)[-1]
    assert any("liar: not timed" in note for note in peers.notes(found))


def test_one_wrong_row_is_enough(judge, checkpoint):
    """A narrow engine whose other rows are right is not timed either; a few other choices are no reason."""
    engine = peer_engines.Transformers("float32", 1)
    engine.build(checkpoint, checkpoint)
    tokens, new = peers.make_prompts("batch", judge.config)
    right = engine.decode(tokens, new)
    assert not refusal(judge(tokens, right, new), exact=False)
    other = [[*right[0][:-1], (right[0][-1] + 1) % judge.config["vocab_size"]], *right[1:]]
    found = judge(tokens, other, new)
    assert found["same"] == found["tokens"] - 1 and not refusal(found, exact=False) and refusal(found, exact=True)
    wrong = [*right[:-1], list(range(new))]
    assert "row 7" in refusal(judge(tokens, wrong, new), exact=False)


def test_absent_engines_are_listed_once(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "WORK", FEW)
    found = peers.run([Absent, Single], ["float32", "bfloat16"], ["batch"], str(checkpoint), 1, tmp_path)
    assert found["absent"]["float32"] == {"absent": "not installed: pip install no-such-package"}
    assert [note for note in peers.notes(found) if note.startswith("absent")] == [
        "absent: not installed: pip install no-such-package"
    ]
    assert all(row["refused"] == {"single": "takes one row at a time"} for row in found["rows"])
    assert "no_such_module" not in sys.modules


def test_tokens_vary(judge, checkpoint):
    """A model that repeats one token would agree with almost any engine."""
    engine = peer_engines.Transformers("float32", 1)
    engine.build(checkpoint, checkpoint)
    tokens, new = peers.make_prompts("decode", judge.config)
    (row,) = engine.decode(tokens, new)
    assert len(set(row)) > new / 2


def test_malformed_tokens(judge):
    tokens = [[1, 2, 3]]
    short = judge(tokens, [[4]], 2)
    assert "expected 1 rows of 2 tokens" in refusal(short, exact=False) and share(short) == 0
    assert "expected tokens below 1003, got 1003" in refusal(judge(tokens, [[4, 1003]], 2), exact=False)


def test_an_error_of_an_engine_is_its_own(checkpoint, tmp_path):
    found, absent = peers.start([peer_engines.Transformers], "float32", 1, tmp_path / "no", tmp_path)
    assert not found and "could not load the model" in absent["transformers"]


@pytest.mark.parametrize("bits", [8, 4])
def test_onnx_integers(bits):
    """Each integer is the nearest one; the largest of a block is exact unless it is clipped from above."""
    weight = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    weight[:32, 4] = 0
    integers, scales = peer_onnx.quantise(weight, bits)
    assert integers.dtype == np.uint8 and integers.shape == (5, 2, 4 * bits) and scales.shape == (10,)
    if bits == 4:
        integers = np.stack([integers & 15, integers >> 4], -1).reshape(5, 2, 32)
    scales = scales.reshape(5, 2, 1)
    back = ((integers.astype(np.float32) - 2 ** (bits - 1)) * scales).reshape(5, 64).T
    error, step = np.abs(back - weight), np.abs(np.repeat(scales, 32, 2).reshape(5, 64).T)
    most = integers.reshape(5, 64).T == 2**bits - 1  # may be clipped by up to a whole step
    assert (error <= step * np.where(most, 1, 0.5) * (1 + 1e-6)).all() and not back[:32, 4].any()


def test_the_extra_has_every_package():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    extra = " ".join(extras["peers"] + extras["transformers"] + extras["text"])
    needed = {p for kind in peers.KINDS for more in [kind.modules, *kind.extra.values()] for p in more}
    assert [package for package in needed if package not in extra] == []


@pytest.mark.parametrize(
    "options, message",
    [
        (["--engines", "vllm"], "must be of"),
        (["--widths", "int2"], "must be of float32, bfloat16, int8, int4, got 'int2'"),
        (["--work", "train"], "must be of decode, long, batch, prefill"),
        (["--rounds", "0"], "at least 1"),
        (["--size", "huge"], "--size must be 124M, tiny or a folder"),
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit):
        peers.main(options)
    assert message in capsys.readouterr().err
