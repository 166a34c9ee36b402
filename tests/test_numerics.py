"""Rounding, grids and fake quantization against oracles in exact fractions."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linger.errors import LingerError
from linger.numerics import (
    COARSEST,
    FINEST,
    FLOAT32_EXACT,
    NOTHING,
    WIDEST,
    bound_parameter,
    exact_matmul,
    exponent,
    fake_quant,
    highest,
    int_dtype,
    levels,
    nearest_integer,
    pow2_floor,
    pow2_round,
    quantize,
    quantize_array,
    quantize_number,
    reach,
    saturate,
    scale_from_running,
    scale_from_weight,
    shift_round,
)
from linger.ops._site import scalar_scale
from linger.ops._weighted import room_for_bias, room_for_sum
from linger.ops._weighted_text import split_form
from linger.rounding import divide_half_up, divided_half_up

HALF = Fraction(1, 2)
TIES = (-2.5, -1.5, -0.5, 0.5, 1.5, 2.5)
ROUNDED = [-2, -1, 0, 1, 2, 3]


# --- oracles: exact fractions, no NumPy and no PyTorch arithmetic


def half_up(v: Fraction) -> int:
    return math.floor(v + HALF)


def clamp(q: int, low: int, high: int) -> int:
    return max(low, min(high, q))


def single(v: Fraction) -> Fraction:
    """``v`` rounded to the nearest float32, ties to even; without its limits."""
    if v == 0:
        return v
    n = math.floor(math.log2(abs(v)))
    n += (abs(v) >= Fraction(2) ** (n + 1)) - (abs(v) < Fraction(2) ** n)
    step = Fraction(2) ** max(n - 23, -149)
    return round(v / step) * step


def engine(x: float, n: int, bits: int) -> int:
    """The chip's Quant: clamp(floor(float32(float64(float32(x) * 2^n) + 0.5)))."""
    total = single(Fraction(float(Fraction(x) * Fraction(2) ** n + HALF)))
    return clamp(math.floor(total), -levels(bits) - 1, levels(bits))


def power_below(v: Fraction) -> Fraction:
    """2^floor(log2 v)."""
    n = v.numerator.bit_length() - v.denominator.bit_length()
    return Fraction(2) ** (n if Fraction(2) ** n <= v else n - 1)


def power_near(v: Fraction) -> Fraction:
    """2^round(log2 v): up where v^2 >= 2 * (the power below)^2."""
    low = power_below(v)
    return 2 * low if v * v >= 2 * low * low else low


# --- values near ties and limits


def single_of(v: float) -> float:
    return float(np.float32(v))


@st.composite
def near_steps(draw: st.DrawFn, bits: int, n: int) -> float:
    """A float32 on, half a step off, or one ulp beside a step of the grid 2^-n, often at a limit, else anywhere."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False))
    top = levels(bits)
    q = draw(
        st.one_of(st.sampled_from((-top - 2, -top - 1, -top, -1, 0, 1, top, top + 1)), st.integers(-top - 3, top + 3))
    )
    v = np.float32((q + draw(st.sampled_from((0.0, 0.5, 0.25)))) * 2.0**-n)
    for _ in range(draw(st.integers(0, 2))):
        v = np.nextafter(v, np.float32(draw(st.sampled_from((-math.inf, math.inf)))))
    return float(v)


@st.composite
def quantizations(draw: st.DrawFn, widths: tuple[int, ...]) -> tuple[float, int, int]:
    bits, n = draw(st.sampled_from(widths)), draw(st.integers(-20, 30))
    return draw(near_steps(bits, n)), n, bits


INT64 = st.one_of(
    st.sampled_from((-(2**63), 2**63 - 1)),
    st.integers(-(2**63), 2**63 - 1),
    st.builds(lambda k, d: clamp(2**k + d, -(2**63), 2**63 - 1), st.integers(0, 63), st.integers(-2, 2)),
    st.builds(lambda k, d: clamp(d - 2**k, -(2**63), 2**63 - 1), st.integers(0, 63), st.integers(-2, 2)),
    st.builds(lambda k, m: m * 2**k, st.integers(0, 40), st.integers(-(2**20), 2**20)),
)
POSITIVE = st.floats(2.0**-100, 2.0**100, width=32)


# --- rounding by exact name

ROUNDINGS: dict[str, Callable[[], Any]] = {
    "fake_quant": lambda: fake_quant(torch.tensor(TIES), torch.tensor(1.0), 8).tolist(),
    "fake_quant, float64": lambda: fake_quant(torch.tensor(TIES).double(), torch.tensor(1.0), 8).tolist(),
    "fake_quant, 32 bits": lambda: fake_quant(torch.tensor(TIES), torch.tensor(1.0), 32).tolist(),
    "quantize": lambda: quantize(torch.tensor(TIES), torch.tensor(1.0), 8).tolist(),
    "quantize_array": lambda: quantize_array(np.array(TIES, np.float32), 1.0, 8).tolist(),
    "quantize_array, 32 bits": lambda: quantize_array(np.array(TIES, np.float32), 1.0, 32).tolist(),
    "quantize_number": lambda: [quantize_number(v, 1.0) for v in TIES],
    "shift_round": lambda: shift_round(np.array([2 * v for v in TIES]), 1).tolist(),
    "divide_half_up": lambda: divide_half_up(np.array([int(6 * v) for v in TIES]), 6).tolist(),
    "divide_half_up, int": lambda: [divide_half_up(int(6 * v), 6) for v in TIES],
    "divided_half_up": lambda: divided_half_up(torch.tensor([6 * v for v in TIES], dtype=torch.float64), 6).tolist(),
}


@pytest.mark.parametrize("name", ROUNDINGS)
def test_half_up(name: str) -> None:
    assert ROUNDINGS[name]() == ROUNDED


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_limits(bits: int) -> None:
    """Around both limits, and beyond them up to infinity."""
    top = levels(bits)
    x = [top - 0.5, top, top + 0.25, top + 0.5, top + 9, math.inf, 0.5 - top, -top - 1, -top - 1.5, -top - 2, -math.inf]
    want = [top, top, top, top, top, top, 1 - top, -top - 1, -top - 1, -top - 1, -top - 1]
    for n in (-3, 0, 5):
        scaled = torch.tensor(x) * 2.0**-n
        assert quantize(scaled, torch.tensor(2.0**n), bits).tolist() == want
        assert [quantize_number(v, 2.0**n, bits) for v in scaled.tolist() if math.isfinite(v)] == want[:5] + want[6:-1]
        if bits > 4:
            assert quantize_array(scaled.numpy(), 2.0**n, bits).tolist() == want


def test_the_sum_is_rounded_to_float32() -> None:
    """0.49999997 + 0.5 is 1 in float32, as in the chip; from 17 bits on the sum is exact."""
    below = np.nextafter(np.float32(0.5), np.float32(0))
    assert quantize_array(below[None], 1.0, 8).tolist() == [1]
    assert quantize(torch.tensor([float(below)]), torch.tensor(1.0), 8).tolist() == [1]
    assert quantize_array(below[None], 1.0, 32).tolist() == [0]
    assert quantize(torch.tensor([float(below)]), torch.tensor(1.0), WIDEST).tolist() == [0]


@given(quantizations((4, 8, 16)))
def test_quantizer_is_the_engines(case: tuple[float, int, int]) -> None:
    x, n, bits = case
    want, scale = engine(x, n, bits), torch.tensor(2.0**n)
    assert fake_quant(torch.tensor([x]), scale, bits).tolist() == [want / 2.0**n]
    found = quantize(torch.tensor([x]), scale, bits)
    assert (found.dtype, found.tolist()) == (int_dtype(bits), [want])
    if bits > 4:
        assert quantize_array(np.array([x], np.float32), 2.0**n, bits).tolist() == [want]


@given(quantizations((24, 25, 32)))
def test_wide_quantizer_is_exact(case: tuple[float, int, int]) -> None:
    x, n, bits = case
    want = half_up(Fraction(x) * Fraction(2) ** n)
    assert quantize(torch.tensor([x]), torch.tensor(2.0**n), bits).tolist() == [
        clamp(want, -levels(bits) - 1, highest(bits))
    ]
    assert quantize_array(np.array([x], np.float32), 2.0**n, 32).tolist() == [clamp(want, -(2**24), 2**24 - 1)]


@given(st.integers(-(2**24) + 1, 2**24 - 1), st.integers(0, 40))
def test_accumulators_below_2_to_24_round_exactly_in_float32(acc: int, n: int) -> None:
    """What ``FLOAT32_EXACT`` promises: quantizing acc / 2^n is ``shift_round`` of acc."""
    if abs(acc) < FLOAT32_EXACT:
        want = clamp(int(shift_round(np.array(acc), n)), -128, 127)
        assert quantize(torch.tensor([acc * 2.0**-n]), torch.tensor(1.0), 8).tolist() == [want]


@given(quantizations((4, 8)))
def test_number_is_the_exact_quantizer(case: tuple[float, int, int]) -> None:
    x, n, bits = case
    total = Fraction(float(Fraction(x) * Fraction(2) ** n + HALF))
    assert quantize_number(x, 2.0**n, bits) == clamp(math.floor(total), -levels(bits) - 1, levels(bits))


def test_nan_has_no_integer() -> None:
    with pytest.raises(LingerError, match="found NaN or infinity, allowed are finite numbers"):
        quantize_array(np.array([0.0, math.nan], np.float32), 1.0, 8)
    with pytest.raises(LingerError, match="found NaN or infinity, allowed are finite numbers"):
        quantize(torch.tensor([0.0, math.nan]), torch.tensor(1.0), 8)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_parameters_that_are_not_finite_have_no_scale(bad: float) -> None:
    """NaN reaches the output of the layer, where the check of its range names it."""
    v = torch.tensor([1.0, bad])
    assert scale_from_weight(v, 8).isnan()
    assert room_for_bias(torch.tensor(1.0), torch.tensor(1.0), v).isnan()
    assert bound_parameter(v, 8).isnan().tolist() == [False, True]


@given(INT64, st.integers(1, 70))
def test_shift_right(v: int, n: int) -> None:
    assert int(shift_round(np.array([v]), n)[0]) == half_up(Fraction(v, 2**n))


@given(INT64, st.integers(-70, 0))
def test_shift_left(v: int, n: int) -> None:
    """Exact, but that it stops at +-2^62, far beyond every width."""
    assert int(shift_round(np.array([v]), n)[0]) == clamp(v << -n, -(2**62), 2**62)


@pytest.mark.parametrize("n", range(-4, 30))
def test_shift_of_ties(n: int) -> None:
    v = [k * 2 ** max(n - 1, 0) + d for k in range(-5, 6) for d in (-1, 0, 1)]
    found = shift_round(np.array(v, np.int32), n)
    assert (found.dtype, found.tolist()) == (np.int64, [half_up(Fraction(x) / Fraction(2) ** n) for x in v])


@pytest.mark.parametrize(("bits", "dtype"), [(4, np.int8), (8, np.int8), (16, np.int16), (32, np.int32)])
def test_saturate(bits: int, dtype: type) -> None:
    top = 2 ** (bits - 1) - 1
    found = saturate(np.array([-(2**62), -top - 2, -top - 1, -1, 0, top, top + 1, 2**62]), bits)
    assert (found.dtype, found.tolist()) == (dtype, [-top - 1, -top - 1, -top - 1, -1, 0, top, top, top])
    assert (levels(bits), reach(min(bits, WIDEST)) - 1) == (top, min(top, 2**24 - 1))
    assert highest(bits) == (top if bits < 32 else 2**31 - 128) == int(np.float32(highest(bits)))


@given(st.integers(-(2**40), 2**40), st.integers(1, 2**20))
def test_divisions(n: int, d: int) -> None:
    want = half_up(Fraction(n, d))
    assert divide_half_up(n, d) == want
    assert divide_half_up(np.array([n]), np.array([d])).tolist() == [want]
    exact = torch.tensor([n, n], dtype=torch.float64)
    assert divided_half_up(exact, d).tolist() == [want, want]
    assert divided_half_up(exact, torch.tensor(float(d), dtype=torch.float64)).tolist() == [want, want]


@given(st.integers(-(2**19), 2**19), st.integers(1, 2**12))
def test_sums_come_back_from_float32_means(total: int, k: int) -> None:
    assert nearest_integer((torch.tensor([total / 1.0]) / k).double() * k).tolist() == [total]


@given(st.sampled_from(((7, 7), (15, 7), (24, 15), (31, 30))), st.integers(0, 6), st.integers(0, 2**32))
def test_matmul_is_exact(widths: tuple[int, int], terms: int, seed: int) -> None:
    """Factors near their limits, odd and even; 2^31 * 2^30 is beyond float64."""
    g = np.random.default_rng(seed)
    a, b = (2**n - g.integers(0, 4, size) for n, size in zip(widths, ((2, terms), (terms, 3)), strict=True))
    a, b = a * g.choice((-1, 1), a.shape), b * g.choice((-1, 1), b.shape)
    if sum(widths) == 61:
        a, b = a[:, :1], b[:1]
    want = [[sum(int(x) * int(y) for x, y in zip(row, column, strict=True)) for column in b.T] for row in a]
    found = exact_matmul(a, b)
    assert (found.dtype, found.tolist()) == (np.int64, want)


# --- powers of two


@given(POSITIVE)
def test_powers_of_two(v: float) -> None:
    assert Fraction(pow2_floor(torch.tensor(v)).item()) == power_below(Fraction(v))
    assert Fraction(pow2_round(torch.tensor(v)).item()) == power_near(Fraction(v))


@pytest.mark.parametrize("n", range(-126, 127))
def test_powers_of_two_at_their_edges(n: int) -> None:
    """One ulp around 2^n and around 2^n * sqrt(2)."""
    for edge in (2.0**n, single_of(math.sqrt(2) * 2.0**n)):
        v = np.float32(edge)
        for x in (v, np.nextafter(v, np.float32(0)), np.nextafter(v, np.float32(math.inf))):
            if x >= np.float32(2.0**-126):
                assert Fraction(pow2_floor(torch.tensor(x)).item()) == power_below(Fraction(float(x)))
                assert Fraction(pow2_round(torch.tensor(x)).item()) == power_near(Fraction(float(x)))


@given(st.floats(2.0**-90, 2.0**120, width=32), st.sampled_from((8, 16, 32)))
def test_scale_from_running(running: float, bits: int) -> None:
    quotient = single(Fraction(levels(min(bits, 24))) / Fraction(running))
    want = max(COARSEST, min(FINEST, power_near(quotient)))
    assert scale_from_running(torch.tensor(running), bits).item() == want


@pytest.mark.parametrize("running", [0.0, NOTHING])
def test_scale_of_nothing_is_1(running: float) -> None:
    assert scale_from_running(torch.tensor(running), 8).item() == 1.0


@given(st.lists(st.floats(-(2.0**33), 2.0**33, width=32), min_size=1, max_size=5), st.sampled_from((4, 8, 16)))
def test_scale_from_weight(weight: list[float], bits: int) -> None:
    """Nothing saturates, and one step finer something would; all zeros have scale 2^bits."""
    w, peak = torch.tensor(weight), Fraction(max(map(abs, weight)))
    scale = scale_from_weight(w, bits)
    if peak == 0:
        assert scale.item() == 2.0**bits
        return
    assert exponent(scale.item()) <= 60
    assert np.abs(quantize(w, scale, bits).astype(np.int64)).max() <= levels(bits)
    assert scale.item() == FINEST or single(2 * peak * Fraction(scale.item())) > levels(bits) * (1 - Fraction(2) ** -23)


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from((4, 8, 16)))
def test_scale_of_a_number(value: float, bits: int) -> None:
    scale, top = scalar_scale(value, bits), levels(bits)
    if value == 0:
        assert scale == 2.0**bits
        return
    assert 2.0 ** exponent(scale) == scale
    assert scale == COARSEST or abs(Fraction(value)) * Fraction(scale) <= top * (1 + Fraction(2) ** -52)
    assert scale == FINEST or abs(Fraction(value)) * Fraction(2 * scale) > top * (1 - Fraction(2) ** -52)


@pytest.mark.parametrize("value", [1.0, -0.1, 127 / 64, 3.0, 1e-5, 6.0, -1024.0, 1e-30, 1e30, 0.0])
def test_a_number_has_the_scale_of_a_weight(value: float) -> None:
    assert scalar_scale(value) == scale_from_weight(torch.tensor([value]), 8).item()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_without_a_grid(value: float) -> None:
    with pytest.raises(LingerError, match=f"found the number {value}, allowed are finite ones"):
        scalar_scale(value)


@pytest.mark.parametrize("n", range(-126, 128))
def test_exponent(n: int) -> None:
    assert exponent(2.0**n) == n


@pytest.mark.parametrize("scale", [0.0, -2.0, 3.0, 0.3, 128.00001, math.inf, math.nan])
def test_scales_that_are_no_powers_of_two(scale: float) -> None:
    with pytest.raises(ValueError, match="is not a power of two"):
        exponent(scale)


@given(st.floats(2.0**-30, 2.0**30, width=32), st.integers(-20, 20), st.integers(-20, 20))
def test_room_for_bias(bias: float, n_x: int, n_w: int) -> None:
    """The int32 bias stays within 2^30; the weight's scale changes only where it must, and no more than it must."""
    s_x, s_w = torch.tensor(2.0**n_x), torch.tensor(2.0**n_w)
    found = room_for_bias(s_w, s_x, torch.tensor([0.0, -bias]))
    at = Fraction(bias) * Fraction(2) ** n_x
    assert found.item() == min(Fraction(2) ** n_w, power_below(single(2**30 / at)))
    assert at * Fraction(found.item()) <= 2**30 * (1 + Fraction(2) ** -23)
    assert room_for_bias(s_w, s_x, torch.zeros(3)).item() == s_w.item()


@given(st.floats(1.0, 2.0**60, width=32), st.integers(-30, 30))
def test_room_for_sum(peak: float, n: int) -> None:
    """The finest scale, not finer than the accumulator's, at which the largest sum is an exact float32."""
    found = Fraction(room_for_sum(torch.tensor(2.0**n), torch.tensor(peak)).item()) / Fraction(2) ** n
    assert power_below(found) == found <= 1
    assert Fraction(peak) * found <= 2**24
    assert found == 1 or Fraction(peak) * found * 2 > FLOAT32_EXACT


@pytest.mark.parametrize("data_bits", [8, 16, 32])
@pytest.mark.parametrize("parameter_bits", [4, 8, 16])
@pytest.mark.parametrize("terms", [1, 9, 4608, 9000, 21930, 65792])
def test_split_form(terms: int, data_bits: int, parameter_bits: int) -> None:
    """The pieces cover both widths, and a sum of ``terms`` products of pieces stays below 2^24."""
    pieces, _, rest = split_form(terms, data_bits, parameter_bits)[1:].partition("w")
    count, _, width = rest.partition("p")
    assert int(pieces) * 8 == data_bits
    assert int(count) * int(width) >= parameter_bits
    assert terms * (128 if data_bits == 8 else 255) * (2 ** int(width) - 1) < FLOAT32_EXACT


def test_split_form_of_too_many_terms() -> None:
    with pytest.raises(LingerError, match="sums of 65793 products, allowed are 65792"):
        split_form(65793, 16, 8)
