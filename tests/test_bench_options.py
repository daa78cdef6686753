"""Options of ``gpt2fast bench``: modes, shapes, baselines, metrics, CSV, and two runs compared."""

import csv
import json
import re

import pytest
import torch

from gpt2fast import cli
from gpt2fast.benchmarks import compare, modes, ops, options, peak, work
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth, build
from gpt2fast.testing.inputs import reference, truth

TINY = "B=2,T=3,C=8"


@pytest.fixture(autouse=True)
def small_arrays(monkeypatch):
    """Measures the limits on small arrays, which is fast. The figures mean nothing, and no test looks at them."""
    monkeypatch.setattr(peak, "ARRAY", 4 << 20)
    monkeypatch.setattr(peak, "STEPS", 2000)


def bench(tmp_path, *options: str) -> list[dict]:
    path = tmp_path / "out.json"
    assert cli.main(["bench", *options, "--quick", "--json", str(path)]) == 0
    return json.loads(path.read_text())["rows"]


@pytest.mark.parametrize("mode", modes.MODES)
def test_modes(tmp_path, mode, capsys):
    (row,) = bench(tmp_path, "gelu", "--mode", mode, "--dtype", "float16", "--shapes", TINY)
    assert (row["mode"], row["dtype"], row["case"]) == (mode, "float16", dict(B=2, T=3, C=8))
    assert set(row["seconds"]) == {"ours", "fused", "naive"} == set(row["rounds"]) and not row["not_compared"]
    assert len(row["rounds"]["ours"]) >= 5 and all(t > 0 for t in row["rounds"]["ours"])
    tensor = 2 * 3 * 8 * 2  # bytes; the backward pass keeps x, reads dy as well and writes dx
    forward, backward = (tensor, tensor, 12 * 2 * 3 * 8), (2 * tensor, tensor, 20 * 2 * 3 * 8)
    both = tuple(map(sum, zip(forward, backward)))
    assert (row["read"], row["written"], row["flops"]) == dict(fwd=forward, bwd=backward, fwd_bwd=both)[mode]
    assert 0 < row["share"]["median"] and set(row["memory"]) == set(row["seconds"])
    assert "gelu" in capsys.readouterr().out and len(ops.cells(row)) == len(ops.HEADER)


@pytest.mark.parametrize("mode", ("bwd", "fwd_bwd"))
@pytest.mark.parametrize("name, case", [
    ("layer_norm", dict(B=2, T=3, C=40)), ("linear", dict(B=2, T=3, K=8, N=16, bias=True)),
    ("attention", dict(B=1, T=40, S=40, H=2, D=8)), ("cross_entropy", dict(R=7, V=30)),
])  # fmt: skip
def test_all_ways_compute_the_same_gradients(name, case, mode):
    """The gradient of each output is ones. The timed function returns gradients, and they equal the reference's."""
    op = OPS[name]
    args = build(op, case)

    def gradients(function, args):
        return modes.prepared(op, function, tuple(args.values()), mode)()

    wide = {n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in args.items()}
    plain, exact = gradients(op.reference, args), gradients(op.reference, wide)
    for way, function in dict(ours=op, **modes.ways(op, case)).items():
        for found, *expected in zip(gradients(function, args), plain, exact, strict=True):
            if found is not None:
                assert_close_to_truth(found, *expected, f"{way} {name}")


def test_the_wrong_gradient_is_not_timed(monkeypatch, tmp_path):
    def alternate(*args):
        raise AssertionError("a kernel that is wrong was timed")

    monkeypatch.setattr(ops, "alternate", alternate)
    monkeypatch.setattr(OPS["gelu_backward"], "fused", lambda dy, x, approximate="tanh": dy * 0.9)
    row = ops.bench_case(OPS["gelu"], dict(B=2, T=3, C=8), torch.float32, {}, None, 0.0, "bwd")
    assert "breaks the parity rule" in row["failed"]


def test_baselines(tmp_path):
    options = ("gelu", "--dtype", "float32", "--shapes", TINY, "--baselines", "compiled,reference,cpu")
    (row,) = bench(tmp_path, *options)
    assert set(row["seconds"]) == {"ours", "compiled", "reference", "cpu"} and row["best"] != "ours"


def test_a_baseline_that_an_op_lacks_is_named(tmp_path, capsys):
    options = ("sample", "--dtype", "float32", "--shapes", "B=2,T=3,V=30", "--baselines", "fused,naive")
    (row,) = bench(tmp_path, *options)
    assert set(row["seconds"]) == {"ours", "naive"} and row["not_compared"] == dict(fused="the op has none")
    assert "not compared with fused: the op has none" in capsys.readouterr().out


def test_what_baselines_compute():
    op, case = OPS["gelu"], dict(B=2, T=3, C=8)
    args = build(op, case)
    (plain,), (exact,) = reference(op, args), truth(op, args)
    for name, function in modes.ways(op, case, ["compiled", "reference", "cpu", "fused", "naive"]).items():
        assert_close_to_truth(function(*args.values()), plain, exact, name)


@pytest.mark.parametrize(
    "options, said",
    [
        (["gelu", "--baselines", "jax"], "baselines must be of fused, naive, compiled, reference, cpu.*, got 'jax'"),
        (["sample", "--mode", "bwd"], "--mode must be fwd for sample, which has no derivative"),
        (["--shapes", TINY], "--shapes must come with the names of ops, got none"),
        (["gelu", "--shapes", "B=2,T=3"], "case must say C for the shape"),
        (
            ["gelu", "--compare", "none.json"],
            "--compare must be a file that --save wrote, got none.json: .*No such file",
        ),
        (
            ["gelu", "--compare", __file__],
            "--compare must be a file that --save wrote, got .*options.py: Extra data",
        ),
    ],
)
def test_what_cannot_be_is_said(options, said, capsys):
    assert cli.main(["bench", *options, "--quick"]) == 1
    found = "".join(capsys.readouterr())
    assert re.search(said, found), found


@pytest.mark.parametrize(
    "options, said",
    [
        (["--shapes", "B2"], "argument --shapes: must be like B=8,T=128,C=768;B=1,T=1,C=768, got 'B2'"),
        (["--threads", "0"], "argument --threads: must be a number of at least 1, got '0'"),
        (
            ["--metrics", "time,joy"],
            "argument --metrics: must be of time, bandwidth, flops, limit, memory, ratio, got 'joy'",
        ),
        (["--dtype", "int8"], "argument --dtype: must be of float32, bfloat16, float16, got 'int8'"),
        (["--mode", "sideways"], "argument --mode: invalid choice: 'sideways'"),
    ],
)
def test_options_that_are_none(options, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "gelu", *options])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name, case, read, written, flops", [
    # x, weight, mean and rstd kept, dy; dx, dweight, dbias
    ("layer_norm", dict(B=2, T=3, C=40), 4 * (240 + 40 + 12 + 240), 4 * (240 + 80), 14 * 240),
    # x, weight and bias kept, dy; dx, dweight, dbias
    ("linear", dict(B=2, T=3, K=8, N=16, bias=True), 4 * (48 + 128 + 16 + 96), 4 * (48 + 128 + 16), 4 * 6 * 128),
    # q, k, v, out and lse kept, dout; dq, dk, dv
    ("attention", dict(B=1, T=4, S=4, H=2, D=8, causal=False), 4 * (5 * 64 + 8), 4 * 3 * 64, 10 * 2 * 8 * 16),
])  # fmt: skip
def test_what_a_backward_pass_moves_and_computes(name, case, read, written, flops):
    op = OPS[name]
    assert work.work_of(op, case, build(op, case), "bwd") == work.Work(read, written, flops)


def test_peak_of_memory(monkeypatch):
    """It counts what PyTorch's allocator hands out, freed or not, and the blocks of our kernels' large outputs."""
    x = torch.randn(1000)
    assert work.peak_bytes(lambda: torch.empty(1000)) == 4000
    assert work.peak_bytes(lambda: x.neg().neg()) == 8000
    assert work.peak_bytes(lambda: x.neg_()) == 0

    def one_after_the_other():
        for size in (1000, 3000, 2000):
            torch.empty(size)

    assert work.peak_bytes(one_after_the_other) == 12000
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # it takes PyTorch's memory
    large = torch.randn(9 << 18)  # 9 MiB, in a block of whole huge pages
    with torch.inference_mode():
        assert work.peak_bytes(lambda: OPS["gelu"](large)) == 10 << 20


def test_results_go_where_one_says(tmp_path, capsys):
    out, page = tmp_path / "new" / "results", tmp_path / "page.html"
    assert cli.main(["bench", "gelu", "--quick", "--shapes", TINY, "--out", str(out), "--report", str(page)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["ops.csv", "ops.json"]
    assert "gelu" in page.read_text() and json.loads((out / "ops.json").read_text())["rows"]
    assert cli.main(["bench", "gelu", "--quick", "--shapes", TINY, "--out", str(out)]) == 0
    assert "gelu" in (out / "report.html").read_text()


def test_shapes():
    found = options.parse_shapes("B=1,T=1,K=8,N=4,bias=true,activation=gelu_tanh; R=3,V=7,label_smoothing=0.1;")
    assert found == [
        dict(B=1, T=1, K=8, N=4, bias=True, activation="gelu_tanh"), dict(R=3, V=7, label_smoothing=0.1)
    ]  # fmt: skip


def test_metrics_choose_columns_and_csv_has_numbers(tmp_path, capsys):
    path = tmp_path / "out.csv"
    bench(tmp_path, "gelu", "--shapes", TINY, "--metrics", "time", "--csv", str(path))
    header = next(line for line in capsys.readouterr().out.splitlines() if "ours µs" in line)
    assert "vs torch" not in header and "GB/s" not in header
    rows = list(csv.DictReader(path.open()))
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    for row in rows:
        assert row["op"] == "gelu" and row["mode"] == "fwd" and not row["failed"]
        for name in ("seconds ours", "seconds fused", "ratio fused", "bytes_per_second", "share"):
            assert float(row[name]) > 0


def results(ours: list[float], **other) -> dict:
    seconds = dict(ours=dict(median=sorted(ours)[len(ours) // 2]))
    rounds = dict(ours=ours, fused=[2.0 + 0.01 * i for i in range(len(ours))])
    row = dict(op="gelu", label="B1", dtype="float32", mode="fwd", seconds=seconds, best="fused", rounds=rounds)
    return dict(rows=[row | other])


def test_two_runs_compared():
    noise = [0.01 * (i % 5) for i in range(21)]
    before = results([1 + x for x in noise])
    for after, said in (
        (results([0.5 + x for x in noise]), "faster"),
        (results([1.001 + x for x in noise[::-1]]), "as before"),
        (results([1.3 + x for x in noise]), "slower"),
    ):
        (found,) = compare.compare(before, after)
        assert found["verdict"] == said and found["low"] <= found["change"] <= found["high"], found
        assert len(compare.cells(found)) == len(compare.HEADER)
        assert compare.compare(before, after) == [found]  # the resampling has a fixed seed
    twice = results([2 * (1 + x) for x in noise])  # a machine half as fast: PyTorch takes twice as long too
    twice["rows"][0]["rounds"]["fused"] = [2 * t for t in before["rows"][0]["rounds"]["fused"]]
    assert compare.compare(before, twice)[0]["verdict"] == "as before"
    assert not compare.compare(before, results([1.0] * 5, mode="bwd"))
    assert not compare.compare(before, dict(rows=[dict(op="gelu", label="B1", dtype="float32", failed="parity")]))


def test_a_run_is_compared_with_one_that_was_saved(tmp_path, capsys):
    options = ["bench", "gelu", "--dtype", "float32", "--shapes", TINY, "--quick"]
    saved = str(tmp_path / "saved.json")
    assert cli.main([*options, "--save", saved]) == 0 and cli.main([*options, "--compare", saved]) == 0
    out = capsys.readouterr().out
    assert f"Since {saved}: 1 rows that both have" in out
    assert any(word in out for word in ("faster", "slower", "as before"))
