"""The approximate functions of .f32 and .f64 keep the error bounds of the PTX manual, and give its special values."""

import numpy as np
import pytest
from elementwise import apply

INF, NAN = np.inf, np.nan


def numbers(low: float, high: float, count: int = 20000) -> np.ndarray:
    """Numbers that are spread evenly, and numbers near the ends."""
    x = np.random.default_rng(0).uniform(low, high, count).astype(np.float32)
    return np.concatenate([x, np.float32([low, high]), np.linspace(low, high, 1000, dtype=np.float32)])


def magnitudes(low: int, high: int, count: int = 20000) -> np.ndarray:
    """Numbers that are spread over the exponents of 2."""
    generator = np.random.default_rng(1)
    return (generator.uniform(1, 2, count) * 2.0 ** generator.integers(low, high, count)).astype(np.float32)


def ulps(result: np.ndarray, exact: np.ndarray) -> float:
    spacing = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return float(np.max(np.abs(result.astype(np.float64) - exact) / spacing))


def unary(code: str, x: np.ndarray) -> np.ndarray:
    return apply(f"{code} {{d}}, {{a}};", x.dtype, x)


def check_table(code: str, table: dict[float, float]) -> None:
    """Special values, zeros with their signs."""
    x = np.array(list(table), np.float32)
    y = unary(code, x)
    expected = np.array(list(table.values()), np.float32)
    np.testing.assert_array_equal(y, expected)
    known = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(y)[known], np.signbit(expected)[known])


def test_quotient() -> None:
    """approx: 2 ulp where the divisor's magnitude is in [2^-126, 2^126]; full: 2 ulp always."""
    b = magnitudes(-126, 126)
    a = (b * numbers(-4, 4, len(b))[: len(b)]).astype(np.float32)
    exact = a.astype(np.float64) / b
    for name in "approx", "full":
        assert ulps(apply(f"div.{name}.f32 {{d}}, {{a}}, {{b}};", np.float32, a, b), exact) <= 2


def test_quotient_by_a_large_divisor() -> None:
    """For 2^126 < |b| < 2^128 the result is 0, and NaN if a is an infinity."""
    a = np.float32([1, 1, -3e38, INF, -INF])
    b = np.float32([1.5 * 2.0**126, -1.9 * 2.0**127, 2.0**127, 2.0**127, 2.0**127])
    y = apply("div.approx.f32 {d}, {a}, {b};", np.float32, a, b)
    np.testing.assert_array_equal(y, np.float32([0, 0, 0, NAN, NAN]))


@pytest.mark.parametrize("ftz", ["", ".ftz"])
def test_reciprocal(ftz: str) -> None:
    x = magnitudes(-126, 125)
    assert ulps(unary(f"rcp.approx{ftz}.f32", x), 1 / x.astype(np.float64)) <= 1
    check_table(f"rcp.approx{ftz}.f32", {-INF: -0.0, INF: 0.0, -0.0: -INF, NAN: NAN})
    small = np.float32([2.0**-140, -(2.0**-140)])
    np.testing.assert_array_equal(unary("rcp.approx.ftz.f32", small), np.float32([INF, -INF]))
    large = np.float32([2.0**127])
    np.testing.assert_array_equal(unary("rcp.approx.ftz.f32", large), np.float32([0]))
    np.testing.assert_array_equal(unary("rcp.approx.f32", large), np.float32([2.0**-127]))


def test_roots() -> None:
    """sqrt: relatively within 2^-23; rsqrt: within 2^-22.9."""
    x = magnitudes(-126, 128)
    exact = np.sqrt(x.astype(np.float64))
    assert np.max(np.abs(unary("sqrt.approx.f32", x) / exact - 1)) <= 2.0**-23
    assert np.max(np.abs(unary("rsqrt.approx.f32", x) * exact - 1)) <= 2.0**-22.9
    check_table("sqrt.approx.f32", {-INF: NAN, -1: NAN, -0.0: -0.0, INF: INF, NAN: NAN})
    check_table("rsqrt.approx.f32", {-INF: NAN, -1: NAN, -0.0: -INF, INF: 0.0, NAN: NAN})
    check_table("rsqrt.approx.ftz.f32", {2.0**-140: INF, -(2.0**-140): -INF})


def test_power_of_two() -> None:
    """Within 2 ulp; subnormal inputs give 1."""
    x = numbers(-126, 127.9)
    assert ulps(unary("ex2.approx.f32", x), np.exp2(x.astype(np.float64))) <= 2
    assert ulps(unary("ex2.approx.ftz.f32", x), np.exp2(x.astype(np.float64))) <= 2
    check_table("ex2.approx.f32", {-INF: 0.0, INF: INF, -0.0: 1.0, 2.0**-140: 1.0, 128: INF, -140: 2.0**-140, NAN: NAN})
    check_table("ex2.approx.ftz.f32", {-140: 0.0, 2.0**-140: 1.0})


def test_logarithm() -> None:
    """Within 2^-22 absolutely between 0.5 and 2, relatively elsewhere."""
    near = numbers(0.5, 2)
    exact = np.log2(near.astype(np.float64))
    assert np.max(np.abs(unary("lg2.approx.f32", near) - exact)) <= 2.0**-22
    far = magnitudes(-126, 128)
    far = far[(far < 0.5) | (far > 2)]
    assert np.max(np.abs(unary("lg2.approx.f32", far) / np.log2(far.astype(np.float64)) - 1)) <= 2.0**-22
    check_table("lg2.approx.f32", {-INF: NAN, -1: NAN, -0.0: -INF, INF: INF, 2.0**-140: -140, NAN: NAN})
    check_table("lg2.approx.ftz.f32", {2.0**-140: -INF, -(2.0**-140): -INF})


@pytest.mark.parametrize(("name", "f"), [("sin", np.sin), ("cos", np.cos)])
def test_trigonometry(name: str, f: np.ufunc) -> None:
    """Within 2^-20.5 absolutely between -pi and pi."""
    x = numbers(-np.pi, np.pi)
    for ftz in "", ".ftz":
        assert np.max(np.abs(unary(f"{name}.approx{ftz}.f32", x) - f(x.astype(np.float64)))) <= 2.0**-20.5
    zero = {-0.0: -0.0} if name == "sin" else {-0.0: 1.0}
    check_table(f"{name}.approx.f32", {-INF: NAN, INF: NAN, NAN: NAN, **zero})


def test_hyperbolic_tangent() -> None:
    """Relatively within 2^-11."""
    x = np.concatenate([numbers(-10, 10), magnitudes(-20, 3)])
    exact = np.tanh(x.astype(np.float64))
    assert np.max(np.abs(unary("tanh.approx.f32", x) / exact - 1)[x != 0]) <= 2.0**-11
    check_table("tanh.approx.f32", {-INF: -1.0, INF: 1.0, -0.0: -0.0, NAN: NAN})


def test_double_approximations() -> None:
    """rcp and rsqrt.approx.ftz.f64 give only the upper 32 bits of the result: the error is about 2^-20."""
    x = np.random.default_rng(0).uniform(0.1, 1000, 4096)
    for name, exact in ("rcp", 1 / x), ("rsqrt", 1 / np.sqrt(x)):
        y = unary(f"{name}.approx.ftz.f64", x)
        assert np.max(np.abs(y / exact - 1)) < 2.0**-19
        assert not (y.view(np.uint64) & 0xFFFFFFFF).any()
