"""``make gpu``: the driver of the stages. CI rehearses the stages themselves by ``make gpu REHEARSE=1``."""

import json

import pytest
import torch

from gpt2fast.benchmarks import gpu, gpu_aims, gpu_stages
from gpt2fast.testing import build, find_ops


def test_without_a_gpu_it_says_what_to_do(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert gpu.main([]) == 1
    assert "make gpu REHEARSE=1" in capsys.readouterr().out


def test_an_unknown_stage_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "tea"])
    assert "stage must be one of build, machine, parity" in capsys.readouterr().err


def test_a_stage_that_fails_or_hangs_stops_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu, "LIMITS", dict(nonsense=60, machine=0.01, sanitizer=60))
    assert gpu.main(["--rehearse"]) == 1
    found = json.loads((tmp_path / "gpu-rehearsal.json").read_text())["stages"]
    assert found["nonsense"]["ended"] == "exit status 1" and "KeyError: 'nonsense'" in found["nonsense"]["output"]
    assert found["machine"]["ended"] == "cut off at its time limit"
    assert found["sanitizer"]["ended"] == "done"
    assert [row["ended"] for row in found["sanitizer"]["found"]["rows"]] == ["clean", "clean"]
    assert "KeyError: 'nonsense'" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["gpu-rehearsal.json"]


def test_every_stage_has_a_limit_and_all_fit_in_eight_minutes():
    assert set(gpu.LIMITS) == set(gpu_stages.STAGES) and sum(gpu.LIMITS.values()) <= 480


def test_one_failure_in_a_row_is_kept_and_said():
    row = gpu_stages.attempt(dict(op="gelu", case="B1"), lambda: 1 / 0)
    assert row["error"] == "ZeroDivisionError: division by zero"
    assert gpu.describe(row, rehearsal=False) == "gelu B1 FAILED: ZeroDivisionError: division by zero"


def test_the_aims_beside_what_was_measured():
    """The table for one row that reaches its aims, one that does not, and all the others, which were not measured."""
    times = dict(ours=1.0, compiled=1.1, fused=1.4)
    layer_norm = dict(op="layer_norm", case="B16·T1024·C768", dtype="bfloat16", share=0.9)
    slow = dict(op="attention", case="B16·T1024·S1024·H12·D64", dtype="bfloat16", share=0.1)
    rows = [row | dict(seconds={n: dict(median=t) for n, t in times.items()}) for row in (layer_norm, slow)]
    rows[1]["seconds"]["fused"] = dict(median=0.9)
    rows.append(rows[0] | dict(case="B16·T1024·C1600", dtype="float32"))
    decode = dict(what="decode after 32", case="1", tokens_per_second=dict(ours=4000.0))
    decode["seconds"] = {n: dict(median=t) for n, t in dict(ours=1.0, transformers=6.0).items()}
    stages = dict(
        machine=dict(found=dict(copy_bytes_per_second=2e12, bfloat16_flops_per_second=8e14)),
        ops=dict(found=dict(rows=rows)),
        model=dict(found=dict(rows=[decode])),
    )
    lines = {line.split("  ")[0]: line for line in gpu_aims.table(stages)}
    assert len(lines) == 18
    said = "90% of what the device reaches (aim 85%); 1.10 x compiled (aim 1.00); quack (no bias) not measured"
    assert said in lines["layer_norm, 16384 x 768"] and " reached " in lines["layer_norm, 16384 x 768"]
    assert lines["layer_norm, 16384 x 1600"].endswith("not measured")
    assert " MISSED  0.90 x fused (aim 1.00)" in lines["attention, causal, 16 x 1024"]
    said = "50% of what the device reaches (aim 40%); 6.00 x transformers (aim 5.00)"
    assert said in lines["decode, 124M, one row, bfloat16"]
    assert lines["training step, 124M, 16 x 1024, bfloat16"].endswith("not measured")
    assert sum("not measured" == line[-12:] for line in lines.values()) == 15


def test_the_cases_of_the_aims_are_cases_of_their_ops():
    for op, cases in gpu_aims.CASES.items():
        for case in cases:
            assert build(find_ops([op])[0], case | {k: 2 for k in "BTRS" if k in case}, torch.bfloat16)
