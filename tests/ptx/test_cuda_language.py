"""CUDA's intrinsics as nvcc compiles them, against PyTorch, Python's integers and exact fractions."""

import math
import shutil
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2fast.testing import ptx

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")

SOURCE = Path(__file__).with_name("language.cu")
N = 64


def line_of(part: str) -> str:
    (at,) = [i for i, line in enumerate(SOURCE.read_text().splitlines(), 1) if part in line]
    return f"language.cu:{at}"


def launch(kernel, *args, block=N, raise_errors=True):
    text = ptx.compile_cuda(SOURCE)
    with ptx.machine(raise_errors=raise_errors) as m:
        return m.launch(text, kernel, (1,), (block,), *args)


def results(kernel, count, x, *more):
    out = torch.zeros(count, *x.shape, dtype=x.dtype)
    launch(kernel, x, *more, out)
    return out


def numbers(dtype, n=N):
    torch.manual_seed(0)
    return (torch.randn(n) * 3).to(dtype), (torch.randn(n) * 3).to(dtype)


def equal(out, expected, dtype, ulps=1):
    """Checks that results are within so many units in the last place. Near zero, a quarter of the units of 1 counts."""
    rtol = ulps * torch.finfo(dtype).eps
    for k, (found, right) in enumerate(zip(out, expected, strict=True)):
        torch.testing.assert_close(
            found.double(), right.double(), atol=rtol / 4, rtol=rtol, msg=lambda m, k=k: f"result {k}: {m}"
        )


MOST_ULPS = 8  # CUDA's programming guide allows these functions up to 6, for lgamma


def test_halves():
    x, y = numbers(torch.float16)
    a, b = x.double(), y.double()
    expected = [
        *(a + b, a - b, a * b, a * b + a, a / b, torch.maximum(a, b), torch.minimum(a, b), -a, a.abs()),
        *((a + b).clamp(0, 1), (a * b + a).relu(), torch.where(a < b, a, b), a.floor(), a.round(), a.trunc()),
        *(a.exp(), a.exp2(), a.abs().log(), a.abs().sqrt(), 1 / a, a.sin(), a.tanh()),
    ]
    equal(results("halves", 22, x, y), expected, torch.float16)


@pytest.mark.parametrize("kernel, dtype", (("half_pairs", torch.float16), ("bfloat_pairs", torch.bfloat16)))
def test_pairs(kernel, dtype):
    x, y = numbers(dtype, 2 * N)
    a, b = x.double(), y.double()
    expected = [
        *(a + b, a - b, a * b, a * b + a, a / b, torch.maximum(a, b), torch.minimum(a, b), -a, a.abs(), a > b),
        *(a.exp(), a.abs().sqrt()),
    ]
    equal(results(kernel, 12, x, y), expected, dtype)


def test_floats():
    x, y = numbers(torch.float32)
    a, b = x.double(), y.double()
    m = a.abs()
    expected = [
        *(a.exp(), a.exp2(), m.log(), m.log1p(), m**b, a.sin(), (x * 1e6).double().sin(), a.cos(), a.tan(), a.tanh()),
        *(
            a.erf(),
            m.sqrt(),
            m.rsqrt(),
            a / b,
            torch.fmod(a, b),
            torch.hypot(a, b),
            torch.atan2(a, b),
            (m + 1).lgamma(),
        ),
        *(a.floor(), a.round(), a.trunc(), torch.minimum(a, b), torch.copysign(a, b), a * 8, a.clamp(0, 1), a.exp()),
        *(a / b, a.round(), (x * 1e6).trunc(), (x * 10).trunc()),
    ]
    equal(results("floats", 30, x, y), expected, torch.float32, MOST_ULPS)


def neighbours(exact: Fraction) -> tuple[float, float]:
    """The two float32 numbers around an exact number, or the number itself twice."""
    near = np.float32(float(exact))
    if Fraction(float(near)) == exact:
        return float(near), float(near)
    below = near if Fraction(float(near)) < exact else np.nextafter(near, np.float32(-np.inf))
    return float(below), float(np.nextafter(below, np.float32(np.inf)))


def in_all_modes(exact: Fraction) -> list[float]:
    below, above = neighbours(exact)
    nearest = above if exact - Fraction(below) > Fraction(above) - exact else below
    if below != above and exact - Fraction(below) == Fraction(above) - exact:
        nearest = below if np.float32(below).view(np.uint32) % 2 == 0 else above
    return [nearest, below if exact > 0 else above, below, above]


def root_in_all_modes(x: float) -> list[float]:
    exact = Fraction(math.isqrt(int(Fraction(x) * 4**80)), 2**80)  # exact enough for roots of float32
    if exact * exact == Fraction(x):
        return [float(exact)] * 4
    return in_all_modes(exact + Fraction(1, 2**90))


def test_rounding():
    """Rounding to nearest, to zero, down and up, against exact fractions."""
    x, y = numbers(torch.float32)
    out = results("rounded", 20, x, y)
    for lane in range(N):
        a, b = Fraction(float(x[lane])), Fraction(float(y[lane]))
        expected = [*in_all_modes(a + b), *in_all_modes(a * b), *in_all_modes(a / b), *root_in_all_modes(abs(float(a)))]
        assert out[:, lane].tolist() == [*expected, *in_all_modes(a * b + abs(a))]


def test_doubles():
    a, b = numbers(torch.float64)
    m = a.abs()
    expected = [
        *(a + b, a * b, a / b, a * b + a, m.sqrt(), m.rsqrt(), a.exp(), m.log(), a.sin(), a.cos(), a.atan(), a.tanh()),
        *(
            a.erf(),
            m**b,
            a.floor(),
            torch.minimum(a, b),
            1 / b,
            a.trunc(),
            a.float(),
            (a * 1e9).trunc(),
            (m * 1e9).trunc(),
        ),
    ]
    equal(results("doubles", 21, a, b), expected, torch.float64, MOST_ULPS)


def signed(x: int, bits: int = 32) -> int:
    return (x + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


def bytes_of(x: int, negative: bool) -> list[int]:
    found = [x >> 8 * k & 255 for k in range(4)]
    return [signed(v, 8) for v in found] if negative else found


def packed(values: list[int]) -> int:
    return sum((v & 255) << 8 * k for k, v in enumerate(values))


def truncated(p: int, q: int) -> int:
    return abs(p) // abs(q) * (1 if (p < 0) == (q < 0) else -1)


def reversed_bits(x: int, n: int) -> int:
    return int(f"{x % 2**n:0{n}b}"[::-1], 2)


def integer_results(a: int, b: int) -> list[int]:
    ua, ub, p = a % 2**32, b % 2**32, a * b
    quotient, both, n = truncated(a, b), (b % 2**32) << 32 | (a % 2**32), b & 31
    return [
        *(quotient, a - quotient * b, ua // ub, ua % ub, truncated(p, 77), p - truncated(p, 1013) * 1013, p >> 13),
        *(p >> 32, ua * ub >> 32, signed(a, 24) * signed(b, 24), a * b * a >> 40),
        *(ua.bit_count(), 32 - ua.bit_length(), (ua & -ua).bit_length(), reversed_bits(a, 32)),
        *((p % 2**64).bit_count(), 64 - (p % 2**64).bit_length(), reversed_bits(p, 64)),
        packed([both >> 8 * s for s in (0, 4, 1, 5)]),
        *((both << n) >> 32, a << n, ua >> n, a >> n),
        sum(i * j for i, j in zip(bytes_of(a, True), bytes_of(b, True))) + 7,
        packed([i + j for i, j in zip(bytes_of(a, False), bytes_of(b, False))]),
        packed([max(i, j) for i, j in zip(bytes_of(a, True), bytes_of(b, True))]),
        *(abs(a - b) + 3, abs(ua - ub) + 2, min(a, b), abs(a), (a + b) >> 1, (a + b + 1) >> 1),
        *(signed(a, 16), signed(a, 8), struct.unpack("<i", struct.pack("<f", np.float32(a)))[0]),
    ]


def test_integers():
    torch.manual_seed(0)
    x = torch.randint(-(2**31) + 1, 2**31 - 1, (N,), dtype=torch.int32)
    y = torch.randint(1, 2**20, (N,), dtype=torch.int32) * (torch.randint(0, 2, (N,), dtype=torch.int32) * 2 - 1)
    out = results("integers", 35, x, y)
    for lane in range(N):
        assert out[:, lane].tolist() == [signed(v) for v in integer_results(int(x[lane]), int(y[lane]))]


def test_warps_and_cooperative_groups():
    torch.manual_seed(0)
    x = torch.randint(-100, 100, (N,), dtype=torch.int32)
    w, lane = x.view(2, 32), torch.arange(32)
    fours = x.view(-1, 4).max(1, keepdim=True)[0].expand(16, 4)
    same = torch.tensor(
        [[sum(1 << k for k in range(32) if (r[k] - r[j]) % 4 == 0) for j in range(32)] for r in w.tolist()]
    )
    expected = [
        *(w[:, lane ^ 5], w.gather(1, (w & 31).long()), w.sum(1, keepdim=True), w[:, lane ^ 1]),
        *(
            ((w > 0).long() << lane).sum(1, keepdim=True),
            same,
            w.sum(1, keepdim=True),
            fours,
            lane,
            torch.arange(N) // 4,
        ),
        *((x > 0).sum(), (x > 90).any(), (x > -200).all(), torch.where(w % 2 == 1, (w % 2).sum(1, keepdim=True), -1)),
    ]
    out = results("warps", 14, x)
    for k, right in enumerate(expected):
        whole = right if right.numel() == N else right.expand(2, 32)
        assert out[k].tolist() == [signed(int(v)) for v in whole.reshape(-1)], k


def test_pipeline():
    x, out = torch.randn(5 * 128), torch.zeros(128)
    launch("pipeline", x, out, 5, block=128)
    torch.testing.assert_close(out, x.view(5, 128).flip(1).sum(0))


def call_result(t: int) -> int:
    a, b = 0, 1
    for _ in range(t & 15):
        a, b = b, a + b
    v = sum(((i * 7 + t) & 15) * t for i in range(5)) + a + t * (t % 10) + [1, 2, 3, 4][t & 3]
    return [v + 1, v * 2, v - 5, v ^ 3, ~v, v << 1, 0, 0][t & 7]


def test_calls():
    out = torch.zeros(N, dtype=torch.int32)
    launch("calls", out, 5)
    assert out.tolist() == [call_result(t) for t in range(N)]


@pytest.mark.parametrize("stride, passes", ((64, 32), (72, 4)))
def test_bank_conflicts_of_ldmatrix(stride, passes):
    """Rows of 128 bytes share 4 banks: 8 passes for each of 4 matrices. With 16 bytes more, they share no bank."""
    out = torch.zeros(4, 32, dtype=torch.int32)
    found = launch("load_matrix", out, stride, block=32)
    pairs = torch.tensor([[2 * (t % 4), 2 * (t % 4) + 1] for t in range(32)]).half()
    assert torch.equal(out.view(torch.float16).view(4, 32, 2), pairs.expand(4, 32, 2))
    counted = found.per_source[line_of("// the load")]
    assert counted["shared_load_requests"] == 1 and counted["shared_load_wavefronts"] == passes
    text = f"shared load: 32.00 wavefronts a request, {passes - 4} by bank conflicts"
    assert found.inefficient().get(line_of("// the load")) == (text if passes > 4 else None)


def test_threads_that_exit_before_a_barrier():
    """Exited threads count as arrived, as on GPUs since Volta, and a note says so."""
    out = torch.zeros(128, dtype=torch.int32)
    found = launch("leaves_early", out, block=128)
    (note,) = found.notes
    assert note.source == line_of("// the barrier") and "64 threads have exited" in note.message
    assert out.tolist() == [0] * 64 + [1] * 64
