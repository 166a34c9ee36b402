"""Whole networks: convert, train a few steps, export, and find no differing integer anywhere."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_nets import ATTENTION_NETS
from nets import NETS as CONVOLUTION_NETS
from torch import Tensor, nn

import linger

NETS = CONVOLUTION_NETS | ATTENTION_NETS


def trained(name: str, steps: int = 4, **options: Any) -> tuple[nn.Module, tuple[int, ...]]:
    """The net in fixed point after a few steps on noise."""
    make, shape = NETS[name]
    net = make()
    linger.trace_layers(net, net, torch.randn(1, *shape))
    linger.init(net, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(steps):
        loss = net(torch.randn(4, *shape)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval(), shape


@pytest.mark.parametrize("dialect", ["thinker", "standard"])
@pytest.mark.parametrize("name", NETS)
def test_no_integer_differs(name: str, dialect: str, tmp_path: Path) -> None:
    net, shape = trained(name)
    path = tmp_path / "net.onnx"
    linger.onnx.export(net, (torch.randn(2, *shape),), path, dynamic_axes={"x": {0: "batch"}}, dialect=dialect)
    for batch in (1, 7):
        report = linger.verify(net, path, torch.randn(batch, *shape) * 1.5, quiet=True)
        assert report.equal, str(report)
        assert set(report.differing) >= {"disable", "basic", "extended", "all"}
        assert ("runtime" in report.differing) == (dialect == "thinker")


@pytest.mark.parametrize("name", NETS)
def test_four_bit_weights(name: str, tmp_path: Path) -> None:
    net, shape = trained(name, parameter_bits=4, target="arcs", limits=False)
    linger.onnx.export(net, (torch.randn(2, *shape),), tmp_path / "net.onnx")
    assert linger.verify(net, tmp_path / "net.onnx", torch.randn(2, *shape), quiet=True).equal


def test_another_target_is_refused_where_it_computes_otherwise(tmp_path: Path) -> None:
    """A file for another chip is written only where its integers are those of the net."""
    net, shape = trained("KeywordNet")
    linger.onnx.export(net, (torch.randn(2, *shape),), tmp_path / "net.onnx", target="arcs")
    assert linger.verify(net, tmp_path / "net.onnx", torch.randn(2, *shape), quiet=True).equal
    net, shape = trained("SpeechNet")
    with pytest.raises(
        linger.LingerError,
        match=r"iqtanh_0: found a net that follows venus exported for arcs, which has another table of tanh",
    ):
        linger.onnx.export(net, (torch.randn(2, *shape),), tmp_path / "net.onnx", target="arcs")


@pytest.mark.parametrize("name", NETS)
def test_copies_compute_the_same(name: str, tmp_path: Path) -> None:
    net, shape = trained(name)
    x = torch.randn(3, *shape)
    torch.save(net, tmp_path / "net.pt")
    copies: list[nn.Module] = [
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.load(tmp_path / "net.pt", weights_only=False),
    ]
    with torch.no_grad():
        expected: Tensor = net(x)
        for other in copies:
            assert torch.equal(other(x), expected)
        next(copies[0].parameters()).add_(1.0)
        assert torch.equal(net(x), expected), "a deep copy must not share parameters"


def test_a_changed_file_is_found(tmp_path: Path) -> None:
    """Verify must be able to fail: one weight off by one names the node it belongs to."""
    import onnx
    from onnx import numpy_helper

    net, shape = trained("KeywordNet")
    path = tmp_path / "net.onnx"
    model = linger.onnx.export(net, (torch.randn(2, *shape),), path)
    weight = next(i for i in model.graph.initializer if i.name == "fc.weight")
    array = numpy_helper.to_array(weight).copy()
    array += 3
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(model, path)
    report = linger.verify(net, path, torch.randn(2, *shape), quiet=True)
    assert not report.equal
    assert all(report.differing.values())
    assert report.first is not None
    assert report.first.where == "runtime"
    assert "differing" in str(report)
