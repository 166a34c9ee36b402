"""A module that a forward calls several times quantizes its weights once, and everything is as if it did so at each call."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import linger
from linger import eager
from linger.ops import _once, _weighted

CALLS = 5


class Loop(nn.Module):
    """(N, 12) -> (N, 12); ``between`` runs in front of every call of the cell."""

    def __init__(self, cell: nn.Module | None = None, between: Callable[[nn.Module, int], None] | None = None) -> None:
        super().__init__()
        self.cell = nn.Linear(12, 12) if cell is None else cell
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        for i in range(CALLS):
            if self.between is not None:
                self.between(self.cell, i)
            x = torch.tanh(self.cell(x))
        self.cell.__dict__.pop("weight", None)  # of ``swapped``
        return x


class Twice(nn.Module):
    """Two results of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(x), self.fc(y)


@pytest.fixture
def scales(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each weight that is quantized."""
    found: list[int] = []
    real = _weighted.scale_from_weight

    def counted(weight: Tensor, bits: int) -> Tensor:
        found.append(bits)
        return real(weight, bits)

    monkeypatch.setattr(_weighted, "scale_from_weight", counted)
    return found


def converted(net: nn.Module, *x: Tensor) -> nn.Module:
    linger.init(net)
    net(*x)
    net(*x)
    return net


def step(net: nn.Module, *x: Tensor) -> list[Tensor]:
    """Outputs and gradients of a training step, and outputs in eval."""
    net.zero_grad()
    out = net.train()(*x)
    torch.stack([t.square().sum() for t in (out if isinstance(out, tuple) else (out,))]).sum().backward()
    with torch.no_grad():
        after = net.eval()(*x)
    found = [*out, *after] if isinstance(out, tuple) else [out, after]
    return [t.detach().clone() for t in (*found, *(p.grad for p in net.parameters() if p.grad is not None))]


def alike(net: nn.Module, monkeypatch: pytest.MonkeyPatch, *x: Tensor) -> None:
    """The same bits where every call quantizes anew."""
    other = copy.deepcopy(net)
    found = step(net, *x)
    with monkeypatch.context() as patch:
        patch.setattr(_once, "recall", lambda module, given: None)
        expected = step(other, *x)
    assert len(found) == len(expected) > 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def scaled(cell: nn.Module, i: int) -> None:
    with torch.no_grad():
        cell.weight.mul_(1.01 if i else 1.01 ** (1 - CALLS))


def scaled_data(cell: nn.Module, i: int) -> None:
    """Which no count of changes tells."""
    cell.weight.data.mul_(1.25 if i else 1.25 ** (1 - CALLS))


def assigned_data(cell: nn.Module, i: int) -> None:
    cell.weight.data = cell.weight.data * (1.25 if i else 1.25 ** (1 - CALLS))


def swapped(cell: nn.Module, i: int) -> None:
    """A weight that some code computes at every call."""
    cell.__dict__["weight"] = cell._parameters["weight"] * (1 + i / 4)


@pytest.mark.parametrize("train", [True, False])
def test_once_in_a_forward(train: bool, scales: list[int]) -> None:
    x = torch.randn(3, 12)
    net = converted(Loop(), x).train(train)
    net(x)
    for _ in range(3):
        scales.clear()
        net(x)
        assert len(scales) == (
            2 if train else 1
        )  # the input of the first call is on a grid of its own, which eval knows


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (Loop, {}),
        (lambda: Loop(nn.Linear(12, 12, bias=False)), {}),
        (Loop, {"normalize_weight_value": 0.2, "normalize_bias_value": 0.1}),
        (lambda: Loop(weight_norm(nn.Linear(12, 12))), {}),
        (lambda: Loop(between=scaled), {}),
        (lambda: Loop(between=scaled_data), {}),
        (lambda: Loop(between=assigned_data), {}),
        (lambda: Loop(between=swapped), {}),
    ],
    ids=["plain", "without bias", "bounded", "weight_norm", "changed in place", "data", "other data", "computed"],
)
def test_alike(make: Callable[[], nn.Module], settings: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    x, net = torch.randn(3, 12), make()
    if settings:
        linger.normalize_layers(net, **settings)
    alike(converted(net, x), monkeypatch, x)


@pytest.mark.parametrize("kind", ["learned", "lsq"])
def test_learned_ranges_are_alike(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call has to give the threshold its gradient, so that nothing is kept."""
    x = torch.randn(3, 12)
    net = linger.calibrate(linger.init(Loop(), observe=kind), [x], progress=False)
    alike(net, monkeypatch, x)


def test_two_calls_with_inputs_on_different_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(3, 12), 50 * torch.randn(3, 12)
    alike(converted(Twice(), x, y), monkeypatch, x, y)


@pytest.mark.parametrize("bound", [None, 0.2])
def test_two_backwards(bound: float | None) -> None:
    """Each call has its own graph, as in the float net."""
    net, x, y = Twice(), torch.randn(3, 12), torch.randn(3, 12)
    if bound is not None:
        linger.normalize_layers(net, normalize_weight_value=bound)
    converted(net, x, y)
    a, b = net(x, y)
    a.sum().backward()
    first = net.fc.weight.grad.clone()
    b.sum().backward()
    assert not torch.equal(net.fc.weight.grad, first)


@pytest.mark.parametrize("between", [None, scaled, assigned_data])
def test_where_no_value_may_be_looked_at(
    between: Callable[[nn.Module, int], None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Same(Loop):
        def forward(self, x: Tensor) -> Tensor:
            x, results = torch.tanh(self.cell(x)), []
            for i in range(CALLS):
                if self.between is not None:
                    self.between(self.cell, i)
                results.append(self.cell(x))
            return torch.stack(results)

    x = torch.randn(3, 12)
    monkeypatch.setattr(eager, "LOOKS", False)
    alike(converted(Same(between=between), x), monkeypatch, x)


def test_checkpointed() -> None:
    class Saved(Loop):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(CALLS):
                x = torch.tanh(checkpoint(self.cell, x, use_reentrant=False))
            return x

    torch.manual_seed(1)
    x = torch.randn(3, 12, requires_grad=True)
    net = converted(Loop(), x)
    saved = Saved()
    linger.init(saved)
    saved(x)
    saved.load_state_dict(net.state_dict())
    for n in (net.eval(), saved.eval()):  # in training every call moves the range
        n.zero_grad()
        n(x).sum().backward()
    assert torch.equal(net.cell.weight.grad, saved.cell.weight.grad)


def test_nothing_is_kept_in_training() -> None:
    x, net = torch.randn(3, 12), converted(Loop(), torch.randn(3, 12))
    made: list[weakref.ref[Tensor]] = []
    real = _once.keep

    def kept(module: nn.Module, given: _once.Given, weight: Tensor, *rest: Tensor) -> None:
        made.append(weakref.ref(weight))
        real(module, given, weight, *rest)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(_once, "keep", kept)
        net(x)
        net.eval()(x)
    net.train()
    gc.collect()
    assert made
    assert all(ref() is None for ref in made)
    assert _once.FORWARD.get() is None


def test_nothing_is_kept_behind_an_error() -> None:
    net = converted(Loop(), torch.randn(3, 12))
    with pytest.raises(RuntimeError):
        net(torch.randn(3, 11))
    assert _once.FORWARD.get() is None


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "data": lambda m: m.weight.data.mul_(0.5),
    "one weight": lambda m: m.weight.data[0, 0].add_(0.5),
    "bias": lambda m: m.bias.data.add_(1),
    "in place": lambda m: torch.nn.init.uniform_(m.weight),
    "another parameter": lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach() * 3)),
    "no bias": lambda m: setattr(m, "bias", None),
    "loaded": lambda m: m.load_state_dict({k: v * 0.5 if k == "weight" else v for k, v in m.state_dict().items()}),
    "fewer bits": lambda m: setattr(m, "parameter_bits", 4),
    "a bound": lambda m: setattr(m, "normalize_weight", 0.1),
    "the input's range": lambda m: m.running_x.mul_(4),
    "the output's range": lambda m: m.running_o.mul_(4),
    "float16": lambda m: m.half(),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_eval_forwards_is_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 12)
    net = converted(nn.Sequential(nn.Linear(12, 12)), x).eval()
    before = net(x).detach()
    assert torch.equal(net(x), before)
    CHANGES[change](net[0])
    found = net(x).detach()
    monkeypatch.setattr(_once, "recall", lambda module, given: None)
    assert torch.equal(found, net(x))
    assert not torch.equal(found, before)


def test_eval_forwards_quantize_weights_once(scales: list[int]) -> None:
    x = torch.randn(3, 12)
    net = converted(nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)), x).eval()
    for expected in (2, 0, 0):
        scales.clear()
        net(x)
        assert len(scales) == expected
    net.train()(x)
    net.eval()
    scales.clear()
    net(x)
    assert len(scales) == 2


def test_a_nan_is_no_weight_that_was_kept() -> None:
    x = torch.randn(3, 12)
    net = converted(nn.Sequential(nn.Linear(12, 12)), x).eval()
    net(x)
    net[0].weight.data[0, 0] = torch.nan
    for _ in range(2):
        assert net(x).isnan().any()


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_in_eval(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was kept in one forward without gradients serves one that has them."""
    x = torch.randn(3, 12, requires_grad=True)
    net = converted(nn.Sequential(nn.Linear(12, 12)), x).eval().requires_grad_(not frozen)
    wanted = x if frozen else net[0].weight
    with torch.inference_mode():
        net[0](x)
        net(x)
    found = []
    for _ in range(2):
        wanted.grad = None
        net(x).square().sum().backward()
        found.append(wanted.grad.clone())
        monkeypatch.setattr(_once, "recall", lambda module, given: None)
    assert torch.equal(*found)
    assert found[0].any()


def test_nets_take_what_is_kept_with_them() -> None:
    x = torch.randn(3, 12)
    net = converted(nn.Sequential(nn.Linear(12, 12)), x).eval()
    net(x)
    other = copy.deepcopy(net)
    layer = net[0]
    assert layer in _once.EVAL
    assert other[0] not in _once.EVAL
    gone = weakref.ref(layer)
    del net, layer
    gc.collect()
    assert gone() is None


def test_a_layer_that_is_called_once_keeps_nothing() -> None:
    x = torch.randn(3, 12)
    net = converted(nn.Sequential(nn.Linear(12, 3)), x)
    net(x)
    assert not net[0].repeats
