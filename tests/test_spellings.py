"""Every spelling of a call stays in fixed point: it trains, is near the float call, and exports to the same integers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from spellings import ACTIVATIONS, SPELLINGS, WITHOUT_GRADIENT
from test_interop import quiet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import linger
from linger.numerics import grid_of
from linger.verify import LEVELS

NEAR = 2.0**-6  # of the largest result: numbers are stored in 8 bits, everything else has 16 or more


class Spelled(nn.Module):
    """A function of tensors, or a layer, behind inputs that are put on grids."""

    def __init__(self, function: Callable[..., Any], bits: int = 8) -> None:
        super().__init__()
        self.layer = function if isinstance(function, nn.Module) else None
        self.function = function if self.layer is None else None
        self.bits = bits

    def forward(self, *inputs: Tensor) -> Any:
        gridded = [linger.quant_tensor(self, x, f"in{i}", bits=self.bits) for i, x in enumerate(inputs)]
        return (self.layer or self.function)(*gridded)


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def converted(function: Callable[..., Any], bits: int = 8) -> Spelled:
    return linger.init(Spelled(function, bits), data_bits=bits, out_bits=bits, parameter_bits=min(bits, 16))


def exported(net: nn.Module, inputs: tuple[Tensor, ...], path: Path, **options: Any) -> None:
    """Written with a dynamic batch axis. A float op in the file would be a warning, which is an error in tests."""
    names = [f"x{i}" for i in range(len(inputs))]
    linger.onnx.export(net, inputs, path, input_names=names, dynamic_axes={n: {0: "batch"} for n in names}, **options)


def batch(shapes: tuple[tuple[int, ...], ...], size: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(size, *shape[1:]) for shape in shapes)


@pytest.mark.parametrize("name", SPELLINGS)
def test_trains(name: str) -> None:
    function, shapes = SPELLINGS[name]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    out = tensors(converted(function)(*inputs))
    assert out
    assert all(grid_of(t) is not None for t in out)
    if name not in WITHOUT_GRADIENT:
        sum((t * t).sum() + t.sum() for t in out).backward()  # type: ignore[union-attr]
        for x in inputs:
            assert x.grad is not None
            assert torch.isfinite(x.grad).all()
            assert x.grad.any()


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("name", SPELLINGS)
def test_exports(name: str, bits: int, tmp_path: Path) -> None:
    function, shapes = SPELLINGS[name]
    net = converted(function, bits)
    inputs = batch(shapes, shapes[0][0])
    net(*inputs)
    net.eval()
    exported(net, inputs, tmp_path / "net.onnx")
    for size in (1, 5):
        report = linger.verify(net, tmp_path / "net.onnx", batch(shapes, size), quiet=True)
        assert report.equal, str(report)
        assert set(report.differing) == {"runtime", *LEVELS}


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("name", SPELLINGS)
def test_is_near_the_float_call(name: str, bits: int) -> None:
    """What is equal everywhere may still be wrong everywhere."""
    function, shapes = SPELLINGS[name]
    net = converted(function, bits)
    inputs = batch(shapes, 4)
    net(*inputs)
    inputs = tuple(x / 2 for x in inputs)  # clear of saturation
    with torch.no_grad():
        found, expected = tensors(net.eval()(*inputs)), tensors(function(*inputs))
    assert [t.shape for t in found] == [t.shape for t in expected]
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) <= NEAR


@pytest.mark.parametrize(("bits", "near"), [(16, 2.0**-12), (32, 2.0**-15)])
@pytest.mark.parametrize(
    "function", [lambda x: x + 1, lambda x: 1.5 - x, lambda x: x.sub(3), lambda x: x * 0.5, lambda x: x / 2]
)
def test_numbers_cost_no_precision(function: Callable[[Tensor], Tensor], bits: int, near: float) -> None:
    """A number that a grid holds leaves the result as fine as the tensor beside it."""
    net = converted(function, bits)
    x = torch.randn(4, 50)
    net(x)
    with torch.no_grad():
        assert distance(net.eval()(x / 2), function(x / 2)) <= near


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference in terms of the largest value, as far as the grid reaches."""
    grid = grid_of(found)
    assert grid is not None
    limit = 2.0 ** (min(grid.bits, 25) - 1) / float(grid.scale)
    return float((found - expected.clamp(-limit, limit)).abs().max() / expected.abs().max())


BOTH_ROUTES = (
    "x *= y", "rsub(alpha)", "cat of torch.tensor([])", "column_stack", "mean(dim=[2, 3], keepdim=True)", "F.pad(circular)",
    "view((n, c * h * w))", "x[:, tensor]", "unpacking", "roll", "type_as", "broadcast_tensors",
)  # fmt: skip


@pytest.mark.parametrize("name", BOTH_ROUTES)
def test_plain_export_writes_the_same_integers(name: str, tmp_path: Path) -> None:
    function, shapes = SPELLINGS[name]
    net = converted(function)
    inputs = batch(shapes, 3)
    net(*inputs)
    with torch.no_grad():
        net.eval()(*inputs)
    sizes = {"inputs": tuple({0: torch.export.Dim("batch")} for _ in inputs)}
    with quiet():
        torch.onnx.export(net, inputs, tmp_path / "net.onnx", dynamo=True, verbose=False, dynamic_shapes=sizes)
    for size in (1, 5):
        report = linger.verify(net, tmp_path / "net.onnx", batch(shapes, size), quiet=True)
        assert report.differing == {"runtime": 0}


def test_plain_export_refuses_what_it_cannot_trace(tmp_path: Path) -> None:
    net = converted(lambda x: x.clone().fill_(0.5))
    x = torch.randn(3, 4)
    net(x)
    net.eval()(x)
    with (
        quiet(),
        pytest.raises(Exception, match=r"found fill on a fixed-point tensor in place, .* use linger.onnx.export"),
    ):
        torch.onnx.export(net, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False)


# --- layers


class Twice(nn.Module):
    """One layer called twice, under two names, with a call between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.again = self.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.again(F.relu(self.conv(x)))


class Nested(nn.Module):
    """Containers of every kind, called with keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a": nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4))})
        self.rest = nn.ModuleList([nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        y = self.parts["a"](input=x)
        for layer in self.rest:
            y = layer(y)
        return y + x


def _signed(norm: Any) -> Any:
    """A batch normalization with gammas of both signs and 0."""
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 1, len(norm.weight)))
        norm.weight[1] = 0
        norm.running_mean.normal_()
    return norm


MAP, SEQ, ROW = ((2, 4, 8, 8),), ((2, 4, 12),), ((3, 12),)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "conv same": (lambda: nn.Conv2d(4, 5, (3, 5), padding="same", dilation=(1, 1)), MAP),
    "conv reflect same": (lambda: nn.Conv2d(4, 5, 3, padding="same", padding_mode="reflect"), MAP),
    "conv circular": (lambda: nn.Conv1d(4, 5, 3, padding=1, padding_mode="circular"), SEQ),
    "conv of padding only": (lambda: nn.Conv2d(4, 5, 1, padding=3), MAP),
    "conv depthwise": (lambda: nn.Conv1d(4, 8, 3, groups=4, bias=False), SEQ),
    "conv + bn": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), _signed(nn.BatchNorm2d(6, eps=1e-2, momentum=0.5))), MAP),
    "conv + plain bn": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d(6, affine=False, momentum=None)), SEQ,
    ),
    "transposed + bn": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2), _signed(nn.BatchNorm2d(6))), MAP),
    "bn": (lambda: _signed(nn.BatchNorm2d(4)), MAP),
    "bn of rows": (lambda: nn.Sequential(nn.Linear(12, 4), _signed(nn.BatchNorm1d(4))), ROW),
    "linear to one": (lambda: nn.Linear(12, 1), ROW),
    "relu in place": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True), nn.ReLU6(inplace=True)), MAP),
    "max pool with ceil": (lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), MAP),
    "pads": (lambda: nn.Sequential(nn.ReflectionPad2d(1), nn.ReplicationPad2d(1), nn.CircularPad2d(1), nn.ZeroPad2d(1)), MAP),
    "flatten": (lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Flatten(1, 2), nn.Flatten(), nn.Linear(256, 3)), MAP),
    "dropout": (lambda: nn.Sequential(nn.Dropout(0.3), nn.Dropout2d(0.3), nn.Conv2d(4, 4, 1)), MAP),
    "pixel shuffle": (lambda: nn.Sequential(nn.PixelShuffle(2), nn.PixelUnshuffle(4)), MAP),
    "twice": (Twice, MAP),
    "nested": (Nested, MAP),
}  # fmt: skip


@pytest.mark.parametrize("traced", [True, False], ids=["traced", "not traced"])
@pytest.mark.parametrize("bits", [(8, 4, 8), (8, 8, 16), (16, 16, 8), (8, 16, 32), (32, 8, 8)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, bits: tuple[int, int, int], traced: bool, tmp_path: Path) -> None:
    make, shapes = LAYERS[name]
    net = Spelled(make(), bits[0])
    if traced:
        linger.trace_layers(net, net, *batch(shapes, 2))
    linger.init(net, data_bits=bits[0], parameter_bits=bits[1], out_bits=bits[2])
    x = batch(shapes, 4)
    x[0].requires_grad_()
    net(*x).square().sum().backward()
    assert x[0].grad is not None
    assert x[0].grad.any()
    net.eval()
    exported(net, x, tmp_path / "net.onnx")
    for size in (1, 5):
        report = linger.verify(net, tmp_path / "net.onnx", batch(shapes, size), quiet=True)
        assert report.equal, str(report)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_near_the_float_layer(name: str) -> None:
    make, shapes = LAYERS[name]
    layer, x = make().eval(), batch(shapes, 4)
    for module in layer.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 0.0  # the statistics stay those of the float layer
    half = [t / 2 for t in x]  # clear of saturation
    with torch.no_grad():
        expected = layer(*half)
    net = Spelled(layer, 16)
    linger.trace_layers(net, net, *x)
    linger.init(net, data_bits=16, parameter_bits=16, out_bits=16).train()(*x)
    with torch.no_grad():
        assert distance(net.eval()(*half), expected) <= NEAR


# --- what training needs of an in-place call


@pytest.mark.parametrize("name", [n for n in SPELLINGS if n.endswith(("_", "= y", "= 1", "= 2")) or n in ACTIVATIONS])
def test_gradients_of_in_place_calls(name: str) -> None:
    """They are those of the float call, which reads its operand before it is overwritten."""
    function, shapes = SPELLINGS[name]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    net = converted(function, 16)
    net(*(2 * x.detach() for x in inputs))
    (net(*inputs) * 3).sum().backward()
    found = [x.grad for x in inputs]
    wanted = [x.detach().clone().requires_grad_() for x in inputs]
    (function(*wanted) * 3).sum().backward()
    for a, b in zip(found, wanted, strict=True):
        assert a is not None
        assert b.grad is not None
        assert (a - b.grad).abs().max() <= 0.02 * b.grad.abs().max()


def test_a_divisor_that_rounds_to_0_leaves_finite_gradients() -> None:
    net = converted(lambda x, y: x / y)
    x, y = torch.randn(2, 8, requires_grad=True), torch.linspace(0.001, 8, 16).view(2, 8).requires_grad_()
    net(x, y).square().sum().backward()
    for t in (x, y):
        assert t.grad is not None
        assert torch.isfinite(t.grad).all()
