"""mma.sync and movmatrix. Fragments are laid out element by element, as the tables of the PTX manual say."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from programs import errors, kernel, launch, load, run, store

Place = Callable[[int, int], tuple[int, int]]  # (lane, element) -> (row, column)


class Shape(NamedTuple):
    name: str
    m: int
    k: int
    a: Place
    b: Place
    per_a: int  # elements a lane
    per_b: int


def group(lane: int) -> int:
    return lane >> 2


def member(lane: int) -> int:
    return lane % 4


def c_place(lane: int, i: int) -> tuple[int, int]:
    return group(lane) + 8 * (i >= 2), member(lane) * 2 + (i & 1)


K8_16 = Shape(
    "m16n8k8",
    16,
    8,
    lambda lane, i: (group(lane) + 8 * (i >= 2), member(lane) * 2 + (i & 1)),
    lambda lane, i: (member(lane) * 2 + i, group(lane)),
    4,
    2,
)
K16_16 = Shape(
    "m16n8k16",
    16,
    16,
    lambda lane, i: (
        group(lane) + (0 if i < 2 or 4 <= i < 6 else 8),
        member(lane) * 2 + (i & 1) + 8 * (i >= 4),
    ),
    lambda lane, i: (member(lane) * 2 + (i & 1) + 8 * (i >= 2), group(lane)),
    8,
    4,
)
K4_32 = Shape(
    "m16n8k4",
    16,
    4,
    lambda lane, i: (group(lane) + 8 * i, member(lane)),
    lambda lane, i: (member(lane), group(lane)),
    2,
    1,
)
K8_32 = Shape(
    "m16n8k8",
    16,
    8,
    lambda lane, i: (group(lane) + 8 * (i in (1, 3)), member(lane) + 4 * (i >= 2)),
    lambda lane, i: (member(lane) + 4 * i, group(lane)),
    4,
    2,
)
K16_8_SMALL = Shape(
    "m8n8k16",
    8,
    16,
    lambda lane, i: (group(lane), member(lane) * 4 + i),
    lambda lane, i: (member(lane) * 4 + i, group(lane)),
    4,
    4,
)
K16_8 = Shape(
    "m16n8k16",
    16,
    16,
    lambda lane, i: (group(lane) + 8 * (i >= 4), member(lane) * 4 + (i & 3)),
    lambda lane, i: (member(lane) * 4 + i, group(lane)),
    8,
    4,
)
K32_8 = Shape(
    "m16n8k32",
    16,
    32,
    lambda lane, i: (
        group(lane) + (0 if i < 4 or 8 <= i < 12 else 8),
        member(lane) * 4 + (i & 3) + 16 * (i >= 8),
    ),
    lambda lane, i: (member(lane) * 4 + (i & 3) + 16 * (i >= 4), group(lane)),
    16,
    8,
)


def bfloat(x: np.ndarray) -> np.ndarray:
    """bfloat16 as the upper halves of float32. It is exact for the values used here."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


ENCODE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "f16": lambda x: x.astype(np.float16),
    "bf16": bfloat,
    "tf32": lambda x: x.astype(np.float32),
    "f32": lambda x: x.astype(np.float32),
    "s8": lambda x: x.astype(np.int8),
    "u8": lambda x: x.astype(np.uint8),
    "s32": lambda x: x.astype(np.int32),
    "f64": lambda x: x.astype(np.float64),
}


def fragment(matrix: np.ndarray, place: Place, count: int, kind: str) -> np.ndarray:
    """The elements that each lane holds, packed into registers."""
    elements = np.array([[matrix[place(lane, i)] for i in range(count)] for lane in range(32)])
    encoded = np.ascontiguousarray(ENCODE[kind](elements))
    return encoded.view(np.uint64 if kind == "f64" else np.uint32)


def multiply(
    shape: str, types: tuple[str, str, str, str], a: np.ndarray, b: np.ndarray, c: np.ndarray, extra: str = ""
) -> tuple[np.ndarray, dict[str, int]]:
    """Runs one mma on registers (lane, register). Returns the registers of d and the counters."""
    kind, prefix = ("b64", "%rd") if types[0] == "f64" else ("b32", "%r")
    body, names, n = "", [], 0
    for buffer, x in enumerate((a, b, c)):
        registers = [f"{prefix}{n + i}" for i in range(x.shape[1])]
        n += x.shape[1]
        body += "".join(load(r, buffer, kind, i, len(registers)) for i, r in enumerate(registers))
        names.append("{" + ", ".join(registers) + "}")
    d = np.zeros_like(c)
    out = [f"{prefix}{n + i}" for i in range(d.shape[1])]
    d_type, a_type, b_type, c_type = types
    opcode = f"mma.sync.aligned.{shape}.row.col{extra}.{d_type}.{a_type}.{b_type}.{c_type}"
    body += f"{opcode} {{{', '.join(out)}}}, {', '.join(names)};\n"
    body += "".join(store(r, 3, kind, i, len(out)) for i, r in enumerate(out))
    return d, run(body, a, b, c, d)


FLOAT_CASES = [
    (K8_16, ("f16", "f16", "f16", "f16")),
    (K8_16, ("f32", "f16", "f16", "f32")),
    (K8_16, ("f32", "bf16", "bf16", "f32")),
    (K16_16, ("f16", "f16", "f16", "f16")),
    (K16_16, ("f32", "f16", "f16", "f32")),
    (K16_16, ("f32", "bf16", "bf16", "f32")),
    (K4_32, ("f32", "tf32", "tf32", "f32")),
    (K8_32, ("f32", "tf32", "tf32", "f32")),
]
INTEGER_CASES = [
    (shape, ("s32", a, b, "s32")) for shape in (K16_8_SMALL, K16_8, K32_8) for a in ("s8", "u8") for b in ("s8", "u8")
]


def case_id(case: object) -> str:
    return case.name if isinstance(case, Shape) else ".".join(case)  # type: ignore[arg-type]


@pytest.mark.parametrize(("shape", "types"), FLOAT_CASES + INTEGER_CASES, ids=case_id)
def test_product(shape: Shape, types: tuple[str, str, str, str]) -> None:
    """With integers, every sum of products is exact, so that all 16 x 8 results must be equal."""
    rng = np.random.default_rng(shape.m * shape.k + len(types[1]))

    def numbers(kind: str, size: tuple[int, int]) -> np.ndarray:
        low, high = {"s8": (-128, 128), "u8": (0, 256)}.get(kind, (-8, 9))
        return rng.integers(low, high, size)

    a, b = numbers(types[1], (shape.m, shape.k)), numbers(types[2], (shape.k, 8))
    c = rng.integers(-100, 101, (shape.m, 8))
    per_c = shape.m // 4
    d, counters = multiply(
        shape.name,
        types,
        fragment(a, shape.a, shape.per_a, types[1]),
        fragment(b, shape.b, shape.per_b, types[2]),
        fragment(c, c_place, per_c, types[3]),
    )
    np.testing.assert_array_equal(d, fragment(a @ b + c, c_place, per_c, types[0]))
    assert counters["tensor_flops"] == 2 * shape.m * 8 * shape.k
    assert counters["tensor_instructions"] == 1


def test_double() -> None:
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(-9, 9, (8, 4)), rng.integers(-9, 9, (4, 8)), rng.integers(-9, 9, (8, 8))
    d, _ = multiply(
        "m8n8k4",
        ("f64", "f64", "f64", "f64"),
        fragment(a, lambda lane, i: (group(lane), member(lane)), 1, "f64"),
        fragment(b, lambda lane, i: (member(lane), group(lane)), 1, "f64"),
        fragment(c, c_place, 2, "f64"),
    )
    np.testing.assert_array_equal(d, fragment(a @ b + c, c_place, 2, "f64"))


def test_half_accumulators_round_once() -> None:
    """2048 + 1 + 1 + …: if every partial sum were rounded to f16, the sum would stay at 2048."""
    a, b = np.zeros((16, 16)), np.ones((16, 8))
    a[:, :4] = 1
    c = np.full((16, 8), 2048.0)
    d, _ = multiply(
        "m16n8k16",
        ("f16", "f16", "f16", "f16"),
        fragment(a, K16_16.a, 8, "f16"),
        fragment(b, K16_16.b, 4, "f16"),
        fragment(c, c_place, 4, "f16"),
    )
    np.testing.assert_array_equal(d.view(np.float16), np.float16(2052))


def test_tf32_ignores_low_bits() -> None:
    a = np.zeros((16, 8), np.float32)
    a[:, 0] = np.uint32(0x3F801FFF).view(np.float32)  # 1 and all 13 low bits
    b = np.zeros((8, 8), np.float32)
    b[0] = 1
    d, _ = multiply(
        "m16n8k8",
        ("f32", "tf32", "tf32", "f32"),
        fragment(a, K8_32.a, 4, "f32"),
        fragment(b, K8_32.b, 2, "f32"),
        fragment(np.zeros((16, 8)), c_place, 4, "f32"),
    )
    np.testing.assert_array_equal(d.view(np.float32), np.float32(1))


def test_infinity_and_nan() -> None:
    a, b = np.zeros((16, 16)), np.zeros((16, 8))
    a[3, 5], b[5, 2] = np.inf, 2.0
    a[4, 6], b[6, 3] = np.nan, 1.0
    with np.errstate(invalid="ignore"):
        expected = a @ b
    d, _ = multiply(
        "m16n8k16",
        ("f32", "f16", "f16", "f32"),
        fragment(a, K16_16.a, 8, "f16"),
        fragment(b, K16_16.b, 4, "f16"),
        fragment(np.zeros((16, 8)), c_place, 4, "f32"),
    )
    np.testing.assert_array_equal(d.view(np.float32), fragment(expected, c_place, 4, "f32").view(np.float32))


@pytest.mark.parametrize("saturate", [False, True])
def test_overflow(saturate: bool) -> None:
    a, b = np.full((16, 32), 127), np.full((32, 8), 127)
    c = np.full((16, 8), 2**31 - 1)
    c[8:] = -(2**31)
    a[8:] = -128
    d, _ = multiply(
        "m16n8k32",
        ("s32", "s8", "s8", "s32"),
        fragment(a, K32_8.a, 16, "s8"),
        fragment(b, K32_8.b, 8, "s8"),
        fragment(c, c_place, 4, "s32"),
        extra=".satfinite" if saturate else "",
    )
    exact = a.astype(np.int64) @ b + c
    bounded = np.clip(exact, -(2**31), 2**31 - 1) if saturate else exact.astype(np.int32)
    np.testing.assert_array_equal(d, fragment(bounded, c_place, 4, "s32"))


def test_movmatrix() -> None:
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
    registers = fragment_of_16(matrix)
    out = np.zeros((32, 1), np.uint32)
    body = load("%r0", 0, "b32") + "movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r0;\n" + store("%r1", 1, "b32")
    run(body, registers, out)
    np.testing.assert_array_equal(out, fragment_of_16(matrix.T))


def fragment_of_16(matrix: np.ndarray) -> np.ndarray:
    """Lane (g, t) holds elements 2t and 2t + 1 of row g."""
    elements = [[matrix[group(lane), 2 * member(lane) + i] for i in range(2)] for lane in range(32)]
    return np.array(elements, np.uint16).view(np.uint32)


MMA = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f0, %f1, %f2, %f3}, {%r0, %r1}, {%r2}, {%f0, %f1, %f2, %f3};"


def test_needs_the_whole_warp() -> None:
    (error,) = errors("setp.lt.u32 %p0, %thread, 16;\n@%p0 bra done;\n" + MMA + "\ndone:\n")
    assert error["kind"] == "warp"
    assert "lane 0 has exited" in error["message"]
    assert error["instruction"].startswith("mma.sync")
    (error,) = errors(MMA, block=(48, 1, 1))
    assert error["kind"] == "warp"
    assert "lane 16 does not exist" in error["message"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MMA.replace("m16n8k8", "m16n8k4"), "unsupported combination"),
        (MMA.replace(".aligned", ""), "expected mma.sync.aligned"),
        (MMA.replace("{%r0, %r1}", "{%r0}"), "expected 2 registers in a, got 1"),
        ("wmma.load.a.sync.aligned.row.m16n16k16.global.f16 {%r0}, [%rd0], %r1;", "wmma"),
        ("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r0], {%r1};", "stmatrix"),
        (MMA.replace("f16.f16.f32", "e4m3.e4m3.f32"), "e4m3"),
    ],
)
def test_unsupported(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        launch(kernel(text, 0))
    assert "line" in str(caught.value)
