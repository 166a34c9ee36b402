"""Every op x case x property. Integers are compared for equality, never within a tolerance."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from harness import (
    STEP,
    CaseNet,
    Ties,
    choose_shifts,
    converted,
    inputs,
    keep_batch_statistics,
    place_inputs,
    spread_outputs,
    tied_inputs,
)
from torch import Tensor, nn

import linger
from linger.numerics import grid_of, levels
from linger.ops import CASES, MODULES, Case, IntModule, elementwise, pool
from linger.verify import LEVELS, session

SATURATES = ("conv", "transposed", "linear", "bn", "add", "sub", "mul", "div", "sum", "cat", "stack")
ONE_SIDED = (
    "mul-by-0",
    "conv-bn-gamma-0",
    "add-scalar",
    "add-scalar-left",
    "sub-scalar-left",
)  # constant, or one operand is
SHIFTS_OF = (
    "conv1d", "conv2d-groups", "conv2d-K4608", "transposed2d", "linear-3d", "linear-K4608", "bn2d", "add", "mul", "sum", "cat",
)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
IDS = [case.name for case in CASES]
WITH_CASES = [module for module in MODULES if getattr(module, "CASES", ())]
SATURATING = [case for case in CASES if case.name.startswith(SATURATES) and case.name not in ONE_SIDED]
SHIFTED = [case for case in CASES if case.name in SHIFTS_OF]
SHIFTS = (-4, -1, *range(6), 8, 11, *range(13, 19), 21, 24)  # the fastest forms are exact up to 14
ON = [(case, target) for case in CASES for target in case.targets]
ON_IDS = [case.name if target == "venus" else f"{case.name}-{target}" for case, target in ON]
FACTORS = (2.0**-6, 2.0**-1, 1.0, 2.0**3, 2.0**7)  # from saturation of nearly everything to a far shift
ELEMENTS = 1_000_000  # of every op, each compared in five runners
# Ops whose roundings ``Ties`` watches; the others round nothing, or by tables and steps with tests of their own.
WATCHED = {
    "quant",
    "conv",
    "conv_transpose",
    "convbn",
    "linear",
    "bmm",
    "batchnorm",
    "elementwise",
    "divide",
    "reduce",
    "cat",
    "pool",
}
EXTRA = {pool.__name__: (Case(name="avg-pool1d-4", make=lambda: nn.AvgPool1d(4, stride=1), shapes=((2, 3, 64),)),)}


def check(net: CaseNet, case: Case, bits: int, path: Path, dialect: str, batches: tuple[int, ...], seed: int) -> int:
    """Export, and compare every batch size everywhere; returns the number of elements compared per runner."""
    names = [f"x{i}" for i in range(len(case.shapes))]
    axes = {n: {0: "batch"} for n in names}
    sample = inputs(case, bits, max(2, case.shapes[0][0]), seed)
    linger.onnx.export(net, sample, path, input_names=names, dynamic_axes=axes, dialect=dialect)
    compared = 0
    for batch in batches:
        report = linger.verify(net, path, inputs(case, bits, batch, seed + batch), quiet=True)
        assert report.equal, f"{case.name}, batch {batch}: {report}"
        assert set(LEVELS) <= set(report.differing)
        compared += report.elements
    return compared


@pytest.mark.parametrize("dialect", ["thinker", "standard"])
@pytest.mark.parametrize(("case", "target"), ON, ids=ON_IDS)
def test_equal_everywhere(case: Case, target: str, dialect: str, tmp_path: Path) -> None:
    """PyTorch eval == linger.runtime == ONNX Runtime at its four levels, from saturation to far shifts."""
    for bits in case.bits:
        for i, factor in enumerate(FACTORS):
            net = converted(case, bits, target=target)
            spread_outputs(net, factor)
            assert check(net, case, bits, tmp_path / "case.onnx", dialect, (1, 7), 100 * i) > 0


@pytest.mark.parametrize(("case", "target"), ON, ids=ON_IDS)
def test_empty_batch(case: Case, target: str, tmp_path: Path) -> None:
    net = converted(case, target=target)
    empty = inputs(case, 8, 0, 0)
    with torch.no_grad():
        assert net(*empty).shape[0] == 0 or net(*empty).numel() == 0
    check(net, case, 8, tmp_path / "case.onnx", "thinker", (0,), 0)


@pytest.mark.parametrize(("case", "target"), ON, ids=ON_IDS)
def test_training_forward_is_the_eval_forward(case: Case, target: str) -> None:
    """On the statistics that a training forward leaves behind, eval gives the same values, after the first batch too."""
    for bits in case.bits:
        net = converted(case, bits, target=target)
        keep_batch_statistics(net)
        for seed in range(3):
            before = [b.clone() for b in net.buffers()]
            x = inputs(case, bits, 3, seed)
            trained: Tensor = net.train()(*x)
            assert any(not torch.equal(old, new) for old, new in zip(before, net.buffers(), strict=True))
            with torch.no_grad():
                assert torch.equal(net.eval()(*x), trained)


@pytest.mark.parametrize("case", SATURATING, ids=[case.name for case in SATURATING])
def test_saturation_at_both_ends(case: Case, tmp_path: Path) -> None:
    """Results far beyond the range are the lowest and the highest integer, everywhere; so are inputs at their limits."""
    net = converted(case)
    spread_outputs(net, 2.0**-6)
    lowest = tuple(torch.full((1, *shape[1:]), -128 * STEP) for shape in case.shapes)
    x = tuple(torch.cat([low, -low, t]) for low, t in zip(lowest, inputs(case, 8, 20, 1), strict=True))
    linger.onnx.export(net, x, tmp_path / "case.onnx")
    report = linger.verify(net, tmp_path / "case.onnx", x, quiet=True)
    assert report.equal, str(report)
    with torch.no_grad():
        out = net(*x)
    step = float(out.max()) / 127
    assert math.frexp(step)[0] == 0.5
    assert float(out.min()) == -128 * step


def shifted(proto: onnx.ModelProto, scale: float, path: Path) -> onnx.ModelProto:
    """The file with another output scale, also saved at ``path``."""
    new = onnx.ModelProto()
    new.CopyFrom(proto)
    for node in new.graph.node:
        for attribute in node.attribute:
            if attribute.name == "scale_o":
                attribute.f = scale
    onnx.save(new, path)
    return new


@pytest.mark.parametrize("case", SHIFTED, ids=[case.name for case in SHIFTED])
def test_every_shift(case: Case, tmp_path: Path) -> None:
    """Shifts by 0 to 24 bits are equal everywhere, K = 4608 included, and to the left in the runtime and ONNX Runtime."""
    net, path = converted(case), tmp_path / "case.onnx"
    proto = linger.onnx.export(net, inputs(case, 8, 2, 0), path, input_names=[f"x{i}" for i in range(len(case.shapes))])
    (op,) = [m for m in net.modules() if isinstance(m, IntModule) and "running_o" in m._buffers]
    finest = 1 / STEP
    if op.weighted or isinstance(op, elementwise.MulSite):
        finest *= float(op.derived()["scale_w"]) if op.weighted else 1 / STEP
    x = inputs(case, 8, 2, 1)
    for shift in SHIFTS:
        file = shifted(proto, finest / 2.0**shift, path)
        if shift >= 0:
            op.running("o").fill_(levels(8) / finest * 2.0**shift)
            assert linger.verify(net, path, x, quiet=True).equal, shift
        expected = linger.runtime.load(path)(*x)
        for level in LEVELS:
            feed = {f"x{i}": t.numpy() for i, t in enumerate(x)}
            assert np.array_equal(session(file, level).run(None, feed)[0], expected), (shift, level)


@pytest.mark.parametrize("bits", [32])
@pytest.mark.parametrize(("case", "target"), ON, ids=ON_IDS)
def test_32_bit_results(case: Case, target: str, bits: int, tmp_path: Path) -> None:
    """32-bit activations: no integer is lost to float32, and nothing is shifted out."""
    net = converted(case, bits, target=target)
    check(net, case, bits, tmp_path / "case.onnx", "thinker", (1, 7), 5)


def grouped(cases: tuple[Case, ...], folder: Path) -> dict[str, list[tuple[Case, CaseNet, Path, Any]]]:
    """The cases by the op that their file ends with, converted with output grids full of ties, and exported."""
    groups: dict[str, list[tuple[Case, CaseNet, Path, Any]]] = {}
    for case in cases:
        net, path = converted(case), folder / f"{case.name}.onnx"
        ties = choose_shifts(net)
        names = [f"x{i}" for i in range(len(case.shapes))]
        proto = linger.onnx.export(
            net, inputs(case, 8, 2, 0), path, input_names=names, dynamic_axes={n: {0: "batch"} for n in names}
        )
        ops = [n.op_type for n in proto.graph.node if n.domain == "thinker" and n.op_type not in ("Quant", "Dequant")]
        op = next((op for op in reversed(ops) if op != "Squeeze"), "Quant")
        groups.setdefault(op, []).append((case, net, path, ties))
    return groups


@pytest.mark.parametrize("module", WITH_CASES, ids=lambda m: m.__name__.rpartition(".")[2])
def test_a_million_elements(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 10^6 elements of every op are equal everywhere, a tenth or more of them from ties that did not saturate."""
    ties = Ties(monkeypatch)
    own = {op.name for op in module.OPS}
    watched = own if module.__name__.rpartition(".")[2] in WATCHED else set()
    for op, group in grouped(module.CASES + EXTRA.get(module.__name__, ()), tmp_path).items():
        done = ties.count = seed = 0
        while done < (ELEMENTS if op in own else 1):
            seed += 1
            for case, net, path, how in group:
                batch = 250_000 // sum(math.prod(shape[1:]) for shape in case.shapes)
                x = inputs(case, 8, batch, seed) if op == "Quant" else tied_inputs(case, batch, seed, *how)
                report = linger.verify(net, path, x, quiet=True)
                assert report.equal, f"{case.name}, batch {batch}: {report}"
                done += report.elements
                ties.count += half_steps(x) if op == "Quant" else 0
        assert ties.count >= done / 10 or op not in watched, f"{op}: {ties.count} ties in {done}"


def half_steps(x: tuple[Tensor, ...]) -> int:
    """How many 8-bit inputs lie exactly between two integers that are not limits."""
    q = torch.cat([t.flatten() for t in x]) / STEP
    return int(((q % 1 == 0.5) & (q.abs() < 127)).sum())


class Alone(nn.Module):
    """The case as a user's module, without anything that puts its inputs on a grid."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        made = case.make()
        self.op = made if isinstance(made, nn.Module) else None
        self.function = made if self.op is None else None

    def forward(self, *inputs: Tensor) -> Tensor:
        return (self.op if self.function is None else self.function)(*inputs)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_left_in_float(case: Case) -> None:
    """After disable_quant, conversion changes no bit of results, gradients and statistics."""
    net = Alone(case)
    other = copy.deepcopy(net)
    linger.disable_quant(other)
    linger.init(other)
    for training in (True, False):
        x, y = ([t.requires_grad_() for t in inputs(case, 8, 3, 1)] for _ in range(2))
        outs = net.train(training)(*x), other.train(training)(*y)
        assert torch.equal(*outs)
        for out in outs:
            out.square().sum().backward()
        for p, q in zip((*x, *net.parameters()), (*y, *other.parameters()), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert torch.equal(p.grad, q.grad)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in net.state_dict().items())


LAYERS = [case for case in CASES if case.name.startswith(("conv", "transposed", "linear", "bn"))]
# How far a call with inputs on their grid may be off, in half LSB of its result: one for each rounding on the way.
ROUNDINGS = {
    "add": 3, "add-broadcast": 3, "sub": 3, "mul": 1, "mul-broadcast": 1, "div": 1, "div-broadcast": 1, "div-scalar": 1, "cat": 1,
    "cat-last": 1, "stack": 1, "sum": 1, "sum-keepdim": 1, "mean-10": 1, "mean-16": 1, "avg-pool2d-6": 1, "adaptive-2x3": 1,
}  # fmt: skip
CALLS = [case for case in CASES if case.name in ROUNDINGS]


def sixteen_bits(case: Case, x: tuple[Tensor, ...]) -> tuple[CaseNet, Tensor]:
    """The case at 16 bits with grids that nothing saturates, and its result."""
    net = CaseNet(case, 16)
    linger.trace_layers(net, net, x)
    linger.init(net, data_bits=16, parameter_bits=16, out_bits=16)
    keep_batch_statistics(net)
    net(*x)
    place_inputs(net, 16)
    spread_outputs(net, 2.0)
    with torch.no_grad():
        return net, net.eval()(*x)


def half_step(t: Tensor) -> float:
    grid = grid_of(t)
    assert grid is not None
    return 0.5 / float(grid.scale)


@pytest.mark.parametrize("case", LAYERS, ids=[case.name for case in LAYERS])
def test_sixteen_bits_approach_the_float_layer(case: Case) -> None:
    """Within |x| e_w + |w| e_x + e_w e_x over every product, e_b and e_o, where e is half an LSB."""
    x = inputs(case, 8, 3, 1)[0] * 0.9
    net, out = sixteen_bits(case, (x,))
    layer: Any = net.op[0] if isinstance(net.op, nn.Sequential) else net.op
    weight, bias = layer.frozen() if case.name.startswith("bn") else (layer.weight, layer.bias)
    e_x, e_w = STEP / 2**9, 0.5 / float(layer.derived()["scale_w"])

    def product(v: Tensor, w: Tensor) -> Tensor:
        if case.name.startswith("bn"):
            return v * w.reshape(1, -1, *[1] * (v.dim() - 2))
        return layer.accumulate(v, w, None)

    v, w = x.double(), weight.detach().double()
    exact = product(v, w)
    if bias is not None:
        exact = exact + bias.detach().double().reshape(-1, *[1] * (w.dim() - 2 if w.dim() > 1 else v.dim() - 2))
    error = product(v.abs() + e_x, torch.full_like(w, e_w)) + product(torch.full_like(v, e_x), w.abs())
    error = error + 2 * e_x * e_w + half_step(out)
    assert ((out - exact).abs() <= error).all()
    assert error.max() < exact.abs().max() / 64 or "gamma" in case.name


@pytest.mark.parametrize("case", CALLS, ids=[case.name for case in CALLS])
def test_sixteen_bits_approach_the_float_call(case: Case) -> None:
    x = tuple((t * 0.9 / STEP * 2**8).floor() * STEP / 2**8 for t in inputs(case, 8, 3, 1))
    _, out = sixteen_bits(case, x)
    exact = case.make()(*(t.double() for t in x))
    assert ((out - exact).abs() <= ROUNDINGS[case.name] * half_step(out) + 1e-12).all()
    assert half_step(out) < float(exact.abs().max()) / 2**13
