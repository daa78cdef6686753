"""``gpt2fast check`` and its parity rule: they find a kernel that is wrong in one element, and say where."""

import json
import re

import pytest
import torch

from gpt2fast.op import OPS
from gpt2fast.testing import (
    assert_close_to_truth,
    check_contract,
    check_op,
    checks_of,
    measure,
    run_check,
    runnable_isas,
)
from gpt2fast.testing.inputs import build, cut, work


def wrong_at(index, by):
    """Half of x, with one wrong element in a (2, 3, 5) tensor."""

    def kernel(x):
        y = (x * 0.5).contiguous()
        if y.shape == (2, 3, 5):
            y[index] += by
        return y

    return kernel


def test_a_right_kernel_is_held_to_every_run(half):
    rows = check_op(half)
    assert not any(row["error"] for row in rows)
    assert len(rows) == 2 * 3 * 3 * len(runnable_isas())  # cases, layouts, dtypes
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"}


def test_a_wrong_kernel_is_named_with_place_values_and_rule(half):
    half.body = wrong_at((1, 2, 3), 0.25)
    wrong = [row for row in check_op(half) if row["error"]]
    assert {(row["case"]["C"], row["dtype"], row["layout"]) for row in wrong} == {
        (5, dtype, layout)
        for dtype in ("float32", "bfloat16", "float16")
        for layout in ("contiguous", "sliced", "transposed")
    }
    first = next(row["error"] for row in wrong if row["dtype"] == "float32")
    truth = 0.5 * build(half, half.cases[0])["x"][1, 2, 3].item()
    got, expected, plain = (
        float(re.search(rf"{name} (-?[\d.e-]+)", first)[1]) for name in ("got", "truth", "plain PyTorch")
    )
    assert first.startswith("half y: breaks the parity rule (rms ") and "worst at (0, 1, 2, 3)" in first
    assert got == pytest.approx(truth + 0.25) and expected == plain == pytest.approx(truth)
    assert re.search(r"max 0\.25, .*rms_bound [\d.e-]+, max_bound [\d.e-]+\)", first)


def test_run_check_prints_what_is_wrong_and_fails(half, capsys):
    assert run_check(["gpt2fast_test::half"]) == 0
    runs = 2 * 3 * 3 * len(runnable_isas())
    count = len(checks_of(half)) - runs
    said = f"{runs} of {runs} runs keep the parity rule, {count} of {count} checks of the contract hold"
    said = rf"gpt2fast_test::half +{said}; no kernel for fused.*\n"
    assert re.fullmatch(said, capsys.readouterr().out)
    half.body = wrong_at((0, 0, 4), torch.nan)
    assert run_check(["gpt2fast_test::half"]) == 1
    lines = capsys.readouterr().out.splitlines()
    said = f" {runs // 2} of {runs} runs keep the parity rule, {count - 1} of {count} checks of the contract hold; "
    assert said in lines[0] and len(lines) == 2 + runs // 2
    assert all("{'B': 2, 'T': 3, 'C': 5} " in line and "(0, 0, 0, 4): got nan, truth " in line for line in lines[1:-1])
    assert lines[-1].startswith("  half-opcheck-B2-T3-C5: gpt2fast_test::half: ")  # for which NaN does not equal NaN


def test_run_check_lists_what_breaks_the_contract(half, capsys, two_threads):
    torch.set_num_threads(1)
    half.body = lambda x: x * (0.5 if torch.get_num_threads() == 1 else 0.5000001)
    assert run_check(["gpt2fast_test::half"]) == 1
    runs, count = len(check_op(half)), len(check_contract(half))
    first, second = capsys.readouterr().out.splitlines()
    said = f"{runs} of {runs} runs keep the parity rule, {count - 1} of {count} checks of the contract hold"
    assert said in first and second.startswith("  half-threads: gpt2fast_test::half: y of torch.float32 on one thread ")
    assert run_check(["gpt2fast_test::half"], as_json=True) == 1
    rows = [row for row in json.loads(capsys.readouterr().out)["gpt2fast_test::half"] if row["error"]]
    assert [(row["check"], row["promise"]) for row in rows] == [("half-threads", "threads")]


def test_run_check_of_an_op_without_cases(half, capsys, monkeypatch):
    monkeypatch.setattr(half, "cases", [])
    assert run_check(["gpt2fast_test::half"]) == 1
    assert "half: cases= must name at least one case that has elements, got []" in capsys.readouterr().out


def test_run_check_json_and_an_error_of_the_kernel(half, capsys):
    def refuse(x):
        raise ValueError("no such shape")

    half.body = refuse
    assert run_check(["gpt2fast_test::half", "gelu_backward"], as_json=True) == 1
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["gpt2fast_test::half", "gelu_backward"]
    rows = [row for row in found["gpt2fast_test::half"] if "missing" not in row]
    assert {row["error"] for row in rows if "target" in row} == {"no such shape"}
    said = {row["promise"]: row["error"] for row in rows if "check" in row}
    assert said["repeats"] == "gpt2fast_test::half: repeats_bit_for_bit: ValueError: no such shape"
    assert not any(row["error"] for row in found["gelu_backward"])
    missing = {row["target"]: row["missing"] for row in found["gelu_backward"] if "missing" in row}
    assert missing["cpu:scalar"] == "the cpu backend has no kernel for it" and "fused" not in missing


def test_one_instruction_set_by_the_environment(half, monkeypatch):
    monkeypatch.setenv("GPT2FAST_CPU_ISA", "scalar")
    assert {row["target"] for row in check_op(half)} == {"cpu:scalar"}


def test_the_rule_is_twice_plain_pytorch_plus_one_rounding():
    truth = torch.full((1000,), 1.0, dtype=torch.float64)
    plain = truth.float() + 3e-6
    bound = 2 * (plain.double() - truth).max().item() + torch.finfo(torch.float32).eps
    found = measure(truth.float(), plain, truth)
    assert found["max_bound"] == pytest.approx(bound) and found["rms_bound"] == pytest.approx(bound)
    assert_close_to_truth(truth.float() + 0.9 * bound, plain, truth)
    with pytest.raises(AssertionError, match="breaks the parity rule"):
        assert_close_to_truth(truth.float() + 1.1 * bound, plain, truth)
    lost = truth.float()
    lost[7] = torch.inf
    with pytest.raises(AssertionError, match=r"worst at \(7,\): got inf, truth 1"):
        assert_close_to_truth(lost, plain, truth)
    with pytest.raises(AssertionError, match=r"shape \(999,\), expected \(1000,\)"):
        assert_close_to_truth(lost[1:], plain, truth)


def test_a_case_of_lists_is_cut_as_far_as_first_axes_go():
    op = OPS["adamw_"]
    case = cut(op, dict(each=[(768, 2304), (2304,), ()], step=1), 200_000)
    assert work(op, case) <= 200_000 and case["each"][2] == ()
    assert cut(op, dict(each=[(9, 50), (40,)], step=1), 1)["each"] == [(1, 50), (1,)]
