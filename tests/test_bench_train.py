"""The training step among the benchmarks: what a row holds, and that a wrong drop-in is not timed."""

import itertools
import json

import pytest
import torch
import transformers

import gpt2fast
from gpt2fast.benchmarks import generate, peak, readme, train
from gpt2fast.testing import assert_close_to_truth

TINY = dict(n_layer=1, n_embd=64, n_head=1, vocab_size=101, n_positions=32)


@pytest.fixture
def checkpoint(tmp_path):
    def make(dtype: str):
        generate.make_checkpoint(tmp_path, dtype, **TINY)
        return tmp_path

    return make


@pytest.mark.parametrize("dtype", generate.DTYPES)
def test_a_row(checkpoint, dtype, monkeypatch):
    """Both sides run the same number of steps, in turn, on models of the right kind and with the same optimizer."""
    steps, step = [], train.step

    def watched(model, optimizer, ids):
        before = model.lm_head.weight.detach().clone()
        step(model, optimizer, ids)
        assert not torch.equal(model.lm_head.weight, before) and model.training
        assert all(p.grad is None and p.dtype == generate.DTYPES[dtype] for p in model.parameters())
        steps.append((type(model), type(optimizer), optimizer.defaults, tuple(ids.shape)))

    monkeypatch.setattr(train, "step", watched)
    row = train.run_case(checkpoint(dtype), "2x16", dtype, 0, rounds=(3, 9))
    assert (row["what"], row["case"], row["dtype"], row["rounds"]) == ("training step", "2x16", dtype, 3)
    assert set(row["seconds"]) == set(row["rate"]) == {"drop-in", "sdpa"} and set(row["ratio"]) == {"drop-in"}
    for name, found in row["seconds"].items():
        assert 0 < found["q10"] <= found["median"] <= found["q90"]
        assert row["rate"][name] == pytest.approx(2 * 16 / found["median"])
    assert 0 < row["ratio"]["drop-in"]["q10"] <= row["ratio"]["drop-in"]["q90"]
    ours = [ours for ours, _ in itertools.groupby(issubclass(kind, gpt2fast.GPT2LMHeadModel) for kind, *_ in steps)]
    assert ours == [True, False, True, False, True, False, True]  # to warm up, then 2 + 3 rounds: who was last begins
    assert all(issubclass(kind, transformers.GPT2LMHeadModel) for kind, *_ in steps)
    assert {(optimizer, shape) for _, optimizer, _, shape in steps} == {(torch.optim.AdamW, (2, 16))}
    assert all(defaults == steps[0][2] and defaults["fused"] for _, _, defaults, _ in steps)
    assert len(generate.cells(row)) == len(generate.HEADER)


def wrong_loss(model):
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1.5)
    return model


def wrong_gradient(model):
    model.transformer.h[0].ln_1.bias.register_hook(lambda grad: 1.5 * grad)
    return model


@pytest.mark.parametrize("dtype", generate.DTYPES)
@pytest.mark.parametrize("break_it, message", [
    (wrong_loss, "loss: breaks the parity rule"),
    (wrong_gradient, "gradient of transformer.h.0.ln_1.bias: breaks the parity rule"),
])  # fmt: skip
def test_a_wrong_drop_in_is_not_timed(checkpoint, monkeypatch, dtype, break_it, message):
    optimize = gpt2fast.optimize
    monkeypatch.setattr(gpt2fast, "optimize", lambda model: break_it(optimize(model)))
    monkeypatch.setattr(train, "alternate", lambda *a, **k: pytest.fail("a drop-in that is wrong was timed"))
    row = train.run_case(checkpoint(dtype), "2x16", dtype, 0)
    assert set(row) == {"case", "dtype", "what", "failed"} and row["failed"].startswith(message)
    cells = generate.cells(row)
    assert cells[:3] == ["batch 2, 16 tokens", dtype, "training step"] and cells[-2:] == ["FAILED", "parity"]
    assert len(cells) == len(generate.HEADER)


def test_the_losses_that_are_compared_are_of_draws_that_differ(checkpoint, monkeypatch):
    seen = []

    def watched(actual, plain, truth, what):
        seen.append((what, actual.numel(), actual.unique().numel()))
        assert_close_to_truth(actual, plain, truth, what)

    monkeypatch.setattr(train, "assert_close_to_truth", watched)
    folder = checkpoint("float32")
    plain, exact = (train.load(folder, dtype) for dtype in (torch.float32, torch.float64))
    train.assert_right(gpt2fast.optimize(train.load(folder, torch.float32)), plain, exact, 2, 16)
    parameters = [name for name, _ in plain.named_parameters()]
    assert seen[0] == ("loss", train.DRAWS, train.DRAWS)
    assert [what for what, *_ in seen[1:]] == [f"gradient of {name}" for name in parameters]
    assert all(p.grad is None for p in [*plain.parameters(), *exact.parameters()])


@pytest.mark.parametrize("options, dtypes, cases", [
    (["--cases", ""], ["float32", "bfloat16"], ["2x256"]),
    (["--quick", "--cases", "", "--dtype", "float32"], ["float32"], ["2x64"]),
    (["--cases", "", "--train", "1x8,2x16", "--dtype", "bfloat16"], ["bfloat16"], ["1x8", "2x16"]),
    (["--cases", "", "--train", ""], ["float32", "bfloat16"], []),
])  # fmt: skip
def test_which_steps_the_command_times(options, dtypes, cases, monkeypatch, tmp_path, capsys):
    """A row for each case and dtype in the JSON, and the exit status tells whether one failed."""
    monkeypatch.setattr(peak, "ARRAY", 4 << 20)
    monkeypatch.setattr(peak, "STEPS", 2000)
    make, bad = generate.make_checkpoint, "2x16"
    monkeypatch.setattr(generate, "make_checkpoint", lambda folder, dtype, **_: make(folder, dtype, **TINY))
    monkeypatch.setattr(generate, "run_case", lambda *args: [])

    def run_case(folder, case, dtype, seconds):
        row = dict(case=case, dtype=dtype, what="training step")
        found = dict(median=1.0, q10=0.9, q90=1.1)
        timed = dict(best="sdpa", seconds={"drop-in": found}, rate={}, ratio={"drop-in": found})
        return row | (dict(failed="loss: breaks the parity rule") if case == bad else timed)

    monkeypatch.setattr(train, "run_case", run_case)
    path = tmp_path / "generate.json"
    assert generate.main([*options, "--no-fresh", "--json", str(path)]) == int(bad in cases)
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    assert [(row["dtype"], row["case"]) for row in rows] == [(dtype, case) for dtype in dtypes for case in cases]
    out, err = capsys.readouterr()
    assert ("training step 2x16 bfloat16: loss: breaks the parity rule" in out) == (bad in cases)
    assert err.count("training step") == len(rows)


@pytest.mark.parametrize("options, cases, training", [
    ([], generate.CASES, train.CASES),
    (["--quick"], generate.QUICK, train.QUICK),
    (["--quick", "--cases", "8x32"], ["8x32"], train.QUICK),
    (["--quick", "--train", "1x32"], generate.QUICK, ["1x32"]),
])  # fmt: skip
def test_quick_has_fewer_cases_where_none_are_named(options, cases, training, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(generate, "run", lambda *args: given.append(args) or dict(rows=[]))
    assert generate.main([*options, "--json"]) == 0
    assert [(args[1], args[-1]) for args in given] == [(cases, training)]


@pytest.mark.parametrize("text", ["2", "0x8", "2x1", "2x1025", "2x8x8", "x8", "2x256,ax8"])
def test_a_wrong_case_is_named(text, monkeypatch, capsys):
    monkeypatch.setattr(generate, "run", lambda *a, **k: pytest.fail("something was measured"))
    with pytest.raises(SystemExit, match="2"):
        generate.main(["--train", text])
    wrong = text.split(",")[-1]
    assert f"must be like 2x256, batch x 2 to 1024 tokens; got {wrong!r}" in capsys.readouterr().err


def test_the_readme_has_a_row_for_it_once_it_is_published():
    rows = [dict(what="training step", case="2x256", dtype="float32",
                 ratio={"drop-in": dict(median=1.5, q10=1.4, q90=1.6)})]  # fmt: skip
    assert (
        readme.model_table(rows).splitlines()[-1]
        == "| training step on 256, batch 2 | – | 1.50 × (1.40–1.60) | – | – |"
    )
