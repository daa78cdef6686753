"""What the benchmarks conclude: the roofline's least time, the promised figures, and how the contenders alternate."""

import pytest
import torch

from gpt2fast.benchmarks import cases, figures
from gpt2fast.benchmarks.ops import least_seconds
from gpt2fast.benchmarks.timing import alternate, ratios, summarise
from gpt2fast.ops import embedding, gelu

PACE = dict(read=100.0, copy=50.0, fma=1000.0, dot=2000.0)


@pytest.mark.parametrize("moved, flops, rate, cached, expected", [
    ((300, 0), 0, "fma", False, (3.0, "read")),
    ((300, 100), 0, "fma", False, (2 * 100 / 50 + 200 / 100, "read")),
    ((100, 100), 0, "fma", False, (4.0, "copy")),
    ((0, 100), 0, "fma", False, (2.0, "copy")),  # only writes: they go at the speed of a copy
    ((300, 0), 8000, "fma", False, (8.0, "fma")),
    ((300, 0), 8000, "dot", False, (4.0, "dot")),
    ((300, 0), 2000, "fma", True, (2.0, "fma")),
])  # fmt: skip
def test_least_time(moved, flops, rate, cached, expected):
    assert least_seconds(moved, flops, PACE, rate, cached) == expected


def test_bytes_count_every_tensor_once_and_of_tables_the_rows_in_use():
    x = torch.zeros(2, 3, 5)
    assert cases.nbytes(gelu, dict(x=x)) == (120, 120)
    args = dict(tokens=torch.zeros(2, 3, dtype=torch.int64), wte=torch.zeros(9, 5), wpe=torch.zeros(8, 5))
    assert cases.nbytes(embedding, args) == (6 * 8 + 6 * 20 + 3 * 20, 6 * 20)


def row(op, ratio, share=0.5, dtype="float32", outside=True, **case):
    return dict(op=op, label="", case=case, dtype=dtype, outside_cache=outside, ratio=dict(median=ratio),
                share=dict(median=share))  # fmt: skip


@pytest.mark.parametrize("made, held", [
    (row("layer_norm", 0.99), [False]),
    (row("layer_norm", 1.0), [True]),
    (row("gelu", 7.9, approximate="tanh"), [False]),
    (row("gelu", 8.1, approximate="tanh"), [True]),
    (row("gelu", 1.1, approximate="tanh", outside=False), [True]),
    (row("gelu", 1.1, approximate="tanh", dtype="bfloat16"), [True]),
    (row("gelu", 1.1, approximate="none"), [True]),
    (row("cross_entropy", 4.9, R=1024), [False]),
    (row("cross_entropy", 4.9, R=1), [True]),
    (row("add_layer_norm", 1.1, 0.84), [True, False]),
    (row("bias_gelu", 1.1, 0.86), [True, True]),
    (row("bias_gelu", 1.1, 0.5, outside=False), [True]),
    (dict(op="gelu", label="", dtype="float32", failed="why"), [False]),
])  # fmt: skip
def test_figures_of_ops(made, held):
    assert [holds for _, _, holds in figures.of_ops([made])] == held


def test_figures_of_the_model():
    def model_row(what, case, ratio, dtype="float32", share=None):
        found = dict(what=what, case=case, dtype=dtype, ratio=dict(native=dict(median=ratio)))
        return found | (dict(share=dict(native=dict(median=share))) if share else {})

    rows = [
        model_row("prefill", "8x512", 1.1, "bfloat16"),
        model_row("decode", "1x32", 2.1, share=0.69),
        model_row("decode", "1x512", 1.9, share=0.71),
        model_row("decode", "8x32", 0.5, share=0.1),  # no figure is promised for this row
        model_row("training step", "1x256", 0.5),  # nor for this one
        dict(what="training step", case="2x256", dtype="float32", failed="loss: breaks the parity rule"),
    ]
    fresh = dict(memory=1.16, start=1.4)
    held = [holds for _, _, holds in figures.of_model(dict(rows=rows, fresh=fresh))]
    assert held == [False, True, False, False, True, False, False, True]


def test_contenders_take_turns_over_all_inputs():
    log = []

    def calls(name):
        return [lambda i=i: log.append((name, i)) or sum(range(20_000)) for i in range(3)]

    found = alternate(dict(a=calls("a"), b=calls("b")), dict(p=lambda: log.append("p") or 7.0), 0.0, (4, 9))
    assert {name: len(times) for name, times in found.items()} == dict(a=4, b=4, p=4) and found["p"] == [7.0] * 4
    assert all(t > 0 for t in found["a"] + found["b"])
    starts = [i for i, entry in enumerate(log) if entry == "p"]
    rounds = [log[i + 1 : j] for i, j in zip(starts, [*starts[1:], len(log)])]
    assert len(rounds) == 6  # two of them are for warming up
    for i, calls in enumerate(rounds):
        order = list(dict.fromkeys(name for name, _ in calls))
        assert order == (["b", "a"], ["a", "b"])[i % 2], "who is first changes from round to round"
        for name in order:
            used = [number for caller, number in calls if caller == name]
            assert used == [number % 3 for number in range(len(used))] and len(used) >= 3


def test_spread_and_ratios_come_from_pairs():
    assert summarise([5, 1, 2, 4, 3]) == dict(median=3, q10=1, q90=5)
    assert ratios([2.0, 30.0, 6.0], [1.0, 10.0, 3.0]) == dict(median=2.0, q10=2.0, q90=3.0)
