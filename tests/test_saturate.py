"""A clamp as saturating sums: every integer and every pair of bounds, and nets whose files hold no Clip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import linger
from linger.numerics import shift_round
from linger.ops import BY_NAME
from linger.ops._lowered import Lowered, Operand
from linger.ops._saturate import FARTHEST, clamp_nodes, fits, offset_nodes
from linger.rounding import ROUNDINGS

EVERY = np.arange(-128, 128, dtype=np.int8)
EDGES = (-128, -127, -100, -1, 0, 1, 63, 126, 127)


def run(nodes: tuple[Lowered, ...], x: np.ndarray, **more: str) -> np.ndarray:
    """What the references of the nodes make of ``x``."""
    made = [x]
    for node in nodes:
        source = x if node.inputs[0] == 0 else made[int(str(node.inputs[0])[1:]) + 1]
        made.append(BY_NAME[node.op_type].run(source, *node.params.values(), **node.attrs, **more))
    return made[-1]


def computed(x: np.ndarray, low: int, high: int) -> np.ndarray:
    return run(clamp_nodes(Operand(scale=8.0, bits=8, shape=x.shape), low, high), x)


@pytest.mark.parametrize("shape", [(1, 256), (2, 1, 128), (1, 4, 8, 8)])
def test_every_integer_between_every_pair_of_bounds(shape: tuple[int, ...]) -> None:
    x = EVERY.reshape(shape)
    for low in EDGES:
        for high in EDGES:
            expected = np.minimum(np.maximum(x, low), high)
            assert np.array_equal(computed(x, low, high), expected), (low, high)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("shape", [(1, 256), (2, 1, 128), (1, 4, 8, 8)])
def test_every_integer_plus_every_number(shape: tuple[int, ...], rounding: str) -> None:
    """For shifts on both sides of the farthest that one node holds."""
    x = EVERY.reshape(shape)
    for n in (0, 1, 2, 7, FARTHEST, FARTHEST + 1, 40):
        given, out = (Operand(scale=2.0**e, bits=8, shape=shape) for e in (20, 20 - n))
        for sign in (1, -1):
            for number in (-128, -127, -3, 0, 1, 64, 127, 128):
                expected = np.clip(sign * shift_round(x, n, rounding) + number, -128, 127)
                nodes = offset_nodes(given, out, sign, number, rounding)
                assert np.array_equal(run(nodes, x, rounding=rounding), expected), (n, sign, number)


def test_a_sum_with_a_number_is_one_node_of_an_image() -> None:
    def ops(n: int, sign: int = 1, rounding: str = "half_up", shape: tuple[int, ...] = (1, 4, 2, 2)) -> list[str]:
        x, out = (Operand(scale=2.0**e, bits=8, shape=shape) for e in (0, -n))
        return [node.op_type for node in offset_nodes(x, out, sign, 1, rounding)]

    assert ops(0) == ops(3) == ops(0, -1) == ops(0, 1, "half_even") == ["BatchNorm2dInt"]
    assert ops(3, -1) == ops(3, 1, "half_even") == ops(FARTHEST + 1) == ["Requant", "BatchNorm2dInt"]
    assert ops(3, shape=(1, 4)) == ["Unsqueeze", "BatchNorm2dInt", "Squeeze"]


def test_the_fewest_nodes() -> None:
    def ops(low: int, high: int, shape: tuple[int, ...] = (1, 4, 2, 2)) -> list[str]:
        return [n.op_type for n in clamp_nodes(Operand(scale=1.0, bits=8, shape=shape), low, high)]

    assert ops(-128, 127) == []
    assert ops(0, 127) == ops(0, 127, (1, 4)) == ["Relu"]
    assert ops(0, 96) == ["Relu", "BatchNorm2dInt", "BatchNorm2dInt"]
    assert ops(-32, 96) == ["BatchNorm2dInt"] * 3
    assert ops(-32, 96, (1, 4, 9)) == ["Unsqueeze", *["BatchNorm2dInt"] * 3, "Squeeze"]


def test_what_has_no_such_form() -> None:
    assert fits(Operand(scale=1.0, bits=8, shape=(1, 4, 2, 2), dynamic=frozenset({0, 3})))
    assert not fits(Operand(scale=1.0, bits=8, shape=(1, 4), dynamic=frozenset({1})))
    assert not fits(Operand(scale=1.0, bits=16, shape=(1, 4)))
    assert not fits(Operand(scale=1.0, bits=8, shape=(1, 4, 2, 2, 2)))


@pytest.mark.parametrize("dialect", ["thinker", "standard"])
def test_a_net_with_relu6_holds_no_clip(dialect: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 4, 1), nn.Hardtanh(-0.3, 0.4))
    x = torch.randn(2, 3, 9, 9) * 4
    linger.trace_layers(net, net, x)
    net = linger.init(net)
    net(x)
    axes = {"input": {0: "batch"}}
    model = linger.onnx.export(net.eval(), (x,), tmp_path / "net.onnx", dynamic_axes=axes, dialect=dialect)
    assert not [n for n in model.graph.node if n.op_type == "Clip" and n.domain == "thinker"]
    assert linger.verify(net, tmp_path / "net.onnx", torch.randn(5, 3, 9, 9) * 4, quiet=True).equal


@pytest.mark.parametrize("chip", ["venus", "arcs", "venusa"])
def test_check_accepts_relu6_behind_a_convolution(chip: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU6())
    assert linger.check(net, torch.randn(1, 3, 9, 9), target=chip, quiet=True).ok


def test_check_refuses_the_clip_that_is_left() -> None:
    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu6(linger.quant_tensor(self, x, "x", bits=16))

    report = linger.check(Wide(), torch.randn(1, 4), target="venus", quiet=True)
    assert [(v.kind, v.found) for v in report.violations if v.op == "Clip"] == [("error", "clamp")]
