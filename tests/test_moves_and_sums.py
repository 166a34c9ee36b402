"""Upsampling, channel shuffle, padding with numbers, unfold, triangles and running sums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import CaseNet, place_inputs
from test_interop import plain_export
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.numerics import grid_of
from linger.ops import Case

IMAGE = (2, 4, 6, 6)
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest-size": lambda x: F.interpolate(x, size=(6, 18)),
    "nearest-exact": lambda x: F.interpolate(x, scale_factor=(3, 2), mode="nearest-exact"),
    "shuffle": lambda x: linger.channel_shuffle(x, 2),
    "unfold": lambda x: F.unfold(x, (3, 2), padding=1, stride=2),
    "tril": lambda x: torch.tril(x, 1),
    "triu": lambda x: x.triu(-1),
}
SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear-4": lambda x: F.interpolate(x, size=(24, 6), mode="bilinear", align_corners=False),
    "linear": lambda x: F.interpolate(x.flatten(2), scale_factor=2.0, mode="linear"),
}


def net_of(function: Any, bits: int = 8, shape: tuple[int, ...] = IMAGE) -> CaseNet:
    net = CaseNet(Case(name="case", make=lambda: function, shapes=(shape,)), bits)
    linger.init(net, data_bits=bits, out_bits=bits)
    net(torch.randn(shape))
    place_inputs(net, bits)
    return net.eval()


def on_grid(bits: int, shape: tuple[int, ...] = IMAGE) -> Tensor:
    """Every level of 8 bits equally often, at steps of the input's grid."""
    q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)
    return q * 2.0 ** (3 - bits)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", MOVES)
def test_moves_are_the_float_call(name: str, bits: int) -> None:
    """The same values, on the same grid."""
    net, x = net_of(MOVES[name], bits), on_grid(bits)
    assert torch.equal(net(x), MOVES[name](x))
    assert grid_of(net(x)).scale == 2.0 ** (bits - 3)  # type: ignore[union-attr]


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", SMOOTH)
def test_interpolation_is_correctly_rounded(name: str, bits: int) -> None:
    """floor(exact + 1/2) in LSB of the input's grid, and the error is half a step at most."""
    net, x = net_of(SMOOTH[name], bits), on_grid(bits)
    exact = SMOOTH[name](x.double()).numpy() * 2.0 ** (bits - 3)
    found = net(x).double().numpy() * 2.0 ** (bits - 3)
    assert np.array_equal(found, np.floor(exact + 0.5))
    assert np.abs(found - exact).max() == 0.5


@pytest.mark.parametrize("name", [*MOVES, *SMOOTH])
def test_gradients(name: str) -> None:
    function = (MOVES | SMOOTH)[name]
    net, a = net_of(function), (on_grid(8) * 0.9).requires_grad_()
    b = a.detach().clone().requires_grad_()
    y, z = net(a), function(b)
    g = torch.randn(y.shape)
    y.backward(g)
    z.backward(g)
    assert torch.allclose(a.grad, b.grad, atol=1e-6)  # type: ignore[arg-type]
    assert a.grad.abs().sum() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.interpolate(x, scale_factor=1.5),
        lambda x: F.interpolate(x, size=(9, 12)),
        lambda x: F.interpolate(x, scale_factor=3, mode="bilinear"),
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
        lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    ],
)
def test_other_interpolations_are_float_islands(call: Any) -> None:
    net, x = net_of(call), on_grid(8)
    assert torch.equal(net(x), call(x))
    assert grid_of(net(x)) is None


def test_shuffle_can_be_switched_off() -> None:
    try:
        linger.SetFunctionChannelShuffleQuant(False)
        assert not list(net_of(MOVES["shuffle"]).named_children())[1:]
    finally:
        linger.SetFunctionChannelShuffleQuant(True)
    assert [n for n, _ in net_of(MOVES["shuffle"]).named_children()][1:] == ["_linger_round_tensor_channel_shuffle_0"]


@pytest.mark.parametrize("value", [0.5, -3.0, 200.0])
def test_padding_with_a_number(value: float) -> None:
    """The border is the number rounded on a grid that reaches it; the inside is rounded to that grid."""
    net, x = net_of(lambda x: F.pad(x, (1, 2), value=value)), on_grid(8)
    y = net(x)
    step = 1 / float(grid_of(y).scale)  # type: ignore[union-attr]
    assert torch.equal(y[..., 1:-2], (torch.floor(x / step + 0.5) * step).clamp(-128 * step, 127 * step))
    border = {float(v) for v in torch.cat([y[..., :1], y[..., -2:]], -1).unique()}
    assert border == {min(np.floor(value / step + 0.5), 127) * step}
    assert abs(border.pop() - value) <= max(step, 0.3 * abs(value))


def test_padding_gradient() -> None:
    net = net_of(lambda x: F.pad(x, (1, 2), value=0.5), 16).train()
    x = (on_grid(8) * 0.9).requires_grad_()
    for _ in range(30):
        net(x)
    g = torch.randn(2, 4, 6, 9)
    net(x).backward(g)
    assert torch.equal(x.grad, g[..., 1:-2])


def test_running_sum_saturates_on_its_own_range() -> None:
    net = net_of(lambda x: x.cumsum(1), shape=(2, 40))
    y = net(torch.full((2, 40), 3.0))
    grid = grid_of(y)
    assert grid is not None
    assert float(y.max()) == 127 / float(grid.scale)
    assert torch.equal(y[:, :4], torch.tensor([[3.0, 6.0, 9.0, 12.0]] * 2).clamp_max(127 / float(grid.scale)))


class Decoder(nn.Module):
    """Padding, a convolution, and every way to grow an image."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ConstantPad2d(1, 30.0), nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2), nn.ChannelShuffle(2),
            nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3), nn.Upsample(scale_factor=2, mode="bilinear"), nn.ReplicationPad2d(1),
            nn.Conv2d(4, 2, 3), nn.Unfold(4, stride=4), nn.AdaptiveMaxPool1d(2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("target", ["venus", "arcs", "venusa"])
def test_a_net_of_them(target: str, tmp_path: Path) -> None:
    """Nothing is left in float, and both exporters write the same integers."""
    net = linger.init(Decoder(), target=target)
    x = torch.randn(2, 3, 4, 4)
    net(x)
    wanted = net.eval()(x)
    linger.onnx.export(net, (x,), tmp_path / "net.onnx")
    assert linger.verify(net, tmp_path / "net.onnx", x, quiet=True).equal
    plain_export(net, (x,), tmp_path / "plain.onnx")
    assert np.array_equal(linger.runtime.load(tmp_path / "plain.onnx")(x), wanted.detach().numpy())
    fresh = linger.init(Decoder(), target=target)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh.eval()(x), wanted)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
@pytest.mark.parametrize("name", ["nearest", "shuffle", "unfold", "tril", "bilinear", "cumsum"])
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    extra = {"cumsum": lambda x: x.cumsum(1)}
    net, x = net_of((MOVES | SMOOTH | extra)[name]), on_grid(8)
    with torch.no_grad():
        assert torch.equal(torch.compile(net, fullgraph=True, backend="aot_eager")(x), net(x))
