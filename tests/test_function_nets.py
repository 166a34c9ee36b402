"""Every function of one tensor in one net: opsets, chips, dialects, exporters, compilers, checkpoints, bad input."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from functions import CHIP, CHIPS, OWN
from test_function_calls import Call
from test_interop import described, plain_export
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.numerics import grid_of
from linger.verify import session

ALL = (*CHIP, *OWN)


class Everything(nn.Module):
    """Every function with its numbers, the exact ops, GLU and PReLU, on one gridded tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.prelu = nn.PReLU(6)
        self.hardswish, self.hardsigmoid = nn.Hardswish(), nn.Hardsigmoid()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.fc(x)
        return (*functions(y), self.prelu(y), self.hardswish(y), self.hardsigmoid(y))


CALLED_OTHERWISE = ("iqlog", "iqlog2", "iqsqrt", "iqrsqrt", "iqhardswish", "iqhardsigmoid")


def functions(y: Tensor) -> tuple[Tensor, ...]:
    return (
        *(v.torch(y) for v in ALL if v.tag not in CALLED_OTHERWISE),
        torch.log(y.abs() + 1), torch.log2(y.abs() + 1), torch.sqrt(y.abs()), (y.square() + 0.5).rsqrt(), y**-1,
        -y, torch.sign(y), F.glu(y), F.glu(y, dim=-1), y.clamp(-0.3, 0.6), y.clamp_min(0.1), torch.clip(y, max=0.2),
        F.hardtanh(y, -0.4, 0.5), F.relu6(y),
    )  # fmt: skip


def trained(chip: str = "venus") -> Everything:
    net: Everything = linger.init(Everything(), target=chip)
    for _ in range(2):
        net(torch.randn(9, 6))
    return net.eval()


@pytest.mark.parametrize("opset", [12, 13, 15, 18, 21, 24])
def test_every_opset(opset: int, tmp_path: Path) -> None:
    net = trained()
    linger.onnx.export(
        net, (torch.randn(2, 6),), tmp_path / "net.onnx", opset_version=opset, dynamic_axes={"x": {0: "n"}}
    )
    assert linger.verify(net, tmp_path / "net.onnx", torch.randn(5, 6) * 2, quiet=True).equal


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dialect", ["thinker", "standard"])
def test_every_chip(chip: str, dialect: str, tmp_path: Path) -> None:
    net = trained(chip)
    model = linger.onnx.export(net, (torch.randn(2, 6),), tmp_path / "net.onnx", dialect=dialect)
    assert linger.verify(net, tmp_path / "net.onnx", torch.randn(2, 6) * 2, quiet=True).equal
    assert "float_islands" not in {p.key for p in model.metadata_props}


def test_plain_torch_export(tmp_path: Path) -> None:
    net, x = trained(), torch.randn(3, 6)
    with torch.no_grad():
        net(x)
    theirs = plain_export(net, (x,), tmp_path / "theirs.onnx")
    ours = linger.onnx.export(net, (x,), tmp_path / "ours.onnx", dynamic_axes={"x": {0: "batch"}})
    assert set(map(repr, described(theirs))) == set(map(repr, described(ours)))  # PyTorch writes equal nodes once
    loaded = linger.runtime.load(tmp_path / "theirs.onnx")
    with torch.no_grad():
        assert all(np.array_equal(a, b) for a, b in zip(loaded(x), net(x), strict=True))


def test_qdq(tmp_path: Path) -> None:
    """The same functions on floats between the same grids: within a step of the integers, ties aside."""
    net, x = trained("venusa"), torch.randn(64, 6)
    model = linger.onnx.export(net, (x,), tmp_path / "net.onnx", dialect="qdq", opset_version=21)
    results = session(model, "all").run(None, {"x": x.numpy()})
    with torch.no_grad():
        for found, expected in zip(results, net(x), strict=True):
            step = 1 / float(grid_of(expected).scale)  # type: ignore[union-attr]
            assert np.abs(found - expected.numpy()).max() <= 2 * step


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own compiler
def test_compiled() -> None:
    """fullgraph, with gradients, in both modes."""
    net = trained()
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    for mode in (False, True):
        net.train(mode)
        compiled.train(mode)
        x = torch.randn(9, 6)
        ours, theirs = net(x), compiled(x)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        for made, out in ((net, ours), (compiled, theirs)):
            made.zero_grad()
            sum(t.square().mean() for t in out).backward()  # type: ignore[union-attr]
        assert torch.allclose(net.fc.weight.grad, compiled.fc.weight.grad, rtol=1e-4)


def test_copies_and_checkpoints() -> None:
    net, x = trained(), torch.randn(4, 6)
    with torch.no_grad():
        expected = net(x)
        fresh = linger.init(Everything()).eval()
        fresh.load_state_dict(net.state_dict())
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), fresh):
            assert all(torch.equal(a, b) for a, b in zip(other(x), expected, strict=True))


def test_counters_are_upstreams() -> None:
    """Clamp, sigmoid and tanh count with + * / sum and cat; the others on their own."""

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = linger.quant_tensor(self, x, "x")
            y = torch.sigmoid(y) + torch.tanh(y)
            return torch.clamp(y, 0, 1) * F.silu(y)

    net = linger.init(Net())
    net(torch.randn(3, 4))
    names = [n.removeprefix("_linger_round_tensor_") for n, _ in net.named_children()]
    assert names == ["iq_tensor_quant_x", "iqsigmoid_0", "iqtanh_1", "iqadd__default_index_2", "iqclamp_3", "iqsilu_0", "iqmul__default_index_4"]  # fmt: skip


def test_upstreams_keys_load() -> None:
    """A 1.1.1 checkpoint holds ranges of clamp and sigmoid that follow from their inputs here."""
    net = linger.init(Call(lambda y: torch.clamp(torch.sigmoid(y), 0, 0.5)))
    net(torch.randn(8, 6))
    state = net.state_dict()
    for n in ("iqsigmoid_0", "iqclamp_1"):
        state |= {f"_linger_round_tensor_{n}.{key}": torch.tensor([1.0]) for key in ("running_o", "scale_o")}
    net.load_state_dict(state, strict=True)


def test_unknown_forms_are_islands() -> None:
    """An exponent without a table, bounds that are tensors: in float, and the file says so."""
    cases: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda y: (y.abs() + 1) ** 2.5, lambda y: torch.pow(2.0, y), lambda y: torch.clamp(y, max=torch.zeros(6)),
        lambda y: torch.clamp(y, torch.zeros(6), torch.ones(6)), lambda y: F.prelu(y, torch.full((6,), 0.3)),
    )  # fmt: skip
    for case in cases:
        net = linger.init(Call(case))
        x = torch.randn(8, 6)
        net(x)
        assert net.grid is None
        with pytest.warns(linger.LingerWarning, match="in float"):
            model = linger.onnx.export(net.eval(), (x,))
        with torch.no_grad():
            found = session(model, "all").run(None, {"x": x.numpy()})[0]
            assert np.allclose(found, net(x).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda y: F.leaky_relu(y, float("nan")), "negative_slope is nan, allowed are finite numbers; give one"),
        (lambda y: F.elu(y, float("inf")), "alpha is inf, allowed are finite numbers"),
        (lambda y: F.celu(y, 0.0), "alpha is 0.0, allowed are finite numbers other than 0"),
        (lambda y: F.softplus(y, beta=0), "beta is 0, allowed are finite numbers other than 0"),
        (lambda y: y.clamp(float("nan"), 1), "min is nan, allowed are numbers; give one"),
        (lambda y: F.hardtanh(y, 2, 1), "min_val is 2.0 and max_val 1.0, allowed is min_val <= max_val; swap them"),
        (lambda y: F.glu(y[:, :5]), "axis -1 has 5 elements, allowed are even numbers; pad or split it"),
        (lambda y: F.glu(y, 4), "dim is 4, allowed are -2 to 1; choose an axis of the input"),
    ],
)
def test_bad_input(call: Callable[[Tensor], Tensor], message: str) -> None:
    net = linger.init(Call(call))
    with pytest.raises(linger.LingerError, match=message):
        net(torch.randn(8, 6))


def test_bad_prelu() -> None:
    net = linger.init(nn.Sequential(nn.PReLU(4)))
    with pytest.raises(linger.LingerError, match="0: found an input of 3 channels, allowed are 4; give as many"):
        net(torch.randn(2, 3, 5))
