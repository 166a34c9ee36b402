"""``linger.report``: the numbers against what they are defined as, the graph, and what is refused."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import UNet
from report_nets import NETS, accuracy, ready
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import linger
from linger import LingerError
from linger.batches import feed
from linger.floating import in_float
from linger.numerics import Grid
from linger.report import Data, Layer, Meter, both
from linger.sites import WITNESSES


def made(net: nn.Module, *x: Tensor, **bits: Any) -> nn.Module:
    """The net in fixed point after one batch."""
    linger.trace_layers(net, net, *x)
    net = linger.init(net, **bits)
    net(*x)
    return net.eval()


def report(net: Any, loader: Any, **options: Any) -> Data:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return linger.report(net, loader, progress=False, **options).data


def row(data: Data, name: str) -> Layer:
    return next(layer for layer in data.layers if layer.name == name)


# --- both forwards


@pytest.mark.parametrize("name", [*NETS, "unet"])
def test_both_forwards_are_the_nets_own_and_leave_it_alone(name: str) -> None:
    if name == "unet":
        x = torch.randn(2, 1, 32, 32)
        net = made(UNet(), x)
    else:
        net, batches = ready(name, parameter_bits=4)
        x = batches[0][0]
    net.train()
    state, modes = {k: v.clone() for k, v in net.state_dict().items()}, [m.training for m in net.modules()]
    found, wanted = both(net, x, feed, meters := {})
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert not WITNESSES
    assert not any(len(m._forward_hooks) for m in net.modules())
    net.eval()
    with torch.no_grad():
        assert torch.equal(found, net(x))
        with in_float(net):
            torch.testing.assert_close(wanted, net(x))
    assert len(meters) > 2
    assert all(m.total.seen for m in meters.values()), "every call comes by in both forwards"


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y += x
        y.mul_(y)
        return y.clamp_(-0.5, 0.5)


class OutOfPlace(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) + x
        return (y * y).clamp(-0.5, 0.5)


def test_calls_in_place_are_compared_with_what_they_read() -> None:
    x = torch.randn(6, 4)
    measured = []
    for cls in (InPlace, OutOfPlace):
        torch.manual_seed(0)
        net = made(cls(), x)
        both(net, x, feed, meters := {})
        measured.append([(m.own.sqnr, m.total.sqnr, m.clipped) for m in meters.values()])
    assert measured[0] == measured[1]
    assert len(measured[0]) == 4


# --- numbers


def test_sqnr_and_clipping_by_hand() -> None:
    net = nn.Sequential(nn.Linear(16, 8))
    made(net, torch.randn(64, 16))
    fc: Any = net[0]
    fc.running_o.fill_(0.5)  # results beyond it are clipped
    x = torch.randn(40, 16)
    found = row(report(net, [x[:25], x[25:]]), "0")
    with torch.no_grad():
        wanted, fixed = x @ fc.weight.T + fc.bias, net(x)
    signal, error = wanted.double().pow(2).sum(), (wanted.double() - fixed.double()).pow(2).sum()
    assert found.sqnr == pytest.approx(10 * math.log10(signal / error), abs=1e-6)
    assert found.own_sqnr == pytest.approx(found.sqnr, abs=1e-3)
    scale = float(fc.scale("o", 8))
    lost = (wanted * scale >= 128) | (wanted * scale <= -129)
    assert found.clipped == pytest.approx(float(lost.float().mean()))
    assert found.clipped > 0.1
    assert found.grid is not None
    assert (found.grid.scale, found.grid.bits, found.grid.lowest, found.grid.highest) == (
        scale,
        8,
        -128 / scale,
        127 / scale,
    )
    assert (found.low, found.high, found.used) == (float(fixed.min()), float(fixed.max()), 1.0)


@pytest.mark.parametrize(("value", "lost"), [(127.99, 0), (128.0, 1), (-128.99, 0), (-129.0, 1), (-1e3, 1), (-1e5, 0)])
def test_clipped_is_what_loses_a_whole_step(value: float, lost: int) -> None:
    """What a mask of attention hides is as low as that and loses nothing."""
    meter = Meter(grid=Grid(torch.tensor(4.0), 8))
    meter.add_own(torch.tensor([value / 4]), torch.tensor([0.0]))
    assert (meter.clipped, meter.counted) == (lost, 1)


def test_what_fixed_point_holds_exactly_is_exact() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(4))
    x = torch.randint(-8, 8, (20, 4)) / 8.0
    made(net, x)
    data = report(net, [x])
    assert (data.layers[0].sqnr, data.layers[0].own_sqnr, data.summary.sqnr, data.layers[0].clipped) == (
        200,
        200,
        200,
        0,
    )


def test_only_what_a_relu_passes_counts() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    x = torch.randn(30, 8)
    with torch.no_grad():
        net[0].bias.fill_(-3.0)  # most is far below 0
        net[0].weight.mul_(3)
    made(net, x)
    found = row(report(net, [x]), "0")
    grid = found.grid
    assert grid is not None
    with torch.no_grad():
        wanted = x @ net[0].weight.T + net[0].bias
    assert float((wanted < grid.lowest - 1).float().mean()) > 0.2
    assert found.clipped == float((wanted >= grid.highest + 1 / grid.scale).double().mean())


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_histograms_count_every_value_once(bits: int) -> None:
    meter = Meter(grid=Grid(torch.tensor(4.0), bits))
    x = torch.tensor([-1e9, -(2.0 ** (bits - 1)) / 4, 0.0, 0.25, (2 ** (bits - 1) - 1) / 4, 1e9])
    meter.add_fixed(x)
    meter.add_float(x)
    counts = meter.histogram()
    assert counts is not None
    assert sum(counts.fixed) == sum(counts.reference) == 6
    assert counts.fixed[0] == counts.fixed[-1] == 1
    width = (counts.high - counts.low) / len(counts.fixed)
    at = [int((v - counts.low) / width) for v in x[1:-1].tolist()]
    assert all(counts.fixed[i] == at.count(i) for i in at)
    assert 32 <= at[0] < 32 + 128 / 2**bits + 1, "the lowest level is in the first bins of the grid"
    assert 160 - 128 / 2**bits - 1 <= at[-1] < 160


# --- rows


def test_rows_of_a_net_with_a_way_around_and_a_part_in_float() -> None:
    net, batches = ready("conv", parameter_bits=4)
    data = report(net, batches, metric=accuracy)
    assert [(x.name, x.op, x.kind, x.island, x.inputs) for x in data.layers] == [
        ("first", "Conv2d", "fixed", 0, (-1,)),
        ("relu_0", "relu", "move", 0, (0,)),
        ("body", "Conv2d", "fixed", 0, (1,)),
        ("relu_1", "relu", "move", 0, (2,)),
        ("add_0", "add", "fixed", 0, (1, 3)),
        ("max_pool_0", "max_pool", "move", 0, (4,)),
        ("atan_0", "atan", "float", 1, (5,)),
        ("flatten_0", "flatten", "float", 1, (6,)),
        ("fc", "Linear", "fixed", 0, (7,)),
    ]
    assert data.outputs == (8,)
    body = row(data, "body")
    assert (body.input, body.output, body.macs) == ((1, 6, 12, 12), (1, 6, 12, 12), 6 * 144 * 54)
    (weight,) = body.weights
    assert (weight.name, weight.shape, weight.grid.bits) == ("body.weight", (6, 6, 3, 3), 4)
    assert weight.sqnr is not None
    assert 10 < weight.sqnr < 40
    assert sum(weight.histogram.fixed) == sum(weight.histogram.reference) == 324
    s = data.summary
    assert (s.net, s.target, s.batches, s.samples, s.parameters) == ("Conv", "venus", 2, 10, 6 * 9 + 6 + 330 + 868)
    assert s.macs == sum(x.macs for x in data.layers)
    assert s.certificate.equal
    assert s.metric is not None
    with torch.no_grad():
        assert s.metric.fixed == pytest.approx(sum(accuracy(net(b[0]), b) for b in batches) / 2)
        with in_float(net):
            assert s.metric.reference == pytest.approx(sum(accuracy(net(b[0]), b) for b in batches) / 2)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("bits", [4, 8])
def test_stored_weights_are_on_their_grids_and_near_their_float_values(name: str, bits: int) -> None:
    net, batches = ready(name, parameter_bits=bits)
    weights = [w for x in report(net, batches[:1], exact=False).layers for w in x.weights]
    assert len(weights) >= 3
    assert all(0 < w.used <= 1 for w in weights)
    assert {w.grid.bits for w in weights} <= {bits, 16}, "normalizations store 16 bits"
    found = {w.name: w.sqnr for w in weights}
    assert all(v is not None and v > 6 * bits - 12 for k, v in found.items() if "in_proj_" not in k), found


def test_costs_are_those_of_check() -> None:
    net, batches = ready("transformer")
    data = report(net, batches[:1], target="venusa")
    costs = linger.check(net, batches[0][0][:1], target="venusa", quiet=True)
    assert (data.summary.target, data.summary.macs, data.summary.fits) == ("venusa", costs.macs, costs.ok)
    assert data.summary.violations == costs.violations
    assert [m.used for m in data.summary.memory] == [m.used for m in costs.memory]
    scores = row(data, "encoder.layers.0.self_attn.function_bmm_0")
    assert scores.sqnr is not None
    assert scores.grid is not None
    assert row(data, "add_0").inputs == (0,), "a stored operand is no row"


class Twice(nn.Module):
    """A layer that is called twice, two inputs, two outputs, keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.soft = nn.Linear(6, 6), nn.Softmax(-1)

    def forward(self, x: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.fc(self.fc(x)) + self.fc(other)
        return self.soft(y), y


def test_layers_called_again_and_mappings_of_arguments() -> None:
    net = made(Twice(), torch.randn(3, 6), torch.randn(3, 6))
    data = report(net, [{"x": torch.randn(3, 6), "other": torch.randn(3, 6)}])
    assert [(x.name, x.inputs) for x in data.layers] == [
        ("fc", (-1,)), ("fc@1", (0,)), ("fc@2", (-1,)), ("add_0", (1, 2)), ("soft.SoftmaxInt_0", (3,)),
    ]  # fmt: skip
    assert all(x.sqnr is not None for x in data.layers)
    assert (data.inputs, data.outputs) == (("x", "other"), (3, 4))
    assert data.layers[0].weights[0].name == "fc.weight"


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y, _ = pad_packed_sequence(self.lstm(pack_padded_sequence(x, lengths))[0])
        return self.fc(y)


def test_packed_sequences_with_samples_on_the_second_axis() -> None:
    batch = torch.randn(5, 3, 4), torch.tensor([5, 3, 2])
    net = linger.init(Packed())
    net(*batch)
    data = report(net.eval(), [batch], forward=lambda net, b: net(*b), batch_axis=1)
    assert [x.name for x in data.layers] == ["lstm", "pad_packed_sequence_0", "fc"]
    assert data.layers[0].sqnr is not None
    assert data.summary.samples == 3
    assert {w.item for w in data.worst} == {0, 1, 2}
    assert [w.name for w in data.layers[0].weights] == ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]


def test_a_net_that_is_one_layer() -> None:
    x = torch.randn(2, 3, 6, 6)
    net = linger.init(nn.Conv2d(3, 4, 3))
    net(x)
    (only,) = report(net.eval(), [x]).layers
    assert only.sqnr is not None
    assert only.inputs == (-1,)


# --- files


def test_a_file_has_the_grids_of_its_net(tmp_path: Path) -> None:
    net, batches = ready("conv", parameter_bits=8)
    path = tmp_path / "conv.onnx"
    with pytest.warns(linger.LingerWarning, match="in float"):
        linger.onnx.export(net, (batches[0][0],), path, dynamic_axes={"x": {0: "batch"}})
    with net_in_float(net) as reference:
        of_file = report(path, batches, reference=reference, metric=accuracy)
    of_net = report(net, batches, metric=accuracy)
    grids = [{x.name: (x.grid, x.low, x.high, x.used) for x in d.layers if x.grid} for d in (of_file, of_net)]
    assert grids[0] == grids[1]
    assert [x.macs for x in of_file.layers] == [x.macs for x in of_net.layers]
    assert of_file.summary.sqnr == pytest.approx(of_net.summary.sqnr)
    assert of_file.summary.metric == of_net.summary.metric
    assert of_file.summary.certificate.equal
    assert of_file.worst[0].item == of_net.worst[0].item
    assert all(x.sqnr is None for x in of_file.layers)


class net_in_float:
    """A module whose forward is the net's in float."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __enter__(self) -> nn.Module:
        outer = self.net

        class Reference(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                with in_float(outer):
                    return outer(x)  # type: ignore[no-any-return]

        return Reference()

    def __exit__(self, *_: object) -> None:
        pass


def test_a_file_of_a_fixed_batch_alone(tmp_path: Path) -> None:
    net, batches = ready("lstm")
    linger.onnx.export(net, (batches[0][0],), tmp_path / "lstm.onnx")
    arrays = [np.asarray(x) for x, _ in batches]
    data = report(tmp_path / "lstm.onnx", arrays)
    assert data.summary.certificate.equal
    assert (data.summary.sqnr, data.worst, data.summary.samples) == (None, (), 10)


# --- the certificate


def test_a_net_that_cannot_be_exported_says_why() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).cumprod(1)

    x = torch.randn(3, 4)
    data = report(made(Odd(), x), [x])
    assert not data.summary.certificate.equal
    assert "cumprod" in data.summary.certificate.why
    assert data.layers[-1].island == 1
    assert not report(made(Odd(), x), [x], exact=False).summary.certificate.why


# --- refused


@pytest.mark.parametrize(
    ("net", "loader", "options", "match"),
    [
        (lambda: nn.Linear(2, 2), [], {}, "report: found Linear without a fixed-point layer; call init first"),
        (lambda: linger.init(nn.Linear(2, 2)), [], {}, "report: found an empty loader"),
        (lambda: linger.init(nn.Linear(2, 2)), [torch.ones(1, 2)], {}, "no batch has been seen"),
        (lambda: made(nn.Linear(2, 2), torch.ones(1, 2)), [torch.ones(1, 2)], {"reference": nn.Linear(2, 2)}, "leave it out"),
        (lambda: made(nn.Linear(2, 2), torch.ones(1, 2)), [torch.ones(1, 2)], {"html": "no/such/x.html"}, "report: cannot write"),
        (lambda: made(nn.Linear(2, 2), torch.ones(1, 2)), [], {"language": "fr"}, "report: language is 'fr', allowed are en, zh"),
        (lambda: made(nn.Linear(2, 2), torch.ones(1, 2)), [1.5], {}, "the loader yields float"),
        (lambda: 3, [], {}, "report: found an object of type int, allowed are a net and a path"),
        (lambda: "nothing.onnx", [torch.ones(1)], {}, "there is no file 'nothing.onnx'"),
    ],
)  # fmt: skip
def test_refused(
    net: Any, loader: Any, options: Any, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LingerError, match=match):
        linger.report(net(), loader, progress=False, **options)
    assert not list(tmp_path.iterdir())
