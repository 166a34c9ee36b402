"""Normalization layers and calls as parts of a net: gradients, parameters of the net, keys, errors, islands, compilers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.numerics import grid_of
from linger.targets import TARGETS
from linger.verify import session

LAYERS = {
    "layer": (lambda: nn.LayerNorm(12, eps=1e-3), (3, 4, 12)),
    "layer-2-axes": (lambda: nn.LayerNorm((4, 12), bias=False), (3, 4, 12)),
    "layer-plain": (lambda: nn.LayerNorm(12, elementwise_affine=False), (3, 4, 12)),
    "rms": (lambda: nn.RMSNorm(12), (3, 4, 12)),
    "group": (lambda: nn.GroupNorm(2, 4), (3, 4, 12)),
    "group-plain": (lambda: nn.GroupNorm(4, 4, affine=False), (3, 4, 5, 2)),
    "instance1d": (lambda: nn.InstanceNorm1d(4, affine=True), (3, 4, 12)),
    "instance2d": (lambda: nn.InstanceNorm2d(4), (3, 4, 5, 2)),
    "instance3d": (lambda: nn.InstanceNorm3d(4, affine=True), (3, 4, 2, 3, 2)),
}
FUNCTIONS = {
    "layer": lambda x, w, b: F.layer_norm(x, (12,), w, b),
    "layer-no-weight": lambda x, w, b: torch.layer_norm(x, [12], None, b, 0.1),
    "layer-no-bias": lambda x, w, b: F.layer_norm(x, normalized_shape=(12,), weight=w),
    "rms": lambda x, w, b: F.rms_norm(x, (12,), weight=w, eps=1e-2),
    "rms-torch": lambda x, w, b: torch.rms_norm(x, (12,), w),
    "group": lambda x, w, b: F.group_norm(x, 3, w, b, eps=1e-2),
    "group-torch": lambda x, w, b: torch.group_norm(x, 3, bias=b),
    "instance": lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
    "instance-torch": lambda x, w, b: torch.instance_norm(x, w, b, None, None, True, 0.1, 1e-4, False),
}


class Call(nn.Module):
    """A functional call between a layer and the output; shapes (N, 12, 12) fit every one."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.fc = name, nn.Linear(12, 12)
        self.w, self.b = nn.Parameter(torch.rand(12) + 0.5), nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.name](self.fc(x), self.w, self.b)


class Behind(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(linger.quant_tensor(self, x, "in"))


def trained(net: nn.Module, shape: tuple[int, ...], **options: object) -> nn.Module:
    linger.trace_layers(net, net, torch.randn(shape))
    linger.init(net, **options)
    for _ in range(3):
        net(torch.randn(shape))
    return net


def spread(net: nn.Module) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.rand_like(p) + 0.5)


# --- gradients: those of the float function at what the integers stand for


@pytest.mark.parametrize("name", LAYERS)
def test_gradient_is_that_of_the_float_layer(name: str) -> None:
    """Equal, not close: float32 autograd of the plain layer at the quantized input, weight and bias."""
    make, shape = LAYERS[name]
    plain = make()
    spread(plain)
    net = trained(Behind(copy.deepcopy(plain)), shape)
    net.layer.running("o").fill_(127.0)  # nothing saturates
    x = torch.randn(shape, requires_grad=True)
    y = net(x)
    seed = torch.randn(shape)
    y.backward(seed)
    at = torch.round(x.detach() * net._linger_round_tensor_iq_tensor_quant_in.scale("x", 8) + 1e-9)
    at = at.clamp(-128, 127) / net._linger_round_tensor_iq_tensor_quant_in.scale("x", 8)
    w, b, _ = net.layer.on_grids(*net.layer.given(), net.layer.norm(shape, 8).rows)
    with torch.no_grad():
        if plain._parameters.get("weight") is not None:
            plain.weight.copy_(w.reshape(plain.weight.shape))
        if plain._parameters.get("bias") is not None:
            plain.bias.copy_(b.reshape(plain.bias.shape))
    at.requires_grad_()
    plain(at).backward(seed)
    inside = at.detach().abs() < 127 / net._linger_round_tensor_iq_tensor_quant_in.scale("x", 8)
    assert torch.equal(x.grad * inside, at.grad * inside)
    for key, p in plain.named_parameters():
        assert torch.equal(net.layer._parameters[key].grad, p.grad), key


@pytest.mark.parametrize("name", LAYERS)
def test_gradient_against_float64(name: str) -> None:
    """In float64 the same up to float32's rounding: 1e-4 of the largest."""
    make, shape = LAYERS[name]
    layer = make()
    net = trained(Behind(layer), shape)
    net.layer.running("o").fill_(127.0)
    grid = net._linger_round_tensor_iq_tensor_quant_in.scale("x", 8)
    x = (torch.randint(-100, 100, shape) / grid).requires_grad_()
    net(x).square().sum().backward()
    double = make().double()
    w, b, _ = net.layer.on_grids(*net.layer.given(), net.layer.norm(shape, 8).rows)
    with torch.no_grad():
        for key, v in (("weight", w), ("bias", b)):
            if double._parameters.get(key) is not None:
                double._parameters[key].copy_(v.reshape(double._parameters[key].shape))
        y = net(x)
    at = x.detach().double().requires_grad_()
    (double(at) * 2 * y.double()).sum().backward()
    assert (x.grad - at.grad).abs().max() <= 1e-4 * at.grad.abs().max()


def test_bounds_pull_and_stop() -> None:
    """Outside its bound a parameter gets +-0.01, and where the output saturates or is beyond its bound nothing passes."""
    layer = nn.LayerNorm(6)
    linger.normalize_module(
        layer, nn.LayerNorm, normalize_weight_value=1, normalize_bias_value=2, normalize_output_value=1
    )
    net = nn.Sequential(layer)
    linger.normalize_layers(net)
    assert type(net[0]) is linger.NormalizeLayerNorm
    linger.init(net)
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([3.0, -3.0, 0.5, 0.5, 0.5, 0.5]))
        net[0].bias.copy_(torch.tensor([0.0, 0.0, 5.0, -5.0, 0.0, 0.0]))
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.5]], requires_grad=True)
    y = net(x)
    y.sum().backward()
    assert net[0].weight.grad[:2].tolist() == pytest.approx([0.01, -0.01])
    assert net[0].bias.grad[2:4].tolist() == pytest.approx([0.01, -0.01])
    assert net[0].bias.grad[0] == 0  # its output is beyond 1
    assert net[0].bias.grad[4] == 1


@pytest.mark.parametrize("name", LAYERS)
def test_normalized_twin(name: str) -> None:
    """Without bounds the float layer itself; with them nothing leaves +-bound, and the fixed-point twin keeps them."""
    make, shape = LAYERS[name]
    plain = make()
    x = torch.randn(shape) * 4
    free = linger.normalize_layers(
        nn.Sequential(copy.deepcopy(plain)), normalize_weight_value=None, normalize_output_value=None
    )
    assert torch.equal(free(x), plain(x))
    bounded = linger.normalize_layers(nn.Sequential(plain), normalize_weight_value=0.5, normalize_output_value=0.75)
    assert bounded(x).abs().max() <= 0.75
    assert type(bounded[0]).__name__ == f"Normalize{type(plain).__name__}"
    assert "normalize_data:0.75,normalize_weight:0.5,normalize_bias:None,ahead_relu:False" in repr(bounded)
    fixed = linger.init(bounded)
    assert (fixed[0].normalize_data, fixed[0].clamp_weight, fixed[0].normalize_bias) == (0.75, 0.5, None)
    weight = fixed[0]._parameters.get("weight")
    assert weight is None or weight is plain._parameters["weight"]


# --- calls with parameters of the net


@pytest.mark.parametrize("chip", TARGETS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_calls_store_the_parameters(name: str, chip: str, tmp_path: Path) -> None:
    net = trained(Call(name), (3, 12, 12), target=chip)
    net(torch.randn(3, 12, 12)).square().sum().backward()
    net.eval()
    x = torch.randn(5, 12, 12)
    model = linger.onnx.export(net, (x,), tmp_path / "net.onnx", dynamic_axes={"x": {0: "batch"}})
    assert [n.op_type for n in model.graph.node][:2] == ["Quant", "LinearInt"]
    assert len(model.graph.node) == 4
    assert {i.data_type for i in model.graph.initializer} <= {3, 5, 6}  # int8, int16, int32
    report = linger.verify(net, tmp_path / "net.onnx", x, quiet=True)
    assert report.equal, str(report)


def test_trained_parameters_of_a_call_get_their_gradient() -> None:
    net = trained(Call("layer"), (3, 12, 12))
    net(torch.randn(3, 12, 12)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


class Gained(nn.Module):
    """A normalization whose weight the forward computes."""

    def __init__(self, gain: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.w, self.gain = nn.Linear(12, 12), nn.Parameter(torch.rand(12)), gain

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(self.fc(x), (12,), self.gain(self.w, x))


def test_a_weight_computed_from_parameters_is_stored(tmp_path: Path) -> None:
    net = trained(Gained(lambda w, x: 1 + w), (3, 12)).eval()
    x = torch.randn(3, 12)
    model = linger.onnx.export(net, (x,), tmp_path / "net.onnx", dynamic_axes={"x": {0: "batch"}})
    assert [n.op_type for n in model.graph.node] == ["Quant", "LinearInt", "LayerNormInt", "Dequant"]
    assert linger.verify(net, tmp_path / "net.onnx", x, quiet=True).equal


def test_a_weight_computed_from_the_input_is_a_float_island(tmp_path: Path) -> None:
    """It has no value to store; the report says so."""
    net = trained(Gained(lambda w, x: w + x.sin()[0]), (3, 12)).eval()
    x = torch.randn(3, 12)
    with pytest.warns(linger.LingerWarning, match="layer_norm"):
        linger.onnx.export(net, (x,), tmp_path / "net.onnx", dynamic_axes={"x": {0: "batch"}})
    found = session(onnx.load(tmp_path / "net.onnx"), "all").run(None, {"x": x.numpy()})[0]
    assert np.allclose(found, net(x).detach().numpy(), atol=1e-5)  # float sums in another order


# --- what stays in float


ISLANDS = {
    "layer": (nn.LayerNorm(12, bias=False), (3, 4, 12), 17),
    "rms": (nn.RMSNorm(12), (3, 4, 12), 12),
    "rms-plain": (nn.RMSNorm((4, 12), elementwise_affine=False, eps=0.1), (3, 4, 12), 18),
    "group": (nn.GroupNorm(2, 4), (3, 4, 12), 12),
    "group-plain": (nn.GroupNorm(2, 4, affine=False), (3, 4, 3, 4), 17),
    "instance": (nn.InstanceNorm2d(4, affine=True), (3, 4, 3, 4), 17),
}


@pytest.mark.parametrize("name", ISLANDS)
def test_layers_left_in_float_export(name: str, tmp_path: Path) -> None:
    layer, shape, opset = copy.deepcopy(ISLANDS[name])
    spread(layer)
    linger.disable_quant(layer)
    net = trained(nn.Sequential(nn.Linear(shape[-1], shape[-1]), layer), shape).eval()
    x = torch.randn(5, *shape[1:])
    with pytest.warns(linger.LingerWarning, match="in float: 1"):
        linger.onnx.export(
            net, (x,), tmp_path / "n.onnx", input_names=["x"], dynamic_axes={"x": {0: "batch"}}, opset_version=opset
        )
    found = session(onnx.load(tmp_path / "n.onnx"), "all").run(None, {"x": x[:2].numpy()})[0]
    assert np.allclose(found, net(x[:2]).detach().numpy(), atol=1e-5)  # float sums in another order


def test_tracked_statistics_are_reported() -> None:
    net = nn.Sequential(nn.InstanceNorm1d(4, track_running_stats=True))
    with pytest.warns(
        linger.LingerWarning, match=r"0 \(InstanceNorm1d, track_running_stats=True normalizes with other"
    ):
        linger.init(net)
    assert type(net[0]) is nn.InstanceNorm1d


def test_tracked_statistics_of_a_call_are_a_float_island() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 5)
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("var", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.instance_norm(self.fc(x), self.mean, self.var, use_input_stats=False)

    net = trained(Net(), (2, 3, 5)).eval()
    assert grid_of(net(torch.randn(2, 3, 5))) is None


# --- inputs that have no result


BAD = [
    (
        nn.LayerNorm(5),
        (2, 6),
        r"0: found an input of shape \(2, 6\), allowed are shapes that end in \(5,\); change norm",
    ),
    (nn.LayerNorm((2, 3)), (3,), r"0: found an input of shape \(3,\), allowed are shapes that end in \(2, 3\)"),
    (nn.RMSNorm(5), (2, 6), r"0: found an input of shape \(2, 6\), allowed are shapes that end in \(5,\)"),
    (
        nn.GroupNorm(2, 4),
        (2, 5, 3),
        r"0: found an input of shape \(2, 5, 3\), allowed are those whose axis 1 is a multiple",
    ),
    (
        nn.GroupNorm(2, 4),
        (4,),
        r"0: found an input of shape \(4,\), allowed are those whose axis 1 is a multiple of num_gr",
    ),
    (
        nn.InstanceNorm1d(4),
        (2, 4, 1),
        r"allowed are those with more than one element per channel; keep this layer in float",
    ),
    (
        nn.InstanceNorm2d(4),
        (2, 3, 5, 5),
        r"allowed are 4 channels on axis 1 and 2 axes behind them, or the same without",
    ),
    (nn.InstanceNorm2d(4), (5, 5), r"allowed are 4 channels on axis 1 and 2 axes behind them"),
    (nn.LayerNorm(4, eps=-1), (2, 4), r"0: eps is -1, allowed are numbers from 0; change it"),
    (nn.LayerNorm(4, eps=float("nan")), (2, 4), r"0: eps is nan, allowed are numbers from 0"),
]


@pytest.mark.parametrize(("layer", "shape", "text"), BAD)
def test_inputs_that_do_not_fit(layer: nn.Module, shape: tuple[int, ...], text: str) -> None:
    net = linger.init(nn.Sequential(copy.deepcopy(layer)))
    with pytest.raises(linger.LingerError, match=text):
        net(torch.randn(shape))


def test_rows_that_are_too_long() -> None:
    net = linger.init(nn.Sequential(nn.LayerNorm(2**16 + 1)), data_bits=16)
    with pytest.raises(
        linger.LingerError, match="found rows of 65537 elements, allowed are 65536 at 16 bits; normalize"
    ):
        net(torch.randn(1, 2**16 + 1))
    net = linger.init(nn.Sequential(nn.LayerNorm(2**16)), data_bits=16)
    net(torch.randn(1, 2**16))


def test_eval_before_training() -> None:
    net = linger.init(nn.Sequential(nn.LayerNorm(5))).eval()
    with pytest.raises(linger.LingerError, match="0: running_x is 0, so no batch has been seen"):
        net(torch.randn(2, 5))


def test_a_row_that_changes_with_a_dynamic_axis(tmp_path: Path) -> None:
    net = trained(nn.Sequential(nn.GroupNorm(2, 4)), (2, 4, 6)).eval()
    with pytest.raises(
        linger.LingerError, match=r"0: GroupNormInt of the call at .* changes with dynamic axis 'time'; fix that axis"
    ):
        linger.onnx.export(
            net, (torch.randn(2, 4, 6),), tmp_path / "n.onnx", input_names=["x"], dynamic_axes={"x": {2: "time"}}
        )


def test_leading_axes_may_be_dynamic(tmp_path: Path) -> None:
    net = trained(nn.Sequential(nn.LayerNorm(6)), (2, 4, 6)).eval()
    axes = {"x": {0: "batch", 1: "time"}}
    linger.onnx.export(net, (torch.randn(2, 4, 6),), tmp_path / "n.onnx", input_names=["x"], dynamic_axes=axes)
    assert linger.verify(net, tmp_path / "n.onnx", torch.randn(3, 9, 6), quiet=True).equal
