"""The same cases under pytest-benchmark: ``pytest benchmarks --benchmark-only --benchmark-group-by=group``."""

import functools
import itertools

import pytest
import torch

from gpt2fast.testing import assert_parity

from . import cases
from .options import DTYPES

pytest.importorskip("pytest_benchmark", reason="pip install 'gpt2fast[bench]'")


def runs():
    for op in cases.bench_ops([]):
        for case, dtype in itertools.product(cases.bench_cases(op), DTYPES):
            for way in ("ours", *cases.rivals(op, case)):
                name = cases.describe(case).replace("·", "-")
                yield pytest.param(op, case, dtype, way, id=f"{op.name} {name} {dtype} {way}")


@functools.lru_cache(maxsize=1)
def prepared(name: str, number: int, dtype: str):
    """The inputs of a case that passed its parity check. The ways of a case follow each other, so one case is kept."""
    op = cases.bench_ops([name])[0]
    case = cases.bench_cases(op)[number]
    assert_parity(op, case, DTYPES[dtype])
    return cases.inputs(op, case, DTYPES[dtype])[0]


@pytest.mark.parametrize(("op", "case", "dtype", "way"), list(runs()))
def test_op(benchmark, op, case, dtype, way):
    function = dict(ours=op, **cases.rivals(op, case))[way]
    with torch.inference_mode():
        sets = itertools.cycle(prepared(op.name, cases.bench_cases(op).index(case), dtype))
        benchmark.group = f"{op.name} {cases.describe(case)} {dtype}"
        benchmark(lambda: function(*next(sets)))
