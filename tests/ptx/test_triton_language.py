"""Compares each part of Triton's language with PyTorch. memcheck and racecheck are always on."""

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

import language
import triton.language as tl

from gpt2fast.testing import ptx

TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float64: tl.float64,
    torch.bool: tl.int1,
    torch.uint8: tl.uint8,
    torch.int8: tl.int8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}


@pytest.fixture(autouse=True)
def machine():
    torch.manual_seed(0)
    with ptx.machine() as m:
        yield m


@pytest.mark.parametrize("warps", (1, 2, 4, 8))
def test_scan_and_sort(warps):
    x, sums, ordered = torch.randn(256), torch.empty(256), torch.empty(256)
    language.cumulative_sum[(1,)](x, sums, 256, num_warps=warps)
    d = x.double()
    assert ((sums - d.cumsum(0)).abs() <= 256 * 2**-24 * d.abs().cumsum(0)).all()  # a rounding for each number added
    language.sort[(1,)](x, ordered, 256, num_warps=warps)
    assert torch.equal(ordered, x.sort()[0])


def test_extremes():
    x, found = torch.randn(256), torch.empty(2, dtype=torch.int32)
    language.extremes[(1,)](x, found, 256)
    assert found.tolist() == [x.argmax(), x.argmin()]


def test_histogram():
    x, counts = torch.randint(0, 16, (256,), dtype=torch.int32), torch.empty(16, dtype=torch.int32)
    language.histogram[(1,)](x, counts, 256, 16)
    assert torch.equal(counts.long(), torch.bincount(x, minlength=16))


# dtype, precision, accumulators, what the inputs lose, rounding unit of a sum, terms that are summed together
DOTS = [
    (torch.float16, "ieee", torch.float32, 0, 2**-24, 1),
    (torch.float16, "ieee", torch.float16, 0, 2**-11, 16),
    (torch.bfloat16, "ieee", torch.float32, 0, 2**-24, 1),
    (torch.float32, "tf32", torch.float32, 2**-10, 2**-24, 1),
    (torch.float32, "tf32x3", torch.float32, 2**-20, 2**-24, 1),
    (torch.float32, "ieee", torch.float32, 0, 2**-24, 1),
    (torch.float64, "ieee", torch.float64, 0, 2**-53, 1),
    (torch.int8, "ieee", torch.int32, 0, 0, 1),
    (torch.float32, "bf16x6", torch.float32, 2**-26, 2**-24, 1),
]
PRODUCTS = {"tf32x3": 3, "bf16x6": 6}  # tensor-core products for one product


@pytest.mark.parametrize("M, N, K, warps", ((16, 16, 32, 1), (64, 32, 64, 4)))
@pytest.mark.parametrize("dtype, precision, total, lost, unit, at_once", DOTS)
def test_dot(dtype, precision, total, lost, unit, at_once, M, N, K, warps, machine):
    """The error is within the bound for K products that are summed one after the other."""

    def numbers(*size):
        return torch.randint(-128, 128, size, dtype=dtype) if dtype == torch.int8 else torch.randn(size).to(dtype)

    a, b, c = numbers(M, K), numbers(K, N), torch.empty(M, N, dtype=total)
    language.dot[(1,)](a, b, c, M, N, K, precision, TYPES[total], num_warps=warps)
    bound = (2 * lost + K / at_once * unit) * (a.double().abs() @ b.double().abs())
    assert ((c.double() - a.double() @ b.double()).abs() <= bound).all()
    times = 0 if (dtype, precision) == (torch.float32, "ieee") else PRODUCTS.get(precision, 1)
    assert machine.launches[0].counters["tensor_flops"] == 2 * M * N * K * times


def test_functions():
    x, y = torch.randn(256), torch.empty(16, 256)
    language.functions[(1,)](x, y, 256)
    d, a = x.double(), x.double().abs()
    expected = [
        *(d.erf(), d.sin(), d.cos(), a.sqrt(), a.rsqrt(), d.floor(), d.ceil(), d.tanh(), a**1.7, d / 3.1),
        *(a.sqrt(), a.log1p(), d.expm1(), d.round(), d.exp2(), a.log2()),
    ]
    unit = torch.finfo(torch.float32).eps
    # CUDA's programming guide allows pow, the least exact of these, 4 units in the last place. Near their zeros, sin
    # and cos may be off by about 2 units of 1.
    torch.testing.assert_close(y.double(), torch.stack(expected), atol=2 * unit, rtol=4 * unit)


@pytest.mark.parametrize("dtype", (torch.int8, torch.int16, torch.int32, torch.int64))
def test_integers(dtype):
    most = min(2**40, torch.iinfo(dtype).max)
    a, b = torch.randint(-most, most, (128,)).to(dtype), torch.randint(1, 100, (128,)).to(dtype)
    y = torch.empty(7, 128, dtype=dtype)
    language.integers[(1,)](a, b, y, 128)
    quotient = torch.div(a, b, rounding_mode="trunc")
    expected = [quotient, a - quotient * b, a * b, torch.minimum(a, b), a ^ b, a >> 3, a.abs()]
    assert torch.equal(y, torch.stack(expected))


def test_high_product():
    a, b = (torch.randint(-(2**63), 2**63 - 1, (64,)) for _ in range(2))
    y = torch.empty_like(a)
    language.high_product[(1,)](a, b, y, 64)
    expected = [(p % 2**64) * (q % 2**64) >> 64 for p, q in zip(a.tolist(), b.tolist())]
    assert [v % 2**64 for v in y.tolist()] == expected


INTEGERS = (torch.int32, torch.int64)
FLOATS = (torch.float32, torch.float64)
ATOMICS = {
    "add": (*INTEGERS, *FLOATS, torch.float16, torch.bfloat16),
    "max": (*INTEGERS, *FLOATS),
    "min": (*INTEGERS, *FLOATS),
    "and": INTEGERS,
    "or": INTEGERS,
    "xor": INTEGERS,
    "xchg": (*INTEGERS, *FLOATS),
    "cas": (*INTEGERS, *FLOATS),
}


def folded(op, rows, start):
    """The result of applying the 32 values of each place to the start."""
    if op in ("and", "or", "xor"):
        total = start.clone()
        for row in rows:
            total = {"and": total & row, "or": total | row, "xor": total ^ row}[op]
        return total
    both = torch.cat([start[None], rows])
    return {"add": both.sum(0), "max": both.max(0)[0], "min": both.min(0)[0]}[op]


@pytest.mark.parametrize("op, dtype", [(op, dtype) for op, dtypes in ATOMICS.items() for dtype in dtypes])
def test_atomics(op, dtype):
    # The numbers are small integers, whose sums are exact in any order, also in bfloat16.
    x = torch.randint(-3, 4, (128,)).to(dtype)
    start = torch.tensor([0, 1, 0, 2]).to(dtype)
    y = start.clone()
    language.atomics[(1,)](x, y, 128, op)
    rows = x.view(32, 4)
    if op == "xchg":
        assert all(y[k] in rows[:, k] for k in range(4))
    elif op == "cas":  # 0 is replaced by one of the values; later lanes do not find 0
        assert y[1] == 1 and y[3] == 2 and y[0] in rows[:, 0] and y[2] in rows[:, 2]
    else:
        assert torch.equal(y, folded(op, rows, start).to(dtype))


@pytest.mark.parametrize("to", TYPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_cast(dtype, to):
    x = (torch.rand(128) * 100).to(dtype)
    y = torch.empty(128, dtype=to)
    language.cast[(1,)](x, y, 128, TYPES[to])
    assert torch.equal(y, x.to(to))


def test_random_numbers():
    y = torch.empty(2, 1024)
    language.random[(1,)](y, 42, 1024)
    normal, uniform = y
    assert abs(normal.mean()) < 0.1 and abs(normal.std() - 1) < 0.1
    assert 0 <= uniform.min() < 0.05 and 0.95 < uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.05


def test_gather():
    x, index, y = torch.randn(64), torch.randint(0, 64, (128,), dtype=torch.int32), torch.empty(128)
    language.gather[(1,)](x, index, y, 64, 128)
    assert torch.equal(y, x[index.long()])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.int8))
def test_transpose(dtype):
    x, y = (torch.randn(64, 32) * 50).to(dtype), torch.empty(32, 64, dtype=dtype)
    language.transpose[(1,)](x, y, 64, 32)
    assert torch.equal(y, x.t())


def test_reductions():
    x, y = torch.randn(64, 32), torch.empty(96)
    language.reductions[(1,)](x, y, 64, 32)
    d = x.double()
    assert ((y[:32] - d.sum(0)).abs() <= 64 * 2**-24 * d.abs().sum(0)).all()
    assert torch.equal(y[32:], x.max(1)[0])


def test_print(machine):
    language.speak[(1,)](torch.arange(32.0), 32, num_warps=1)
    lines = machine.launches[0].printed.splitlines()
    assert len(lines) == 32
    assert all("value" in line and f"{float(i):f}" in line for i, line in enumerate(lines))
