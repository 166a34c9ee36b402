"""No sum is ever rounded: accumulators far beyond 2^24, biases far beyond the products, weights that grow unnoticed.

Inputs and weights near their maximum make sums of up to 2^26 LSB; a bias takes nearly all of it away again, so that the
result shows every LSB of what a single float32 sum would have lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linger
from linger import runtime

Make = Callable[[], nn.Module]
LAYERS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4608, 16), (32, 4608)),
    "linear-3d": (lambda: nn.Linear(2100, 8), (4, 5, 2100)),
    "linear-no-bias": (lambda: nn.Linear(1024, 16, bias=False), (16, 1024)),
    "linear-one-part": (lambda: nn.Linear(1000, 16), (16, 1000)),
    "linear-many-parts": (lambda: nn.Linear(20000, 3), (8, 20000)),
    "conv1d": (lambda: nn.Conv1d(300, 4, 7, padding=3, padding_mode="circular"), (2, 300, 9)),
    "conv1d-long-kernel": (lambda: nn.Conv1d(2, 4, 1500), (2, 2, 1510)),
    "conv2d": (lambda: nn.Conv2d(512, 4, 3), (2, 512, 5, 5)),
    "conv2d-groups": (lambda: nn.Conv2d(600, 6, 3, groups=2), (2, 600, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(400, 3, 3, stride=2), (2, 400, 3, 3)),
    "transposed-groups": (lambda: nn.ConvTranspose1d(1000, 6, 5, groups=2), (2, 1000, 6)),
}
WIDTHS = {"8": {}, "out-16": {"out_bits": 16}, "16": {"data_bits": 16, "out_bits": 16}, "4": {"parameter_bits": 4}}


def large(shape: tuple[int, ...], seed: int) -> Tensor:
    """Values of 100 to 127 LSB of an 8-bit grid that reaches 1."""
    return torch.randint(100, 128, shape, generator=torch.Generator().manual_seed(seed)) / 128


def nearly_equal(shape: tuple[int, ...], channel: int, few: float) -> Tensor:
    """One large value per channel, an LSB less at ``few`` of the places: sums of all of it differ by few LSB."""
    sizes = [n if d == channel else 1 for d, n in enumerate(shape)]
    g = torch.Generator().manual_seed(2)
    return large(tuple(sizes), 1) - (torch.rand(shape, generator=g) < few).float() / 128


@torch.no_grad()
def shrink(layer: Any) -> None:
    """All weights but one are 0 on the grid: whoever looks now believes the sums to be small."""
    layer.weight.mul_(1e-3)
    layer.weight.flatten()[0] = 127 / 128


@torch.no_grad()
def grow(layer: Any, x: Tensor) -> None:
    """Large weights, a bias against the mean of their sums, and an output grid for what is left."""
    layer.weight.copy_(large(tuple(layer.weight.shape), 5))
    for _ in range(2):  # a bias can make the weight's grid coarser
        y = layer.accumulate(x.double(), layer.grids(layer.scale("x", layer.data_bits))[0].double(), None)
        if layer.bias is not None:
            channel = y.dim() - layer.weight.dim() + 1
            layer.bias.copy_(-y.mean([d for d in range(y.dim()) if d != channel]))
            y = y + layer.bias.reshape(-1, *[1] * (layer.weight.dim() - 2))
    layer.running("o").fill_(float(y.abs().max()))
    layer.forget()


def converted(name: str, width: str = "8") -> tuple[nn.Module, Any, Tensor]:
    make, shape = LAYERS[name]
    net = linger.init(nn.Sequential(make()), **WIDTHS[width])
    layer: Any = net[0]
    channel = len(shape) - layer.weight.dim() + 1
    x = nearly_equal(shape, channel, 4 / (layer.channels() * math.prod(layer.weight.shape[2:])))
    shrink(net[0])
    with torch.no_grad():
        net(x)
        net.eval()(x)
    return net, layer, x


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", LAYERS)
def test_weights_that_grow(name: str, width: str, tmp_path: Path) -> None:
    """Eval equals the file's integers after the weights grew, and so does the next training forward."""
    net, layer, x = converted(name, width)
    grow(layer, x)
    with torch.no_grad():
        found = net(x)
        linger.onnx.export(net, (x,), tmp_path / "net.onnx")
        assert (runtime.load(tmp_path / "net.onnx")(x) == found.numpy()).all()
        trained = net.train()(x)
        assert torch.equal(net.eval()(x), trained)
    assert layer.bias is None or len(found.unique()) > 3


@pytest.mark.parametrize("bias", [2.0**9, 2.0**14, 2.0**20, -(2.0**25)])
@pytest.mark.parametrize("make", [lambda: nn.Linear(40, 8), lambda: nn.BatchNorm1d(40)], ids=["linear", "bn"])
def test_biases_beyond_the_products(make: Make, bias: float, tmp_path: Path) -> None:
    """A bias of up to 2^25 times the largest product makes the weight's grid coarser, the same one everywhere."""
    net = linger.init(nn.Sequential(make()))
    with torch.no_grad():
        net[0].weight.uniform_(-1, 1)
        net[0].bias.uniform_(-1, 1).mul_(bias)
        x = torch.randn(64, 40)
        for _ in range(3):
            trained = net.train()(x)
        if isinstance(net[0], nn.Linear):
            assert torch.equal(net.eval()(x), trained)
        found = net.eval()(x)
    linger.onnx.export(net, (x,), tmp_path / "net.onnx")
    report = linger.verify(net, tmp_path / "net.onnx", x, quiet=True)
    assert report.equal, str(report)
    assert len(found.unique()) > 2


def bare_norm() -> nn.Module:
    return nn.BatchNorm1d(64, eps=0.0)


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: nn.Linear(1, 64), bare_norm], ids=["linear", "bn"])
def test_one_lsb_below_a_tie(make: Make, tmp_path: Path) -> None:
    """Accumulators of 2^24 to 2^25 that lie one LSB below a tie: float32 would round them up to it."""
    net = linger.init(nn.Sequential(make()))
    layer: Any = net[0]
    k = torch.arange(-128, 128)
    products = 127 * (2 * torch.randint(-64, 64, (64,)) + 1)  # odd; in LSB of 2^-14
    ties = torch.randint(64, 127, (64,)) * 2**18 + 2**17
    layer.weight.fill_(127 / 128)
    layer.bias.copy_((ties - 1 - products).double() / 2**14)
    x = (k / 128).reshape(-1, 1)
    x = x if isinstance(layer, nn.Linear) else x.expand(-1, 64).contiguous()
    net(x)
    if isinstance(layer, nn.BatchNorm1d):
        layer.running_mean.zero_()
        layer.running_var.fill_(1.0)
    layer.running("x").fill_(127 / 128)
    layer.running("o").fill_(127 * 16.0)
    layer.forget()
    linger.onnx.export(net.eval(), (x,), tmp_path / "net.onnx")
    found = net(x)
    assert linger.verify(net, tmp_path / "net.onnx", x, quiet=True).equal
    assert len(found.unique()) > 40


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("bias", "expected"), [(4_973_591, 80), (4_973_592, 81), (500_000, 63), (-30_000_001, -53)])
def test_a_bias_that_leaves_a_float32_sum(bias: int, expected: int, train: bool) -> None:
    """1,000 products of 127 * 127 LSB and a bias: the first sum is one LSB below a tie, and beyond 2^24, where float32 is even."""
    layer = nn.Linear(1000, 1)
    with torch.no_grad():
        layer.weight.fill_(127 / 128)
        layer.bias.fill_(bias / 2**14)
    net = linger.init(nn.Sequential(layer))
    x = torch.full((2, 1000), 127 / 128)
    net(x)
    net[0].running_x.fill_(127 / 128)
    net[0].running_o.fill_(127 * 16)  # a shift by 18
    assert math.floor((1000 * 127 * 127 + bias) / 2**18 + 0.5) == expected
    if train:
        linger.hold_ranges(net.train())
    assert (net(x) if train else net.eval()(x)).tolist() == [[expected * 16.0]] * 2
