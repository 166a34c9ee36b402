"""Tables of functions: the chips' own against the engine's, all others against 150-digit arithmetic, and their gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mpmath as mp
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from functions import CHIP, CHIPS, EVERYWHERE, OWN, Variant, every_level, peak_of, scales, site

from benchmarks import function_error
from linger.numerics import grid_of, levels, saturate, shift_round
from linger.onnx.builder import DTYPES, Builder
from linger.ops import BY_NAME, Operand
from linger.ops._pwl import evaluate
from linger.ops._unary import integer_table
from linger.targets import TARGETS

GOLDEN = Path(__file__).parent / "golden"
PRECISION = 512  # bits of the high-precision arithmetic
LIBRARY = 1e-13  # relative error of the inexact part that is allowed to a mathematical library
MARGIN = {8: 1e-9, 16: 10 * LIBRARY}  # what an entry's distance to a tie must exceed, in LSB and relative to that part
everywhere = pytest.mark.parametrize(("v", "chip"), EVERYWHERE, ids=lambda p: getattr(p, "name", p))
own_variants = pytest.mark.parametrize("v", [*OWN, *(v for v in CHIP if v.tail)], ids=lambda v: v.name)


# --- the chips' own functions against vectors of the engine


@pytest.mark.parametrize("chip", ["arcs", "venusa"])
@pytest.mark.parametrize("name", ["Sigmoid", "Tanh"])
def test_tables_of_the_engine(chip: str, name: str) -> None:
    """All int8 inputs at 2^0 .. 2^8, and samples of the whole int32 domain at 2^27 around every band."""
    seen = np.load(GOLDEN / chip / "tables" / f"{name.lower()}.npz")
    table = TARGETS[chip].functions[f"iq{name}"]
    function = BY_NAME[f"iq{name}"].integer.functions[""]  # type: ignore[union-attr,operator,index]
    for n in range(9):
        ours = integer_table(function, 2.0**n, 2.0**7, 8, 8, chip, {})
        assert np.array_equal(ours, seen["i8_q0to8_o8"][n])
        z = np.clip(np.arange(-128, 128) << (27 - n), -(2**31), 2**31 - 1)
        assert np.array_equal(evaluate(z, table), seen["i8_q0to8_o32"][n])
    y = evaluate(seen["q27_in"].astype(np.int64), table)
    assert np.array_equal(y, seen["q27_o32_q31"])
    assert np.array_equal(saturate(shift_round(y, 24), 8), seen["q27_o8_q7"])
    if chip == "venusa":
        assert np.array_equal(saturate(shift_round(y, 16), 16), seen["q27_o16_q15"])


@pytest.mark.parametrize("name", ["Sigmoid", "Tanh"])
def test_complete_tables_of_venus(name: str) -> None:
    """All 65,536 inputs at 2^11, to 8 and to 16 bits; in PyTorch too."""
    seen = np.load(GOLDEN / "venus" / "tables" / f"{name.lower()}.npz")
    run = BY_NAME[f"iq{name}"].run
    x = np.arange(-(2**15), 2**15).astype(np.int16)
    for key, bits in (("q11_i16_to_q7_i8", 8), ("q11_i16_to_q15_i16", 16)):
        found = run(x, scale_x=2.0**11, scale_o=2.0 ** (bits - 1), platform="venus", o_bits=bits)
        assert np.array_equal(found, seen[key])
    y = site(f"iq{name.lower()}")(every_level(11, 16)).double() * 2.0**15
    assert np.array_equal(y.numpy(), seen["q11_i16_to_q15_i16"])


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("tag", "value", "level"), [("iqsigmoid", 20.0, 127), ("iqtanh", 20.0, 127), ("iqtanh", -20.0, -128)])  # fmt: skip
def test_saturates_before_the_table(chip: str, tag: str, value: float, level: int) -> None:
    """sigmoid(20) is 127/128 and not 0, from every grid that holds 20."""
    for n in range(-2, 3):
        x = every_level(n)
        assert site(tag, chip)(x)[x == value].item() == level / 128


# --- PyTorch, NumPy and ONNX Runtime


@everywhere
def test_every_level_is_equal(v: Variant, chip: str) -> None:
    """All 256 inputs x scales 2^0 .. 2^15 x output scales from far too fine to too coarse."""
    nodes: list[tuple[Operand, Any, np.ndarray]] = []
    for n in range(16):
        x = every_level(n)
        exact = v.torch(x.double()).float()
        for m in scales(v.function, peak_of(exact))[n % 5 :: 5] or scales(v.function, peak_of(exact)):
            made = site(v.tag, chip, peak=127.0 * 2.0**-m)
            y = made(x, **v.call)
            grid = grid_of(y)
            assert grid is not None
            expected = (y * grid.scale).numpy()
            operand = Operand(scale=2.0**n, bits=8, shape=(256,))
            steps = made.lower((operand,), Operand(scale=float(grid.scale), bits=8, shape=(256,)), v.call)
            q: Any = np.arange(-128, 128).astype(np.int8)
            for step in steps:
                q = BY_NAME[step.op_type].run(q, **TARGETS[chip].attributes(step.attrs))
            assert q.dtype == np.int8
            assert np.array_equal(q, expected), f"2^{n} -> 2^{m}"
            nodes.append((operand, steps, expected))
    assert len(nodes) >= 16
    for found, (_, _, expected) in zip(in_onnx_runtime(chip, [s for _, s, _ in nodes]), nodes, strict=True):
        assert np.array_equal(found, expected)


def in_onnx_runtime(chip: str, lowered: list[Any]) -> list[np.ndarray]:
    """One file with every list of nodes, run on all int8 values."""
    b = Builder(17, TARGETS[chip], ())
    x = b.value("x", ir.DataType.INT8, (256,))
    b.inputs.append((x, (256,)))
    results = []
    for i, steps in enumerate(lowered):
        made: list[ir.Value] = []
        for j, step in enumerate(steps):
            inputs = [x if k == 0 else made[int(k[1:])] for k in step.inputs]
            made.append(b.one(f"y{i}_{j}", step.op_type, inputs, step.attrs, DTYPES[step.bits], (256,), domain="thinker", form=step.form))  # fmt: skip
        results.append(made[-1])
    functions, version = b.functions()
    graph = ir.Graph([x], results, nodes=b.nodes, opset_imports={"": 17, "thinker": 1}, name="functions")
    proto = ir.to_proto(ir.Model(graph, ir_version=version, functions=functions))
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.arange(-128, 128).astype(np.int8)})  # type: ignore[no-any-return]


@everywhere
def test_16_bits(v: Variant, chip: str) -> None:
    """All 65,536 inputs in PyTorch and in NumPy."""
    for n in (0, 7, 14):
        x = every_level(n, 16)
        exact = v.torch(x.double())
        for m in scales(v.function, peak_of(exact.float()), 16)[1:4]:
            y = site(v.tag, chip, peak=32767.0 * 2.0**-m)(x, **v.call)
            assert grid_of(y).bits == 16  # type: ignore[union-attr]
            ours = integer_table(v.function, 2.0**n, 2.0**m, 16, 16, chip, v.said)
            assert np.array_equal(ours, (y.double() * 2.0**m).numpy())


# --- all other functions against high precision


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("tag", ["iqsilu", "iqgelu", "iqmish", "iqlogsigmoid"])
def test_ties_of_what_a_function_approaches(tag: str, bits: int) -> None:
    """silu(37.5) is a little less than 37.5, so at the scale 1 it is 37, whatever double precision holds of the rest."""
    function = site(tag).meant({})[0]
    x = every_level(1, bits)
    half = (x.abs() > 12) & (x % 1 == 0.5) & ((x < 0) if tag == "iqlogsigmoid" else (x > 0))
    expected = (x[half] - 0.5).numpy()
    assert np.array_equal(site(tag, peak=levels(bits))(x)[half].numpy(), expected)
    ours = integer_table(function, 2.0, 1.0, bits, bits, "venus", {})
    assert np.array_equal(ours[half.numpy()], expected)


def levels_of(exponents: range, bits: int = 8) -> np.ndarray:
    return np.unique([every_level(n, bits).double().numpy() for n in exponents])


@own_variants
def test_error_of_both_texts(v: Variant) -> None:
    """The inexact part of f has a relative error below ``LIBRARY`` in PyTorch and in NumPy; the exact part is exact."""
    x = np.union1d(levels_of(range(16)), np.random.default_rng(0).choice(levels_of(range(16), 16), 500))
    lines, rests = parts(v, x)
    assert np.array_equal(lines[0], lines[1])
    for i, value in enumerate(x):
        if v.tail and abs(value) > 16:
            assert all(abs(r[i]) < 1e-4 for r in rests)
            continue
        with mp.workprec(PRECISION):
            rest = v.precise(mp.mpf(float(value))) - mp.mpf(float(lines[0][i]))
        for found in rests:
            if mp.isinf(rest) or not rest:
                assert found[i] == float(rest)
            elif not 1e-300 < abs(rest) < 1e300:
                assert abs(found[i]) in (0.0, np.inf) or 0.5 < abs(mp.mpf(float(found[i])) / rest) < 2
            else:
                assert abs(mp.mpf(float(found[i])) / rest - 1) < LIBRARY


def parts(v: Variant, x: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(lines, rests) of PyTorch and NumPy."""
    with np.errstate(all="ignore"):
        line, rest = v.function.numpy(x, **v.said)
    t = torch.from_numpy(x)
    torch_line = torch.zeros_like(t) if v.function.line is None else v.function.line(t, **v.said).double()
    lines = [torch_line.numpy(), np.broadcast_to(np.asarray(line, float), x.shape)]
    return lines, [v.function.rest(t, **v.said).double().numpy(), np.broadcast_to(rest, x.shape)]


@pytest.mark.parametrize("bits", [8, pytest.param(16, marks=pytest.mark.slow)])
@own_variants
def test_no_entry_depends_on_the_mathematical_library(v: Variant, bits: int) -> None:
    """At 2^0 .. 2^15, to every output scale: no entry lies so near a rounding tie that a library's error could move it.

    An exact tie must be one of f(x) = x^0, e^0, ...: there, the inexact part is exact, in both texts. A function made of
    arithmetic alone asks no library: both texts are the same, to the last bit.
    """
    if v.arithmetic:
        a, b = parts(v, levels_of(range(16), bits))[1]
        assert np.array_equal(a, b)
        return
    for n in range(16):
        x = every_level(n, bits).double().numpy()
        finite = np.isfinite(parts(v, x)[1][0])
        (line, _), (rest, other) = ([p[finite] for p in pair] for pair in parts(v, x))
        for m in output_exponents(v, line + rest, bits):
            held = np.flatnonzero((rest != 0) & (np.abs(line + rest) <= 2.0 ** (bits - 1 - m)))
            scaled = rest[held] * 2.0**m
            near = scaled + np.modf(line[held] * 2.0**m + 0.5)[0]
            least = MARGIN[bits] * np.minimum(np.abs(scaled), 1 if bits == 8 else np.inf)
            for i in held[np.abs(near - np.round(near)) <= least]:
                with mp.workprec(PRECISION):
                    exact = v.precise(mp.mpf(float(x[finite][i])))
                    assert exact == line[i] + rest[i] == line[i] + other[i], f"2^{n} -> 2^{m}: {x[finite][i]}"


def output_exponents(v: Variant, f: np.ndarray, bits: int) -> range:
    """All log2 s_o at which some entry is neither rounded to 0 nor saturated."""
    if v.function.fixed:
        return range(bits - v.function.fixed, bits - v.function.fixed + 1)
    size = np.abs(f[f != 0])
    return range(max(-60, -int(np.frexp(size.max())[1]) - 1), min(60, bits + 1 - int(np.frexp(size.min())[1])) + 1)


def test_the_documented_errors_are_those_of_the_script() -> None:
    """And half an LSB is the most that a correctly rounded function loses, but for a 1 that saturates."""
    page = (Path(__file__).parents[1] / "docs" / "functions.md").read_text("utf-8")
    assert page.endswith(function_error.table())
    rounded = {v.function.op_type for v in OWN if not v.function.fixed}
    assert all(r.max_lsb <= 0.5 for r in function_error.rows() if r.function in rounded)
