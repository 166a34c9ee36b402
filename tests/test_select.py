"""Picking values: where, masked_fill, max, min, argmax, topk, sort, adaptive max pooling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import CaseNet, inputs, place_inputs
from test_interop import plain_export
from torch import Tensor, nn

import linger
from linger.numerics import grid_of
from linger.ops import Case
from linger.verify import LEVELS

SHAPE = (2, 5, 12)
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "max": lambda x: x.max(),
    "min": lambda x: torch.min(x),
    "max-dim": lambda x: torch.max(x, 1),
    "max-keepdim": lambda x: x.max(dim=-1, keepdim=True),
    "max-values": lambda x: x.max(-1)[0],
    "min-dim": lambda x: x.min(2),
    "amax": lambda x: x.amax((1, 2)),
    "amin": lambda x: torch.amin(x, -1, keepdim=True),
    "argmax": lambda x: x.argmax(-1),
    "argmax-keepdim": lambda x: torch.argmax(x, dim=1, keepdim=True),
    "argmax-all": lambda x: x.argmax(),
    "argmin": lambda x: torch.argmin(x, 2),
    "topk": lambda x: torch.topk(x, 3),
    "topk-smallest": lambda x: x.topk(2, dim=1, largest=False),
    "sort": lambda x: x.sort(),
    "sort-descending": lambda x: torch.sort(x, 1, descending=True),
    "argsort": lambda x: x.argsort(-1, descending=True),
    "msort": lambda x: torch.msort(x.transpose(0, 2)),
}


def net_of(function: Any, bits: int, shapes: tuple[tuple[int, ...], ...] = (SHAPE,)) -> CaseNet:
    case = Case(name="case", make=lambda: function, shapes=shapes)
    net = CaseNet(case, bits)
    linger.init(net, data_bits=bits, out_bits=bits)
    net(*(torch.randn(s) for s in shapes))
    place_inputs(net, bits)
    return net.eval()


def values(bits: int, batch: int = 2, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Few levels, so that equal ones abound, and both limits."""
    x = inputs(Case(name="x", make=lambda: None, shapes=(shape,)), bits, batch, seed)[0]
    return torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.5, x.round(), x)


def picked(function: Any, x: Tensor) -> list[np.ndarray]:
    """The call in NumPy's stable order: of equal values the first."""
    out = function(x)
    return [t.numpy() for t in (out if isinstance(out, tuple) else (out,))]


@pytest.mark.parametrize("dialect", ["thinker", "standard"])
@pytest.mark.parametrize("name", CALLS)
def test_equal_everywhere(name: str, dialect: str, tmp_path: Path) -> None:
    for bits, opset in ((8, 17), (16, 17), (8, 12), (32, 18)):
        net = net_of(CALLS[name], bits)
        linger.onnx.export(net, (values(bits),), tmp_path / "net.onnx", opset_version=opset, dialect=dialect)
        for seed in range(3):
            report = linger.verify(net, tmp_path / "net.onnx", values(bits, seed=seed), quiet=True)
            assert report.equal, f"{bits} {report}"
            assert set(LEVELS) <= set(report.differing)


@pytest.mark.parametrize("name", CALLS)
def test_values_keep_the_grid(name: str) -> None:
    """What is picked was there: the same values as in float, on the same grid; indices are int64 and plain."""
    net = net_of(CALLS[name], 8)
    x = values(8)
    gridded = linger.quant_tensor(net, x, "in0")
    found, wanted = net(x), CALLS[name](gridded.detach().clone())
    pairs = zip(
        found if isinstance(found, tuple) else (found,), wanted if isinstance(wanted, tuple) else (wanted,), strict=True
    )
    for f, w in pairs:
        if f.dtype == torch.int64:
            assert grid_of(f) is None
        else:
            assert torch.equal(f, w)
            assert grid_of(f) == grid_of(gridded)


def test_the_first_of_equal_values_is_picked() -> None:
    x = torch.zeros(1, 1, 40)
    for function, wanted in (
        (lambda x: x.topk(5).indices, list(range(5))),
        (lambda x: x.sort(descending=True)[1], list(range(40))),
        (lambda x: x.max(-1)[1], 0),
        (lambda x: x.argmin(), 0),
    ):
        assert np.array_equal(net_of(function, 8)(x).squeeze().numpy(), wanted)


@pytest.mark.parametrize("name", [n for n in CALLS if not n.startswith("arg")])
def test_gradient_is_that_of_the_float_call(name: str) -> None:
    net = net_of(CALLS[name], 8)
    x = torch.linspace(-3.9, 3.9, 120)[torch.randperm(120)].view(SHAPE)  # no two levels equal
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    for given, function in ((mine, net), (other, CALLS[name])):
        out = function(given)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(torch.linspace(1, 2, out.numel()).view(out.shape))
    assert torch.equal(mine.grad, other.grad)


class Pooled(nn.Module):
    """A convolution, then adaptive max pooling."""

    def __init__(self, pool: nn.Module, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.pool = conv, pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("pool", "rank", "size"),
    [
        (nn.AdaptiveMaxPool2d(2), 2, (2, 2)),
        (nn.AdaptiveMaxPool2d((1, 4)), 2, (1, 4)),
        (nn.AdaptiveMaxPool1d(4), 1, (4,)),
    ],
)
def test_adaptive_max_pool(pool: nn.Module, rank: int, size: tuple[int, ...], bits: int, tmp_path: Path) -> None:
    net = Pooled(pool, nn.Conv2d(3, 4, 1) if rank == 2 else nn.Conv1d(3, 4, 1))
    linger.init(net, data_bits=bits, out_bits=bits)
    x = torch.randn(2, 3, *[8] * rank)
    net(x)
    y = net.eval()(x)
    assert y.shape[2:] == size
    assert grid_of(y) is not None
    linger.onnx.export(net, (x,), tmp_path / "net.onnx")
    assert linger.verify(net, tmp_path / "net.onnx", x, quiet=True).equal


def test_uneven_adaptive_max_pool_is_refused(tmp_path: Path) -> None:
    net = Pooled(nn.AdaptiveMaxPool2d(3), nn.Conv2d(3, 4, 1))
    linger.init(net)
    x = torch.randn(1, 3, 8, 8)
    net(x)
    with pytest.raises(linger.LingerError, match=r"does not divide the input \(8, 8\)"):
        linger.onnx.export(net.eval(), (x,), tmp_path / "net.onnx")


# --- one of two


def both(function: Any, x: Tensor, y: Tensor, g: Tensor) -> list[Tensor]:
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    function(a, b).backward(g)
    return [a.grad, b.grad]


@pytest.mark.parametrize(
    "function",
    [
        torch.maximum,
        torch.minimum,
        lambda x, y: torch.where(x > y, x, y),
        lambda x, y: x.where(y > 0, y),
        lambda x, y: x.masked_fill(x > 0, 2.0) + 0 * y,
    ],
)
def test_gradients_of_two(function: Any) -> None:
    net = net_of(function, 16, (SHAPE, SHAPE))
    net.train()
    x, y, g = torch.rand(SHAPE) * 7 - 3.5, torch.rand(SHAPE) * 7 - 3.5, torch.randn(SHAPE)
    for _ in range(40):
        net(x, y)
    for found, wanted in zip(both(net, x, y, g), both(function, x, y, g), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("fill", [float("-inf"), -1e9, torch.finfo(torch.float32).min, torch.tensor(float("-inf"))])
def test_a_mask_of_minus_infinity(fill: Any, tmp_path: Path) -> None:
    """The grid reaches -8, not -1e9, the masked values are its lowest, and the others stay as they were."""

    upper = torch.ones(12, 12).triu(1).bool()

    def masked(x: Tensor) -> Tensor:
        return torch.where(upper, fill, x) if isinstance(fill, Tensor) else x.masked_fill(upper, fill)

    net = net_of(masked, 8, ((2, 12, 12),))
    x = torch.rand(2, 12, 12) * 2 - 1
    net.train()(x)
    y = net.eval()(x)
    grid = grid_of(y)
    assert grid is not None
    assert grid.scale == 16
    assert (y[:, upper] == -8).all()
    assert (y[:, ~upper] - x[:, ~upper]).abs().max() <= 1 / 32 + 1 / 64
    linger.onnx.export(net, (x,), tmp_path / "net.onnx")
    assert linger.verify(net, tmp_path / "net.onnx", x, quiet=True).equal


def test_a_finite_fill_is_reached() -> None:
    net = net_of(lambda x: x.masked_fill(x > 0, 100.0), 8)
    y = net(values(8))
    assert set(y[y > 0].tolist()) == {100.0}


def test_in_place_fill(tmp_path: Path) -> None:
    def fill(x: Tensor) -> Tensor:
        y = x * 2
        y.masked_fill_(x > 0, 0)
        return y + 1

    net = net_of(fill, 8)
    x = values(8)
    assert grid_of(net(x)) is not None
    linger.onnx.export(net, (x,), tmp_path / "net.onnx")
    assert linger.verify(net, tmp_path / "net.onnx", x, quiet=True).equal


def test_different_grids_are_no_silent_maximum() -> None:
    """torch.max of two tensors of different scales compares values, not integers."""
    net = net_of(lambda x, y: torch.max(x, y), 8, (SHAPE, SHAPE))
    for name, module in net.named_children():
        if name.endswith("in1"):
            module.running("x").mul_(2.0**-6)
            module.forget()
    x, y = torch.zeros(SHAPE), torch.full(SHAPE, 0.05)
    assert (net(x, y) > 0).all()


class Loose(nn.Module):
    """torch.max of two tensors in a module that stays in float."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.max(x, y)


def test_a_maximum_in_float_has_no_grid() -> None:
    """It must not pass for the first operand's values."""
    loose = Loose()
    linger.disable_quant(loose)
    net = net_of(loose, 8, (SHAPE, SHAPE))
    assert grid_of(net(torch.zeros(SHAPE), torch.ones(SHAPE))) is None


def test_nan_is_refused() -> None:
    with pytest.raises(linger.LingerError, match=r"found the fill nan, allowed are numbers and infinities"):
        net_of(lambda x: x.masked_fill(x > 0, float("nan")), 8)


def test_out_is_refused() -> None:
    with pytest.raises(linger.LingerError, match="with out= has no fixed-point form"):
        net_of(lambda x, y: torch.maximum(x, y, out=torch.empty(SHAPE)), 8, (SHAPE, SHAPE))


class One(nn.Module):
    """One call behind a grid."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(linger.quant_tensor(self, x))


@pytest.mark.parametrize("name", ["max-dim", "argmax", "amax", "where", "fill"])
def test_plain_export(name: str, tmp_path: Path) -> None:
    extra = {"where": lambda x: torch.where(x > 1, x, x * 2), "fill": lambda x: x.masked_fill(x > 1, -2.0)}
    net = linger.init(One((CALLS | extra)[name]))
    x = values(8)
    net(x)
    wanted = net.eval()(x)
    plain_export(net, (x,), tmp_path / "plain.onnx")
    found = linger.runtime.load(tmp_path / "plain.onnx")(x)
    for f, w in zip(*((v if isinstance(v, tuple) else (v,)) for v in (found, wanted)), strict=True):
        assert np.array_equal(f, w.detach().numpy())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
@pytest.mark.parametrize(
    "function",
    [
        torch.maximum,
        lambda x, y: x.masked_fill(y > 0, -1.0),
        lambda x, y: torch.where(y > 0, x, y),
        lambda x, y: x.topk(3)[0],
    ],
)
def test_compiled(function: Any) -> None:
    torch._dynamo.reset()
    net = net_of(function, 8, (SHAPE, SHAPE))
    pair = values(8), values(8, seed=1)
    with torch.no_grad():
        assert torch.equal(torch.compile(net, fullgraph=True, backend="aot_eager")(*pair), net(*pair))
