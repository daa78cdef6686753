"""Triton kernels for test_triton_language.py. Each uses one part of the language."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def cumulative_sum(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.cumsum(tl.load(x + i), 0))


@triton.jit
def sort(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.sort(tl.load(x + i)))


@triton.jit
def extremes(x, y, N: tl.constexpr):
    v = tl.load(x + tl.arange(0, N))
    tl.store(y, tl.argmax(v, 0))
    tl.store(y + 1, tl.argmin(v, 0))


@triton.jit
def histogram(x, y, N: tl.constexpr, BINS: tl.constexpr):
    tl.store(y + tl.arange(0, BINS), tl.histogram(tl.load(x + tl.arange(0, N)), BINS))


@triton.jit
def dot(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    x, y = tl.load(a + m * K + k[None, :]), tl.load(b + k[:, None] * N + n)
    tl.store(c + m * N + n, tl.dot(x, y, input_precision=PRECISION, out_dtype=SUM))


@triton.jit
def functions(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    a = tl.abs(v)
    tl.store(y + 0 * N + i, tl.erf(v))
    tl.store(y + 1 * N + i, tl.sin(v))
    tl.store(y + 2 * N + i, tl.cos(v))
    tl.store(y + 3 * N + i, tl.sqrt(a))
    tl.store(y + 4 * N + i, tl.rsqrt(a))
    tl.store(y + 5 * N + i, tl.floor(v))
    tl.store(y + 6 * N + i, tl.ceil(v))
    tl.store(y + 7 * N + i, libdevice.tanh(v))
    tl.store(y + 8 * N + i, libdevice.pow(a, 1.7))
    tl.store(y + 9 * N + i, tl.div_rn(v, 3.1))
    tl.store(y + 10 * N + i, tl.sqrt_rn(a))
    tl.store(y + 11 * N + i, libdevice.log1p(a))
    tl.store(y + 12 * N + i, libdevice.expm1(v))
    tl.store(y + 13 * N + i, libdevice.rint(v))
    tl.store(y + 14 * N + i, tl.exp2(v))
    tl.store(y + 15 * N + i, tl.log2(a))


@triton.jit
def integers(x, z, y, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(z + i)
    tl.store(y + 0 * N + i, a // b)
    tl.store(y + 1 * N + i, a % b)
    tl.store(y + 2 * N + i, a * b)
    tl.store(y + 3 * N + i, tl.minimum(a, b))
    tl.store(y + 4 * N + i, a ^ b)
    tl.store(y + 5 * N + i, a >> 3)
    tl.store(y + 6 * N + i, tl.abs(a))


@triton.jit
def high_product(x, z, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.umulhi(tl.load(x + i), tl.load(z + i)))


@triton.jit
def atomics(x, y, N: tl.constexpr, OP: tl.constexpr):
    """N values on four places."""
    i = tl.arange(0, N)
    v, place = tl.load(x + i), y + i % 4
    if OP == "add":
        tl.atomic_add(place, v)
    elif OP == "max":
        tl.atomic_max(place, v)
    elif OP == "min":
        tl.atomic_min(place, v)
    elif OP == "and":
        tl.atomic_and(place, v)
    elif OP == "or":
        tl.atomic_or(place, v)
    elif OP == "xor":
        tl.atomic_xor(place, v)
    elif OP == "xchg":
        tl.atomic_xchg(place, v)
    elif OP == "cas":
        tl.atomic_cas(place, v * 0, v)


@triton.jit
def cast(x, y, N: tl.constexpr, TO: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(TO))


@triton.jit
def random(y, seed, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.randn(seed, i))
    tl.store(y + N + i, tl.rand(seed, i))


@triton.jit
def gather(x, index, y, N: tl.constexpr, M: tl.constexpr):
    m = tl.arange(0, M)
    tl.store(y + m, tl.gather(tl.load(x + tl.arange(0, N)), tl.load(index + m), 0))


@triton.jit
def transpose(x, y, N: tl.constexpr, M: tl.constexpr):
    n, m = tl.arange(0, N), tl.arange(0, M)
    tl.store(y + m[:, None] * N + n[None, :], tl.trans(tl.load(x + n[:, None] * M + m[None, :])))


@triton.jit
def reductions(x, y, N: tl.constexpr, M: tl.constexpr):
    n, m = tl.arange(0, N), tl.arange(0, M)
    v = tl.load(x + n[:, None] * M + m[None, :])
    tl.store(y + m, tl.sum(v, 0))
    tl.store(y + M + n, tl.max(v, 1))


@triton.jit
def speak(x, N: tl.constexpr):
    tl.device_print("value", tl.load(x + tl.arange(0, N)))
