"""The benchmarks: a wrong kernel is not timed, the ways that are compared agree, and results are complete."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import name_of

from gpt2fast.benchmarks import __main__ as everything
from gpt2fast.benchmarks import cases, generate, kernel_page, ops, output, parity, peak, report
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth, build, inputs, work

ROOT = Path(__file__).parent.parent
HALF = "gpt2fast_test::half"


@pytest.fixture
def small_arrays(monkeypatch):
    """Measures the limits on small arrays, which is fast. The figures mean nothing, and no test looks at them."""
    monkeypatch.setattr(peak, "ARRAY", 4 << 20)
    monkeypatch.setattr(peak, "STEPS", 2000)


@pytest.fixture
def never_timed(monkeypatch):
    def alternate(*args):
        raise AssertionError("a kernel that is wrong was timed")

    monkeypatch.setattr(ops, "alternate", alternate)


def refuse(x):
    raise ValueError("no such shape")


@pytest.mark.parametrize("kernel, message", [
    (lambda x: 0.51 * x, "half y: breaks the parity rule"),
    (lambda x: (0.5 * x).double(), "half y: dtype torch.float64, expected torch.float32"),
    (refuse, "no such shape"),
])  # fmt: skip
def test_a_wrong_kernel_is_not_timed(half, never_timed, kernel, message):
    half.body = kernel
    row = ops.bench_case(half, half.cases[0], torch.float32, {}, None, 0.0)
    assert row["failed"].startswith(message) and not {"seconds", "ratio", "share"} & set(row)
    assert ops.cells(row)[-2:] == ["FAILED", "parity"] and len(ops.cells(row)) == len(ops.HEADER)


def test_a_wrong_kernel_does_not_end_the_run(half, small_arrays, tmp_path, capsys):
    right = half.body
    half.body = lambda x: refuse(x) if x.dtype == torch.float32 else right(x)
    path = tmp_path / "results" / "ops.json"
    assert ops.main([HALF, "--quick", "--json", str(path)]) == 1
    rows = json.loads(path.read_text())["rows"]
    assert [(row["dtype"], "failed" in row) for row in rows] == [("float32", True), ("bfloat16", False)] * 2
    assert "half B1·T1·C2 float32: no such shape" in capsys.readouterr().out


@pytest.fixture
def results(half, small_arrays, tmp_path, capsys) -> list[str]:
    """The JSON of tiny runs: two ops, one row of which failed, and a model of one layer."""
    right = half.body
    half.body = lambda x: right(x) if len(x) == 2 or x.dtype == torch.float32 else 0.51 * x
    found = [str(tmp_path / name) for name in ("ops.json", "generate.json")]
    assert ops.main([HALF, "--quick", "--json", found[0]]) == 1
    tiny = dict(n_layer=1, n_embd=64, n_head=1)
    results = generate.run(["float32"], ["1x32"], ["native", "drop-in", "sdpa"], 0, False, training=["2x16"], **tiny)
    output.write(results, found[1])
    capsys.readouterr()
    return found


def test_results_hold_times_ratios_and_the_limits_of_the_same_run(results):
    found, model = (json.loads(Path(path).read_text()) for path in results)
    for peaks in (found["peaks"], model["peaks"]):
        limits = next(iter(peaks.values()))
        assert set(limits) == {f"{w} {p}" for w in peak.BANDWIDTHS for p in peak.PAGES} | set(peak.RATES)
        assert all(value > 0 for value in limits.values())
    assert found["machine"]["threads"] == torch.get_num_threads() and found["machine"]["isa"]
    timed = [row for row in found["rows"] if "failed" not in row]
    assert len(found["rows"]) == 4 and len(timed) == 3
    for row in timed:
        ours, best = row["seconds"]["ours"], row["seconds"][row["best"]]
        assert set(row["seconds"]) == {"ours", "fused", "naive"} and row["best"] in ("fused", "naive")
        assert 0 < ours["q10"] <= ours["median"] <= ours["q90"]
        elements, size = row["case"]["B"] * row["case"]["T"] * row["case"]["C"], 4 if row["dtype"] == "float32" else 2
        assert row["read"] == row["written"] == elements * size
        assert row["bytes_per_second"] == pytest.approx(2 * elements * size / ours["median"])
        assert best["median"] == min(row["seconds"][name]["median"] for name in ("fused", "naive"))
        assert 0 < row["ratio"]["q10"] <= row["ratio"]["median"] <= row["ratio"]["q90"]
    prefill, decode, training = model["rows"]
    assert [row["what"] for row in model["rows"]] == ["prefill", "decode", "training step"]
    assert prefill["rate"]["native"] == pytest.approx(32 / prefill["seconds"]["native"]["median"])
    assert set(decode["ratio"]) == {"native", "drop-in"} and decode["share"]["native"]["median"] > 0
    assert training["case"] == "2x16" and set(training["seconds"]) == {"drop-in", "sdpa"}


def test_limits_on_one_thread_and_on_all(small_arrays, capsys):
    before = torch.get_num_threads()
    assert peak.main(["--json", "--threads", "2"]) == 0
    found = json.loads(capsys.readouterr().out)["peaks"]
    assert list(found) == ["1", "2"] and torch.get_num_threads() == before
    header, rows = peak.table(found)
    assert header == ["limit", "1 thread", "2 threads"] and len(rows) == 8
    best = peak.limits(found, 2)
    assert best["read"] == max(value for name, value in found["2"].items() if name.startswith("read"))
    assert best["copy"] == max(value for name, value in found["2"].items() if name.startswith(("copy", "stream")))


def test_report_tabulates_them(results, tmp_path, capsys):
    out = tmp_path / "made" / "here"
    assert report.main([*results, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"
    page = (out / "report.html").read_text(encoding="utf-8")
    for text in (
        "half",
        "B2·<wbr>T3·<wbr>C5",
        "parity failed",
        "memory, reading",
        "decode, batch of 1, after 32 tokens",
        "drop-in: training step, batch of 2, 16 tokens",
    ):
        assert text in page, text
    assert report.main([results[0], "--markdown"]) == 0
    assert "| half | B2·T3·C5 | float32 |" in capsys.readouterr().out


def test_make_bench_times_all_by_pytest_benchmark_too(small_arrays, monkeypatch, tmp_path):
    """Every part is called with its file in the folder. test_ops_bench.py itself runs below, on one case."""
    calls = []
    for part in (ops, parity, generate, report):
        monkeypatch.setattr(part, "main", lambda argv, part=part: calls.append((part, argv)) or 0)
    monkeypatch.setattr(pytest, "main", lambda argv: calls.append((pytest, argv)) or 2)
    assert everything.main(["--quick", "--out", str(tmp_path)]) == 2
    files = [str(tmp_path / name) for name in ("ops.json", "parity.json", "generate.json")]
    assert [part for part, _ in calls] == [ops, pytest, parity, generate, report]
    assert [calls[i][1][-1] for i in (0, 2, 3)] == files and calls[4][1] == files
    assert f"--benchmark-json={tmp_path / 'pytest-benchmark.json'}" in calls[1][1]
    assert Path(calls[1][1][0]) == Path(everything.__file__).parent / "test_ops_bench.py"
    command = ["make", "--no-print-directory", "-n", "bench"]  # the tests may themselves run under make
    recipe = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "-m benchmarks" in recipe.splitlines()[-1]


def test_all_that_is_not_installed_is_named_before_anything_is_measured(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    lost = ("pytest_benchmark", "transformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in lost else found(name))
    with pytest.raises(SystemExit, match=r"pytest_benchmark, transformers are not: pip install 'gpt2fast\[bench\]'"):
        everything.main(["--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_pytest_benchmark_runs_a_case(tmp_path):
    path = tmp_path / "pytest-benchmark.json"
    flags = ["--benchmark-only", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1", f"--benchmark-json={path}"]
    test = "benchmarks/test_ops_bench.py::test_op[layer_norm B1-T1-C768 float32 {}]"
    command = [sys.executable, "-m", "pytest", "-q", *flags, *map(test.format, ("ours", "fused", "naive"))]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())["benchmarks"]
    names = {name: b["stats"]["median"] for b in found for name in [b["name"].rsplit(" ", 1)[1].rstrip("]")]}
    assert set(names) == {"ours", "fused", "naive"} and all(seconds > 0 for seconds in names.values())


def rival_cases() -> list:
    return [
        pytest.param(op, case, id=f"{op.name}-{name_of(case)}")
        for op in OPS.values()
        if cases.rivals(op) and op.name != "sample"
        for case in [*op.cases, *cases.MORE.get(op.name, [])]
        if 0 not in (case.get("B"), case.get("R")) and work(op, case) < 50_000_000 and not case.get("dropout_p")
    ]


@pytest.mark.parametrize("op, case", rival_cases())
def test_the_ways_compared_compute_the_same(op, case):
    args = build(op, case)
    plain, exact = inputs.reference(op, args), inputs.truth(op, args)
    count = len(plain) if op.mutates else len(op.returns)
    for name, function in cases.rivals(op, case).items():
        found = inputs.outputs_of(op, lambda f=function, **given: f(*given.values()), args)
        for a, b, c in zip(found[:count], plain[:count], exact[:count], strict=True):  # fused: also backward's needs
            a = a.nan_to_num(0)  # PyTorch gives NaN for a row that sees nothing
            assert_close_to_truth(a, b, c, name)


def test_every_kernel_is_compared_with_both_ways():
    found = {op.name: set(cases.rivals(op)) for op in cases.bench_ops([])}
    assert found.pop("sample") == {"naive"}  # PyTorch has no fused one
    assert set(map(frozenset, found.values())) == {frozenset({"fused", "naive"})}, found
    batches = {op.name for op in cases.bench_ops([]) if any(c.get("T") == 1023 for c in cases.bench_cases(op))}
    assert batches == {"embedding", "layer_norm", "add_layer_norm", "gelu", "bias_gelu", "linear"}


def test_an_op_without_a_kernel_or_rival_says_so(capsys, monkeypatch):
    from gpt2fast import cli

    assert cli.main(["bench", "gelu", "gelu_backward"]) == 1
    out, err = capsys.readouterr()
    message = "gpt2fast bench: gelu_backward has no kernel of ours, PyTorch's fused way runs; kernels: gelu"
    assert out == "" and err.startswith(message)
    for rival in ("fused", "baseline", "naive"):
        monkeypatch.setattr(OPS["gelu"], rival, None)
    assert cli.main(["bench", "gelu"]) == 1
    out, err = capsys.readouterr()
    message = "gpt2fast bench: gelu declares no fused=, baseline= or naive= to compare with; those that do: "
    assert out == "" and err.startswith(message) and "layer_norm" in err


@pytest.mark.parametrize("main", (ops.main, generate.main), ids=("ops", "generate"))
def test_json_that_cannot_be_written_is_refused_first(main, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peak, "measure", lambda *a, **k: pytest.fail("something was measured"))
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "x.json"):
        with pytest.raises(SystemExit, match="2"):
            main(["--json", str(path)])
        assert "argument --json: cannot write" in capsys.readouterr().err
    for part in (everything.main, lambda argv: report.main(["x.json", *argv])):
        with pytest.raises(SystemExit, match="2"):
            part(["--out", str(tmp_path / "file")])
        assert "argument --out: cannot write into" in capsys.readouterr().err


def test_bench_runs_as_installed_and_from_any_folder(tmp_path):
    """The files of a wheel in another place, and a folder that is not the repository."""
    lib = tmp_path / "lib"
    copy = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(lib)]
    subprocess.run(copy, cwd=ROOT, check=True, capture_output=True)
    for extension in (ROOT / "gpt2fast").glob("_C*.so"):
        (lib / "gpt2fast" / extension.name).symlink_to(extension)
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(lib)!r})
        import gpt2fast.benchmarks.ops
        from gpt2fast import cli
        from gpt2fast.benchmarks import page, peak
        assert (page.HERE / "page.css").is_file() and (page.HERE / "page.js").is_file()
        assert gpt2fast.benchmarks.ops.__file__.startswith({str(lib)!r}), gpt2fast.benchmarks.ops.__file__
        peak.ARRAY, peak.STEPS = 4 << 20, 2000
        gpt2fast.benchmarks.cases.bench_cases = lambda op: [dict(B=2, T=3, C=5, approximate="tanh")]
        sys.exit(cli.main(["bench", "gelu", "--json", "--report", "page.html"]))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row["dtype"] for row in json.loads(done.stdout)["rows"]] == ["float32", "bfloat16"]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for architecture, counted in kernel_page.read().items():
        assert f"<h3>Architecture {architecture}</h3>" in page
        assert page.count(f'data-architecture="{architecture}"') == len(counted) > 100
