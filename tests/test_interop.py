"""Plain ``torch.onnx.export(net, ..., dynamo=True)``: the same nodes, attributes and integers as ``linger.onnx.export``."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from attention_nets import ATTENTION_NETS
from nets import NETS
from onnx import helper, numpy_helper
from test_nets import trained
from torch import Tensor, nn
from torch.nn import functional as F

import linger

BATCH = torch.export.Dim("batch")
MOVES = {"Reshape": "Reshape", "Flatten": "Reshape"}  # torch writes every view as Reshape


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """PyTorch's exporter warns about itself."""
    with warnings.catch_warnings():
        for package in ("torch", "onnxscript", "copyreg"):
            warnings.filterwarnings("ignore", module=package)
        warnings.filterwarnings("ignore", message=".*(torch|onnx|isinstance|LeafSpec).*", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def plain_export(net: nn.Module, args: tuple[Tensor, ...], path: Path) -> onnx.ModelProto:
    with quiet():
        torch.onnx.export(net, args, path, dynamo=True, verbose=False, dynamic_shapes=({0: BATCH},) * len(args))
    return onnx.load(path)


def described(model: onnx.ModelProto) -> list[tuple[object, ...]]:
    """Every fixed-point node: its op, attributes, stored integers, and the type of what it makes."""
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    found: list[tuple[object, ...]] = []
    for node in model.graph.node:
        if node.domain == "thinker":
            attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            said = {k: tuple(v) if hasattr(v, "extend") else v for k, v in attrs.items()}
            params = [(stored[n].dtype.name, stored[n].tolist()) for n in node.input if n in stored]
            found.append((node.op_type, said, params))
    return found


@pytest.mark.parametrize(
    "name", [*NETS, *(n for n in ATTENTION_NETS if n != "Tokens")]
)  # it picks a step: by Gather there
def test_both_routes_write_the_same(name: str, tmp_path: Path) -> None:
    net, shape = trained(name)
    x = torch.randn(2, *shape)
    with torch.no_grad():
        net(x)
    theirs = plain_export(net, (x,), tmp_path / "theirs.onnx")
    ours = linger.onnx.export(net, (x,), tmp_path / "ours.onnx", dynamic_axes={"x": {0: "batch"}})
    assert described(theirs) == described(ours)
    kinds = [[MOVES.get(n.op_type, n.op_type) for n in m.graph.node] for m in (theirs, ours)]
    assert kinds[0] == kinds[1]
    loaded = linger.runtime.load(tmp_path / "theirs.onnx")
    for batch in (1, 5):
        y = torch.randn(batch, *shape)
        with torch.no_grad():
            assert np.array_equal(loaded(y), net(y).numpy())
    report = linger.verify(net, tmp_path / "theirs.onnx", torch.randn(3, *shape), quiet=True)
    assert report.differing == {"runtime": 0}


class Mixed(nn.Module):
    """Two inputs, two outputs, sites, an in-place sum, a float island, a view and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")
        self.twice = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a = self.twice(F.relu(self.conv(x)))
        a += self.twice(a) * 0.5
        a = torch.cat([a, self.conv(y)], 1)[:, 2:6].float()
        gate = torch.sinh(a)
        return self.fc((a * gate).mean((2, 3))), a / 2


def mixed() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    net = linger.init(Mixed())
    args = torch.randn(3, 2, 8, 8), torch.randn(3, 2, 8, 8)
    for _ in range(3):
        net(*args)
    return net.eval(), args


def test_sites_islands_and_shared_layers(tmp_path: Path) -> None:
    net, args = mixed()
    with torch.no_grad():
        net(*args)
    theirs = plain_export(net, args, tmp_path / "theirs.onnx")
    with pytest.warns(linger.LingerWarning, match="sinh"):
        ours = linger.onnx.export(
            net, args, tmp_path / "ours.onnx", dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}}
        )
    assert described(theirs) == described(ours)
    assert sum(node[0] == "Quant" for node in described(theirs)) == 3


def test_without_an_eval_forward(tmp_path: Path) -> None:
    net, args = mixed()
    net.train()
    net.eval()
    with quiet(), pytest.raises(Exception, match="run the net once in eval mode") as raised:
        torch.onnx.export(net, args, tmp_path / "net.onnx", dynamo=True, verbose=False)
    assert "conv" in str(raised.value)
    assert not (tmp_path / "net.onnx").exists()


def test_parameters_changed_since(tmp_path: Path) -> None:
    net, args = mixed()
    with torch.no_grad():
        net(*args)
        next(net.parameters()).mul_(3.0)
    with quiet(), pytest.raises(Exception, match="changed since the last eval forward"):
        torch.onnx.export(net, args, tmp_path / "net.onnx", dynamo=True, verbose=False)
