"""Variance and standard deviation: the exact rational rounded once, in every runner."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import linger
from linger.numerics import Grid, grid_of, levels, set_grid
from linger.ops import variance
from linger.ops.variance import StdSite, VarSite, integer_sqrt
from linger.targets import TARGETS
from linger.verify import session

LENGTHS = (2, 3, 31, 256, 257, 1000, 2048)
RUN = {"var": variance.run_var, "std": variance.run_std}
SITES = {"var": VarSite, "std": StdSite}
FLOAT = {"var": torch.var, "std": torch.std}


def hard_rows(length: int, bits: int) -> np.ndarray:
    """Constant, one-hot, limits mixed, two neighbours, noise: integers (rows, length)."""
    top = 2 ** (bits - 1)
    rng = np.random.default_rng(length)
    rows = [np.full(length, v) for v in (0, 7, -top)]
    for value in (1, top - 1, -top):
        row = np.zeros(length)
        row[0] = value
        rows.append(row)
    rows.append(np.where(np.arange(length) % 2, top - 1, -top))
    rows.append(np.arange(length) % 2 + 3)
    rows += [rng.integers(-n, n + 1, length) for n in (1, 5, 30, top - 1)]
    return np.stack(rows).astype(np.int64)


def exact(kind: str, q: list[int], c: int, q_x: int, q_o: int, bits: int) -> int:
    """floor(f * 2^q_o + 1/2) in rationals, saturated."""
    n = len(q)
    v = Fraction(n * sum(k * k for k in q) - sum(q) ** 2, n * (n - c)) / Fraction(2) ** (2 * q_x)
    if kind == "var":
        out = math.floor(v * Fraction(2) ** q_o + Fraction(1, 2))
    else:  # the largest k with k - 1/2 <= sqrt(v) * 2^q_o
        square = v * Fraction(4) ** q_o
        out = (math.isqrt(math.floor(4 * square)) + 1) // 2
        assert out == 0 or Fraction(2 * out - 1, 2) ** 2 <= square
        assert Fraction(2 * out + 1, 2) ** 2 > square
    return min(out, levels(bits))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("c", [0, 1])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", RUN)
def test_rounded_once(kind: str, length: int, c: int, bits: int) -> None:
    """NumPy and PyTorch against rationals, from outputs far coarser to the finest that is allowed."""
    q, q_x = hard_rows(length, bits), 3
    finest = {"var": 2 * q_x + variance.FINEST_VAR, "std": q_x + variance.FINEST_STD}[kind]
    for q_o in (finest, finest - 1, q_x + 1, 2 * q_x, q_x, 0, -4, -20, -50):
        wanted = [exact(kind, [int(v) for v in row], c, q_x, q_o, bits) for row in q]
        found = RUN[kind](q, dims=(1,), correction=c, scale_x=2.0**q_x, scale_o=2.0**q_o, o_bits=bits)
        assert found.tolist() == wanted
        assert pytorch(kind, q, c, q_x, q_o, bits).tolist() == wanted


def pytorch(kind: str, q: np.ndarray, c: int, q_x: int, q_o: int, bits: int) -> Tensor:
    site = SITES[kind]()
    site.eval().running("o").fill_(levels(bits) / 2.0**q_o)
    s_x = torch.tensor(2.0**q_x)
    x = set_grid(torch.tensor(q / 2.0**q_x, dtype=torch.float32), Grid(s_x, bits))
    with torch.no_grad():
        y = site(x, dim=1, correction=c)
    grid = grid_of(y)
    assert grid == Grid(torch.tensor(2.0**q_o), bits)
    return (y * grid.scale).long()


def test_exact_ties_go_up() -> None:
    """q = 0, 1 has the unbiased variance 1/2 and q = 1, -1, 0, 0 the biased 1/2."""
    for row, c in (([0, 1], 1), ([1, -1, 0, 0], 0)):
        assert (
            int(variance.run_var(np.array([row], np.int8), dims=(1,), correction=c, scale_x=1.0, scale_o=1.0)[0]) == 1
        )
        assert int(pytorch("var", np.array([row]), c, 0, 0, 8)[0]) == 1
    for scale, wanted in ((2, 1), (3, 2), (5, 3)):  # the biased deviation of q = -n, n is n: n / 2 is a tie for odd n
        row = np.array([[-scale, scale]])
        assert (
            int(variance.run_std(row.astype(np.int8), dims=(1,), correction=0, scale_x=2.0, scale_o=1.0)[0]) == wanted
        )
        assert int(pytorch("std", row, 0, 1, 0, 8)[0]) == wanted


def test_integer_sqrt() -> None:
    roots = [*range(300), 2**15, 2**20 - 1, 2**26, 2**31 - 1]
    values = [max(r * r + e, 0) for r in roots for e in (-1, 0, 1)] + [2**52 - 1, 2**62 - 1]
    assert integer_sqrt(np.array(values, np.int64)).tolist() == [math.isqrt(v) for v in values]


@pytest.mark.parametrize("error", [-1, 1])
def test_a_square_root_that_is_off_by_one_is_corrected(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """float64's own is right for these integers; a device's may not be."""
    q = hard_rows(257, 8)
    wanted = RUN["std"](q, dims=(1,), correction=1, scale_x=1.0, scale_o=4.0, o_bits=8)
    real = torch.sqrt
    monkeypatch.setattr(torch, "sqrt", lambda t: (real(t).floor() + error).clamp_min(0))
    assert np.array_equal(pytorch("std", q, 1, 0, 2, 8).numpy(), wanted)


class Net(nn.Module):
    """A call on an input of a grid of its own."""

    def __init__(self, function: object, bits: int = 8) -> None:
        super().__init__()
        self.function, self.bits = function, bits

    def forward(self, x: Tensor) -> Tensor:
        return self.function(linger.quant_tensor(self, x, "in", bits=self.bits))


@pytest.mark.parametrize("dialect", ["thinker", "standard"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", RUN)
def test_equal_everywhere(kind: str, length: int, bits: int, dialect: str, tmp_path: Path) -> None:
    """PyTorch, runtime and ONNX Runtime at its four levels, with output grids from saturation to rounding all away."""
    function = FLOAT[kind]
    net = linger.init(Net(lambda x: function(x, -1), bits))
    step = 2.0 ** (4 - bits)
    x = torch.tensor(hard_rows(length, bits) * step, dtype=torch.float32)
    net(x)
    net._linger_round_tensor_iq_tensor_quant_in.running("x").fill_(levels(bits) * step)
    net(x)
    net.eval()
    running = net._modules[f"_linger_round_tensor_iq{kind}_0"].running("o")
    start = float(running)
    for factor in (2.0**-25, 2.0**-4, 1.0, 2.0**9):
        running.fill_(start * factor)
        linger.onnx.export(net, (x,), tmp_path / "n.onnx", dynamic_axes={"x": {0: "batch"}}, dialect=dialect)
        report = linger.verify(net, tmp_path / "n.onnx", x, quiet=True)
        assert report.equal, str(report)
        assert len(report.differing) == (5 if dialect == "thinker" else 4)


SPELLINGS = {
    "all": (lambda x: x.var(), {"dims": (0, 1, 2), "correction": 1, "keepdim": 0, "unbiased": 1}),
    "all-biased": (lambda x: torch.std(x, False), {"dims": (0, 1, 2), "correction": 0, "keepdim": 0, "unbiased": 0}),
    "dim": (lambda x: x.std(1), {"dims": (1,), "correction": 1, "keepdim": 0, "unbiased": 1, "dim": 1}),
    "negative": (
        lambda x: torch.var(x, -1, True, True),
        {"dims": (2,), "correction": 1, "keepdim": 1, "unbiased": 1, "dim": 2},
    ),
    "two": (
        lambda x: x.var(dim=(2, -2), unbiased=False),
        {"dims": (1, 2), "correction": 0, "keepdim": 0, "unbiased": 0},
    ),
    "correction": (
        lambda x: torch.var(x, [1], correction=2),
        {"dims": (1,), "correction": 2, "keepdim": 0, "unbiased": 0, "dim": 1},
    ),
    "axis": (
        lambda x: x.var(axis=1, keepdim=True),
        {"dims": (1,), "correction": 1, "keepdim": 1, "unbiased": 1, "dim": 1},
    ),
    "none": (
        lambda x: torch.std(x, dim=None, correction=0.0),
        {"dims": (0, 1, 2), "correction": 0, "keepdim": 0, "unbiased": 0},
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling(name: str, tmp_path: Path) -> None:
    function, wanted = SPELLINGS[name]
    x = torch.randn(4, 5, 6)
    net = linger.init(Net(function))
    net(x)
    net.eval()
    model = linger.onnx.export(net, (x,), tmp_path / "n.onnx")
    node = next(n for n in model.graph.node if n.op_type in ("iqVar", "iqStd"))
    said = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert {k: tuple(v) if k == "dims" else v for k, v in said.items() if k in wanted} == wanted
    assert ("dim" in said) == ("dim" in wanted)
    assert linger.verify(net, tmp_path / "n.onnx", x, quiet=True).equal
    with torch.no_grad():
        grid = grid_of(net(x))
        assert grid is not None
        plain = function(x).clamp_max(127 / grid.scale)
        assert (net(x) - plain).abs().max() <= 1 / grid.scale + 0.1  # near the float call, so the right one


@pytest.mark.parametrize("function", [torch.var_mean, torch.std_mean])
@pytest.mark.parametrize(
    "call",
    [
        ((), {}),
        ((1,), {}),
        ((False,), {}),
        ((), {"dim": (1, 2), "correction": 0, "keepdim": True}),
        ((2, False, True), {}),
    ],
)
def test_var_mean_is_two_calls(function: object, call: tuple[tuple[object, ...], dict[str, object]]) -> None:
    x = torch.randn(2, 2, 3)
    args, kwargs = call
    net = linger.init(Net(lambda x: torch.cat([t.reshape(1, -1) for t in function(x, *args, **kwargs)]), 16))
    plain = torch.cat([t.reshape(1, -1) for t in function(x, *args, **kwargs)])
    net(x)
    for running in (b for _, b in net.named_buffers()):
        running.mul_(2)  # scales are to the nearest power of two: up to a factor of sqrt(2) saturates
    with torch.no_grad():
        assert (net.eval()(x) - plain).abs().max() < 0.01
    kinds = {type(m).__name__ for m in net.modules()}
    assert {"MeanSite", "VarSite" if function is torch.var_mean else "StdSite"} <= kinds


@pytest.mark.parametrize("kind", RUN)
def test_gradient_is_that_of_the_float_function(kind: str) -> None:
    """Equal to autograd of the float call at the quantized input, and zero for results that saturate."""
    net = linger.init(Net(lambda x: FLOAT[kind](x, 1)))
    x = torch.randint(-100, 100, (4, 50)) / 32.0
    net(x)
    net._linger_round_tensor_iq_tensor_quant_in.running("x").fill_(127 / 32)
    running = net._modules[f"_linger_round_tensor_iq{kind}_0"].running("o")
    seed = torch.randn(4)
    results = []
    for wide in (True, False):
        running.fill_(100.0 if wide else 1e-4)
        net.eval()
        at = x.clone().requires_grad_()
        net(at).backward(seed)
        results.append(at.grad)
    plain = x.clone().requires_grad_()
    FLOAT[kind](plain, 1).backward(seed)
    assert torch.equal(results[0], plain.grad)
    assert not results[1].any()


def test_constant_rows_have_a_gradient_of_zero() -> None:
    net = linger.init(Net(lambda x: x.std(1)))
    x = torch.full((2, 6), 1.5, requires_grad=True)
    net(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 6))


def test_calls_without_a_result_stay_in_float() -> None:
    """Fewer elements than the correction: PyTorch's nan, not an integer; and a correction that is no integer."""
    net = linger.init(Net(lambda x: x.var(1, correction=0.5)))
    assert grid_of(net(torch.randn(3, 4))) is None
    net = linger.init(Net(lambda x: x.var(1)))
    with pytest.warns(UserWarning, match="degrees of freedom"):
        assert net(torch.randn(3, 1)).isnan().all()


def test_too_many_elements() -> None:
    net = linger.init(Net(lambda x: x.var(1), 16))
    with pytest.raises(
        linger.LingerError, match="found 65537 elements, allowed are 65536 at 16 bits; reduce fewer dim"
    ):
        net(torch.randn(1, 2**16 + 1))


def test_a_count_that_changes_with_a_dynamic_axis(tmp_path: Path) -> None:
    net = linger.init(Net(lambda x: x.var(0)))
    net(torch.randn(3, 4))
    with pytest.raises(
        linger.LingerError, match=r"iqvar_0: iqVar of the call at .* changes with dynamic axis 'batch'; fix that axis"
    ):
        linger.onnx.export(net.eval(), (torch.randn(3, 4),), tmp_path / "n.onnx", dynamic_axes={"x": {0: "batch"}})


@pytest.mark.parametrize("opset", [12, 13, 18, 26])
@pytest.mark.parametrize("kind", RUN)
def test_every_opset_and_target(kind: str, opset: int, tmp_path: Path) -> None:
    for chip in TARGETS:
        net = linger.init(Net(lambda x: FLOAT[kind](x, (1, 2), keepdim=True)), target=chip)
        x = torch.randn(3, 4, 5)
        net(x)
        linger.onnx.export(net.eval(), (x,), tmp_path / "n.onnx", opset_version=opset)
        assert linger.verify(net, tmp_path / "n.onnx", x, quiet=True).equal


@pytest.mark.parametrize("opset", [12, 18])
def test_switched_off_it_is_a_float_island(opset: int, tmp_path: Path) -> None:
    functions = [
        lambda x: x.var(1), lambda x: torch.std(x, (1, 2), False, True), lambda x: torch.var_mean(x, 2)[0],
        lambda x: x.var(axis=-1, correction=3),
    ]  # fmt: skip
    for function in functions:
        linger.SetIQTensorVar(False)
        try:
            net = linger.init(Net(function))
        finally:
            linger.SetIQTensorVar(True)
        x = torch.randn(3, 4, 5)
        net(x)
        with pytest.warns(linger.LingerWarning, match=r"in float: .*\((var|std)"):
            linger.onnx.export(
                net.eval(), (x,), tmp_path / "n.onnx", opset_version=opset, dynamic_axes={"x": {0: "batch"}}
            )
        found = session(onnx.load(tmp_path / "n.onnx"), "all").run(None, {"x": x[:2].numpy()})[0]
        assert np.allclose(found, net(x[:2]).detach().numpy(), atol=1e-5)  # float sums in another order


def test_keys_are_upstreams() -> None:
    """One counter for all of a module's functional calls, as upstream had."""
    net = linger.init(Net(lambda x: (x + 1).var(1) * x.var(1)))
    net(torch.randn(4, 6))
    own = {k for k in net.state_dict() if "quant_in" not in k}
    prefix = "_linger_round_tensor_"
    sites = ("iqadd__default_index_0", "iqvar_1", "iqvar_2", "iqmul__default_index_3")
    assert own == {f"{prefix}{s}.{kind}_o" for s in sites for kind in ("running", "scale")}
    fresh = linger.init(Net(lambda x: (x + 1).var(1) * x.var(1)))
    fresh.load_state_dict(net.state_dict())
    x = torch.randn(4, 6)
    assert torch.equal(fresh.eval()(x), copy.deepcopy(net).eval()(x))
