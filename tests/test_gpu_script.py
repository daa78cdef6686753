"""``make gpu``: the driver of the stages. CI rehearses the stages themselves by ``make gpu REHEARSE=1``."""

import json

import pytest
import torch

from gpt2fast.benchmarks import gpu, gpu_stages


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
