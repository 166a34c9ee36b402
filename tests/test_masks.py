"""Masks of gradients: the same gradient with values at hand and, as a compiler sees it, without; no bool in compiled nets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.nn import functional as F

import linger
from linger import eager, masks
from linger.numerics import fake_quant
from linger.ops.clamp import clamped

INF, NAN = math.inf, math.nan
GRADIENT = torch.tensor([1.5, -2.0, INF, -INF, NAN, 3.0, -0.0, 1e-40])


def both_ways(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What ``work`` returns with values at hand, and what it does where no value may be looked at."""
    found = work()
    monkeypatch.setattr(eager, "LOOKS", False)
    return found, work()


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit but for the sign of zeros; NaN equals NaN."""
    return a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("dtype", masks.SAME_SIZE)
@pytest.mark.parametrize("looks", [True, False])
def test_passed(dtype: torch.dtype, looks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly zero where something saturated, an infinite gradient included; else untouched."""
    monkeypatch.setattr(eager, "LOOKS", looks)
    gradient = GRADIENT.to(dtype)
    q = torch.arange(8.0)
    v = q + torch.tensor([0, 5, 0, -200, 0, 1, 0, 2.0])
    outside = masks.saturated(v.clone(), q)
    assert outside.dtype == torch.int8
    assert outside.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    found = masks.passed(gradient, outside)
    assert same(found, torch.where(outside.bool(), 0, gradient))
    assert not torch.signbit(found[outside.bool()]).any()


@pytest.mark.parametrize("inplace", [False, True])
def test_relu(inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([-1.0, 2.0, 3.0, -4.0, 5.0, 0.0, -0.0, 1e-40])

    def work() -> Tensor:
        x = values.clone().requires_grad_()
        y = x * 1
        out = masks.relu(y, inplace)
        assert torch.equal(out, F.relu(values))
        assert (out is y) == inplace
        return torch.autograd.grad(out, x, GRADIENT)[0]

    found, blind = both_ways(monkeypatch, work)
    assert same(found, blind)
    assert same(found, torch.where(values > 0, GRADIENT, 0))


@pytest.mark.parametrize("bounds", [(0.0, 6.0), (-1.0, INF), (-INF, 2.0), (-0.5, 0.5), (-INF, INF)])
@pytest.mark.parametrize("closed", [False, True])
def test_clamp(bounds: tuple[float, float], closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = torch.tensor(16.0)
    values, gradient = fake_quant(torch.linspace(-9, 9, 289), scale, 8), torch.randn(289)

    def work() -> Tensor:
        x = values.clone().requires_grad_()
        return torch.autograd.grad(clamped(x, scale, 8, bounds, closed), x, gradient)[0]

    found, blind = both_ways(monkeypatch, work)
    assert same(found, blind)
    low, high = bounds
    inside = (values >= low) & (values <= high) if closed else (values > low) & (values < high)
    assert same(found, torch.where(inside, gradient, 0))


def test_relu_of_a_plain_tensor_is_pytorchs() -> None:
    x = torch.randn(5, requires_grad=True)
    assert type(masks.relu(x).grad_fn) is type(F.relu(x).grad_fn)


class Mixed(nn.Module):
    """Every mask of a net of convolutions: saturation, relu in all spellings, relu6, hardtanh, a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(5))
        self.relus = nn.ModuleList([nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh()])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv, relu in zip(self.convs, self.relus, strict=False):
            y = relu(conv(y))
        y = self.convs[-1](y).relu_()
        return torch.relu(y + F.relu(x)).mean((2, 3))


class Deep(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.relu(conv(x))
        return x


def kept(net: nn.Module, x: Tensor) -> list[Tensor]:
    """What the forward of a compiled training step hands to its backward; a compiler for C++ is not needed for that."""
    found: list[Tensor] = []

    def forward(graph: Any, inputs: Any) -> Any:
        (output,) = graph.graph.find_nodes(op="output")
        found.extend(n.meta["val"] for n in output.args[0] if isinstance(n.meta["val"], Tensor))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=forward, bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition, decompositions=select_decomp_table(),
    )  # fmt: skip
    torch._dynamo.reset()
    torch.compile(net, backend=backend, fullgraph=True)(x).sum().backward()
    torch._dynamo.reset()
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
def test_a_compiled_net_keeps_no_bool() -> None:
    x = torch.randn(2, 8, 12, 12)
    net = linger.init(Mixed())
    net(x)
    found = kept(net, x)
    assert sum(t.dtype == torch.int8 for t in found) >= 8
    assert [t.shape for t in found if t.dtype == torch.bool and t.dim()] == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
def test_bytes_kept_per_layer() -> None:
    """Of a convolution with a relu: its input, 4 bytes per element, and one byte for what saturated."""
    x = torch.randn(2, 8, 12, 12)
    sizes = []
    for depth in (3, 5):
        net = linger.init(Deep(depth))
        net(x)
        sizes.append(sum(t.numel() * t.element_size() for t in kept(net, x) if t.numel() == x.numel()))
    assert (sizes[1] - sizes[0]) / 2 == 5 * x.numel()
