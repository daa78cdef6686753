"""The page of results: what its numbers, bars and drawings say, and what it refuses to read."""

import json
import re
from pathlib import Path

import pytest

import gpt2fast.ops  # noqa: F401  declares them
from gpt2fast.benchmarks import drawings, figures, kernel_page, page_gpu, page_tables, parity, report, units
from gpt2fast.op import OPS
from gpt2fast.testing.check import run_check

ROOT = Path(__file__).parent.parent
H100 = ROOT / "benchmarks/published/h100.json"


def spread(median: float) -> dict:
    return dict(median=median, q10=median * 0.9, q90=median * 1.2)


def op_row(op: str, dtype: str, ours: float, flops: float, moved: int, label: str = "B1·T1024·C768", **others) -> dict:
    """A row as benchmarks.ops writes it, from the seconds of our way and of other ways."""
    others = others or dict(fused=3 * ours, naive=5 * ours)
    ratios = {name: spread(seconds / ours) for name, seconds in others.items()}
    best = min(others, key=others.get)
    return dict(
        op=op, case={}, label=label, dtype=dtype, mode="fwd", not_compared={}, best=best, outside_cache=True,
        seconds={name: spread(s) for name, s in dict(ours=ours, **others).items()}, ratio=ratios[best], ratios=ratios,
        read=moved // 2, written=moved // 2, flops=flops, bytes_per_second=moved / ours, flops_per_second=flops / ours,
        bound="copy", pace={}, share=spread(0.7), torch_share=spread(0.3),
    )  # fmt: skip


def op_results() -> dict:
    """Many ops whose points crowd below one roof, and a row of each kind that has no bar."""
    peaks = {f"{what} {pages}": 4e10 for what in ("read", "copy", "stream") for pages in ("4 KiB", "2 MiB")}
    peaks |= {"stream 2 MiB": 5.27e10, "fma": 2.32e11, "dot": 4.67e11}
    rows = []
    for i, op in enumerate(op.name for op in OPS.values() if op.namespace == "gpt2fast"):
        for j, dtype in enumerate(("float32", "bfloat16")):
            moved, intensity = 4_000_000, (0.5 + 0.4 * i) * (j + 1) * (90 if op.startswith("linear") else 1)
            seconds = max(moved / 3e10, moved * intensity / 2e11)
            rows.append(op_row(op, dtype, seconds, moved * intensity, moved, f"B4·T1024·C768 case={i}"))
    rows.append(op_row("sample", "float32", 1e-5, 0, 4096, naive=3e-5))
    rows.append(dict(op="gelu", case={}, label="B1", dtype="float32", mode="fwd", failed="breaks the parity rule"))
    rows[0]["memory"] = dict(ours=12_600_000, fused=25_200_000)
    slow = op_row("gelu", "float16", 2.5e-6, 100.0, 64, "B1·T1·C16", fused=1e-6, compiled=2e-6, reference=1e-9)
    rows.append(slow)
    backward = op_row("layer_norm", "float32", 4e-4, 1, 1) | dict(mode="bwd")
    rows.append({k: v for k, v in backward.items() if k not in ("read", "written", "flops", "share", "bound")})
    rows[-1] |= dict(bytes_per_second=None, flops_per_second=None)
    machine = dict(cpu="A processor", isa="avx2", threads=2, torch="2.13.0", python="3.12.1", system="Linux x86_64")
    return dict(kind="ops", machine=machine, peaks={"2": peaks}, rows=rows)


def model_results() -> dict:
    ops, rows = op_results(), []
    for what, case in (("prefill", "1x512"), ("decode", "8x32")):
        seconds = {"native": spread(0.1), "drop-in": spread(0.12), "sdpa": spread(0.3)}
        rows.append(dict(case=case, dtype="float32", what=what, rounds=3, best="sdpa", seconds=seconds,
                         rate={n: 512 / s["median"] for n, s in seconds.items()},
                         ratio={"native": spread(3.0), "drop-in": spread(2.5)}))  # fmt: skip
    rows[1]["share"] = {"native": spread(0.6)}
    seconds = {"drop-in": spread(2.0), "sdpa": spread(3.0)}
    training = dict(case="2x256", dtype="bfloat16", what="training step")
    rows.append(training | dict(rounds=3, best="sdpa", seconds=seconds, ratio={"drop-in": spread(1.5)},
                                rate={n: 512 / s["median"] for n, s in seconds.items()}))  # fmt: skip
    rows.append(training | dict(dtype="float32", failed="loss: breaks the parity rule (rms 1)"))
    fresh = dict(weights=497759232, memory=1.04, start=1.2, bare_seconds=1.1, native_seconds=1.3)
    return dict(kind="generate", machine=ops["machine"], peaks=ops["peaks"], rows=rows, fresh=fresh)


def parity_results() -> dict:
    row = dict(op="gelu", label="B1·T1·C3072", dtype="float32", output="y", rms=1e-7, plain_rms=2e-7, rms_bound=6e-7,
               max=3e-6, plain_max=2e-6, max_bound=8e-6, fits=1.0, keeps=True)  # fmt: skip
    return dict(kind="parity", machine=op_results()["machine"], rows=[row])


def all_results() -> dict[str, dict]:
    gpu = json.loads(H100.read_text())
    run = dict(case=dict(B=1), dtype="float32", target="cpu:avx2", layout="contiguous", error=None)
    rows = [run, run | dict(error="y: breaks the parity rule"), dict(target="cuda:ptx", error=None, missing="no nvcc"),
            dict(check="gelu compile", promise="compile", error=None)]  # fmt: skip
    check = dict(kind="check", ops={"gpt2fast::gelu": rows})
    return dict(ops=op_results(), generate=model_results(), parity=parity_results(), check=check, gpu=gpu)


@pytest.mark.parametrize("value, text", [
    (1.864e4, "18\u202f600"), (2.588, "2.59"), (15.94, "15.9"), (0.0231, "0.0231"), (9.996, "10.0"), (0, "0"),
    (999.6, "1\u202f000"), (1e-7, "<0.001"), (None, "–"), (float("nan"), "–"), (-2.5, "-2.50"),
])  # fmt: skip
def test_numbers_have_three_digits_and_no_exponent(value, text):
    assert units.number(value) == text


@pytest.mark.parametrize("value, unit, text", [
    (1.24e-5, "s", "12.4\u00a0µs"), (0.9996, "s", "1.00\u00a0s"), (9.996e-7, "s", "1.00\u00a0µs"),
    (3.8e10, "B/s", "38.0\u00a0GB/s"), (4.97e8, "B", "497\u00a0MB"), (2.4e12, "B/s", "2.40\u00a0TB/s"),
    (3e-15, "s", "0.003\u00a0ps"), (None, "s", "–"),
])  # fmt: skip
def test_quantities_have_a_prefix(value, unit, text):
    assert units.quantity(value, unit).replace("0.00300", "0.003") == text


def test_an_interval_has_the_prefix_of_its_median():
    assert units.interval(dict(median=5e-4, q10=4.68e-4, q90=1.2e-2), "s") == "468–12\u202f000\u00a0µs"
    assert units.between(dict(median=1, q10=0.0689, q90=12.34)) == "0.07–12.3"
    assert units.percent(0.001) == "<1\u00a0%" and units.percent(0.876) == "88\u00a0%"


def test_a_row_is_compared_with_the_fastest_fair_way():
    """References and our own backends are not rivals. PyTorch step by step is not a rival if it is the only way."""
    seconds = dict(ours=1, fused=4, naive=3, compiled=3.5, reference=0.1, triton=0.2)
    row = dict(seconds={name: spread(s) for name, s in seconds.items()})
    assert page_tables.fair(row) == "naive"
    del row["seconds"]["naive"]
    assert page_tables.fair(row) == "compiled"
    assert page_tables.fair(dict(seconds=dict(ours=spread(1), naive=spread(2), reference=spread(1)))) is None
    assert page_tables.fair(dict(failed="why")) is None
    bars, without = page_tables.bars_of_ops(op_results())
    assert [b.ratio["median"] for b in bars if b.tags["dtype"] == "float16"] == [pytest.approx(0.4)]
    assert without == ["sample B1·T1024·C768 float32 (PyTorch has no fused way)",
                       "gelu B1 float32 (not timed: parity failed)"]  # fmt: skip


def test_the_roof_is_drawn_from_the_figures_of_the_head(tmp_path):
    report.write_page(dict(ops=op_results()), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    head = dict(re.findall(r"<dt>([^<]+)</dt><dd>([^<]+)</dd>", page))
    assert head["memory, copying"] == "52.7\u00a0GB/s" and head["float32 multiply-add"] == "232\u00a0GFLOP/s"
    drawn = page[page.index('<svg viewBox="0 0 1000') :]
    for text in ("memory: 52.7 GB/s", "float32: 232 GFLOP/s", "bfloat16: 467 GFLOP/s"):
        assert f">{text}</text>" in drawn, text


def test_the_roof_bends_where_memory_and_arithmetic_meet():
    roof = drawings.Roof(50e9, dict(float32=200e9, bfloat16=400e9))
    assert roof.at(1) == 50e9 and roof.at(8) == roof.at(100) == 400e9
    svg, _ = drawings.roofline([drawings.Point("gelu", "float32", "gelu", 2, 90e9, 30e9)], roof, "wide", 1000, 520)
    lines = re.findall(r'<line (x1[^>]+)class="roof"', svg)
    numbers = [{k: float(v) for k, v in re.findall(r'(\w\d)="([\d.]+)"', line)} for line in lines]
    slope = next(line for line in numbers if line["y1"] != line["y2"])
    top = min(line["y1"] for line in numbers)
    assert slope["y2"] == top and any(line["y1"] == top and line["x1"] == slope["x2"] for line in numbers)


def test_bars_start_at_one_and_hold_their_scale():
    scale = drawings.Scale.over([spread(0.25), spread(30.0)])
    assert 0 <= scale.at(0.225) < scale.at(1) < scale.at(36.0) <= 100 and 1 in scale.ticks()
    places = [scale.at(t) for t in scale.ticks()]
    assert len(places) <= 6 and all(b - a > 5 for a, b in zip(places, places[1:]))
    left, right = (drawings.bar(scale, spread(m), "float32", "") for m in (0.25, 30.0))
    x, width = (float(re.search(rf'<rect [^>]*{name}="([\d.]+)%"', left)[1]) for name in ("x", "width"))
    assert x + width == pytest.approx(scale.at(1), abs=0.02)
    assert float(re.search(r'<rect x="([\d.]+)%"', right)[1]) == pytest.approx(scale.at(1), abs=0.01)


def test_memory_and_failures_are_told_where_they_are():
    table = page_tables.of_ops(op_results())
    assert table.header[-1] == "memory" and table.rows[0].cells[-1] == "12.6\u00a0MB\nits 25.2\u00a0MB"
    assert table.rows[1].cells[-1] == "–"
    assert "memory" not in page_tables.of_ops(op_results() | dict(rows=op_results()["rows"][1:])).header
    assert page_tables.failure(dict(failed="half y: breaks the parity rule (rms 1)")) == "not timed: parity failed"
    assert page_tables.failure(dict(failed="nothing to compare with")) == "not timed: nothing to compare with"


def test_a_training_step_stands_beside_prefill_and_decode():
    rows = page_tables.of_model(model_results()).rows
    assert [row.cells[0].split(",")[0] for row in rows] == ["prefill", "decode", "training step", "training step"]
    assert rows[2].cells == ["training step, batch of 2, 256 tokens", "bfloat16", "–", "256", "171", "–",
                             "1.50\u00a0×\n1.35–1.80", "–"]  # fmt: skip
    assert rows[3].bad and rows[3].cells[2] == "not timed: parity failed" and rows[3].tags == dict(dtype="float32")
    bars = page_tables.bars_of_model(model_results())
    assert [b.name.split(",")[0] for b in bars] == [
        "native: prefill", "drop-in: prefill", "native: decode", "drop-in: decode", "drop-in: training step"
    ]  # fmt: skip
    assert bars[-1].ratio["median"] == 1.5 and bars[-1].rival == "transformers with SDPA"


def test_errors_are_in_rounding_steps():
    assert parity.steps(parity_results()["rows"][0]) == pytest.approx([0.5, 1, 3, 0.75, 0.5, 2])
    zero = dict(rms=0, plain_rms=0, rms_bound=0, max=0, plain_max=0, max_bound=0)
    assert parity.steps(zero) == [None] * 6


def test_parity_measures_ops_and_sees_a_wrong_one(half, tmp_path, capsys):
    path = tmp_path / "parity.json"
    assert parity.main(["gpt2fast_test::half", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 2 * len(half.dtypes)
    for row in rows:
        assert row["keeps"] and row["output"] == "y" and row["rms"] <= row["rms_bound"], row
    right, half.body = half.body, lambda x: 0.51 * x
    assert parity.main(["gpt2fast_test::half", "--json", str(path)]) == 1
    half.body = right
    assert not any(row["keeps"] for row in json.loads(path.read_text())["rows"])
    table = page_tables.of_parity(json.loads(path.read_text()))
    assert all(row.bad for row in table.rows) and len({len(row.cells) for row in table.rows}) == 1


def test_every_row_is_as_long_as_its_header():
    found = all_results()
    made = [*report.tables(found), *page_tables.of_kernels()]
    assert len(made) >= 12
    for table in made:
        assert table.rows and {len(row.cells) for row in table.rows} == {len(table.header)}, table.title
        for cell in (cell for row in table.rows for cell in row.cells):
            assert not re.search(r"\d[eE][+-]?\d", cell), f"{table.title}: {cell}"


def test_the_document_of_kernels_is_made_of_the_counts_that_are_shipped(tmp_path):
    counts = kernel_page.read()
    text = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    assert text == kernel_page.document(counts), "run python -m benchmarks.kernel_table > docs/kernels.md"
    kernel_page.write(counts, tmp_path / "kernels.json")
    assert (tmp_path / "kernels.json").read_bytes() == kernel_page.COUNTS.read_bytes()
    tables = page_tables.of_kernels()
    assert [table.title for table in tables] == [f"Architecture {name}" for name in ("sm_80", "sm_90", "sm_100")]
    assert [len(table.rows) for table in tables] == [len(rows) for rows in counts.values()]
    assert all(f"- **{head}**: " in kernel_page.INTRODUCTION for head in kernel_page.HEADS[4:])


@pytest.mark.parametrize("text, message", [
    ("|", "got text that is no JSON"),
    ("[]", "got no architectures"),
    ('{"columns": ["op"], "architectures": {"sm_90": [["gelu"]]}}', r"got the columns ['op']"),
    (json.dumps(dict(columns=kernel_page.HEADS, architectures=dict(sm_90=[["gelu"]]))), "got rows of sm_90 that are"),
])  # fmt: skip
def test_other_counts_of_kernels_are_refused(text, message, tmp_path):
    path = tmp_path / "kernels.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{path}: expected counts of benchmarks.kernel_table, {message}")):
        report.write_page(dict(parity=parity_results()), tmp_path / "page.html", kernels=path)


def test_what_check_printed_is_there(half, tmp_path, capsys):
    right, path = half.body, tmp_path / "check.json"
    for body, runs in ((right, "{0} of {0}"), (lambda x: 0.51 * x, "0 of {0}")):
        half.body = body
        run_check(["gpt2fast_test::half"], as_json=True)
        path.write_text(capsys.readouterr().out)
        found = report.read([path])
        (row,) = page_tables.of_check(found["check"]).rows
        total = sum("layout" in r for r in found["check"]["ops"]["gpt2fast_test::half"])
        assert row.cells[0] == "gpt2fast_test::half" and row.cells[3] == runs.format(total) and total > 2
        assert row.bad == (body is not right)
    half.body = right
    assert "breaks the parity rule" in row.cells[1]
    report.write_page([path], tmp_path / "page.html")
    assert "breaks the parity rule" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_what_a_gpu_told_is_there(tmp_path):
    report.write_page([H100], tmp_path / "page.html", kernels=None)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for text in (
        "NVIDIA H100 80GB HBM3",
        "training step",
        "against Liger&#x27;s kernel",
        "memcheck clean",
        "1\u202f324 more",
    ):
        assert text in page, text
    assert "sm_90" not in page and "Roofline" not in page
    row = dict(seconds=dict(ours=spread(2), ours_without_graphs=spread(1), transformers=spread(3)),
               ratios={"vs transformers": spread(1.5), "vs ours_without_graphs": spread(0.5)})  # fmt: skip
    assert page_gpu.rival(row)[0] == "transformers"


@pytest.mark.parametrize("text, message", [
    (None, "got no file to read: No such file"),
    ("{", "got text that is no JSON"),
    ("[1]", "got a list"),
    ('{"kind": "other", "rows": []}', "ops, generate, parity, gpu, check; got kind 'other' and the keys kind, rows"),
    ("{}", "got kind None and the keys none"),
    ('{"kind": "ops", "machine": {}}', "of kind 'ops' with machine, peaks, rows; got none of peaks, rows"),
])  # fmt: skip
def test_a_foreign_file_is_named(text, message, tmp_path, capsys):
    path = tmp_path / "some.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        report.read([path])
    assert str(caught.value).startswith(f"gpt2fast report: {path}: expected JSON written by benchmarks.ops")
    with pytest.raises(SystemExit, match="2"):
        report.main([str(path)])
    assert message in capsys.readouterr().err and not (tmp_path / "report.html").exists()


def test_files_of_one_machine_are_joined_and_others_refused(tmp_path):
    one, other = op_results(), op_results()
    other["peaks"]["2"]["fma"] = 3e11
    paths = [tmp_path / name for name in ("one.json", "other.json")]
    for path, results in zip(paths, (one, other)):
        path.write_text(json.dumps(results))
    found = report.read(paths)["ops"]
    assert len(found["rows"]) == 2 * len(one["rows"]) and found["peaks"]["2"]["fma"] == 3e11
    other["machine"]["cpu"] = "Another"
    paths[1].write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"other.json: expected one run of kind 'ops' a page.*one\.json"):
        report.read(paths)
    with pytest.raises(ValueError, match="results must be of kind ops, .* got none"):
        report.write_page({}, tmp_path / "page.html")


def test_goals_are_a_command_of_their_own(tmp_path, capsys):
    path = tmp_path / "ops.json"
    path.write_text(json.dumps(op_results()))
    assert figures.main([str(path)]) == 1
    out = capsys.readouterr().out
    assert "at least" in out and "NO" in out
    report.write_page([path], tmp_path / "page.html")
    assert "at least 8" not in (tmp_path / "page.html").read_text(encoding="utf-8")
