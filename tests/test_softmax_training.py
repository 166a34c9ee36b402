"""Softmax, softmin and log-softmax, continued: gradients, masks, losses and errors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_interop import described, plain_export
from test_softmax import CHIPS, FUNCTIONS, Both, X, both, converted, grids
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.numerics import grid_of
from linger.ops.softmax import saturating_rows
from linger.targets import TARGETS
from linger.verify import session


@pytest.mark.parametrize("chip", CHIPS)
def test_softmin_is_softmax_of_the_negative(chip: str, tmp_path: Path) -> None:
    net, other = converted(nn.Softmin(1), chip), converted(lambda x: torch.softmax(x, 1), chip)
    for n in (net, other):
        n(X)
        grids(n, 4, 8)
    lowest = X.clone()
    lowest[:, 2] = -9.0  # -128 at 2^4, whose negative is 127
    with torch.no_grad():
        assert torch.equal(net(lowest), other(-lowest))
    linger.onnx.export(net, (X,), tmp_path / "n.onnx")
    assert linger.verify(net, tmp_path / "n.onnx", X, quiet=True).equal


def test_softmin_through_plain_export(tmp_path: Path) -> None:
    net = converted(nn.Softmin(1))
    net(X)
    with torch.no_grad():
        net.eval()(X)
    theirs = plain_export(net, (X,), tmp_path / "n.onnx")
    ours = linger.onnx.export(net, (X,), None, dynamic_axes={"x": {0: "batch"}})
    assert described(theirs) == described(ours)


@pytest.mark.parametrize("name", ["softmax", "softmin", "log_softmax"])
def test_other_types_are_float_islands(name: str) -> None:
    net = converted(lambda x: getattr(F, name)(x, -1, dtype=torch.float64).float())
    assert grid_of(net(X)) is None
    with pytest.warns(linger.LingerWarning, match=r"in float: (softmin|softmax|log_softmax)_0"):
        proto = linger.onnx.export(net.eval(), (X,), None)
    with torch.no_grad():
        assert np.allclose(session(proto, "all").run(None, {"x": X.numpy()})[0], net(X), atol=1e-6)


@pytest.mark.parametrize("switch", ["SetIQTensorSoftmax", "SetIQTensorLogSoftmax"])
def test_switched_off(switch: str) -> None:
    getattr(linger, switch)(False)
    try:
        net = linger.init(Both())
    finally:
        getattr(linger, switch)(True)
    soft, log = net(X)
    off, on = (soft, log) if switch == "SetIQTensorSoftmax" else (log, soft)
    assert grid_of(off) is None
    assert grid_of(on) is not None


@pytest.mark.parametrize("function", ["softmax", "log_softmax", "softmin"])
def test_bad_dimensions(function: str) -> None:
    net = converted(lambda x: getattr(F, function)(x, 3))
    with pytest.raises(linger.LingerError, match=r"_0: dim is 3, allowed are -3 to 2 for 3 dimensions"):
        net(X)
    net = converted(lambda x: getattr(F, function)(x.sum(), 0))
    with pytest.raises(linger.LingerError, match=r"found a tensor without dimensions.*reshape\(1\)"):
        net(X)


# --- gradients, training


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradient_is_the_float_functions(chip: str, name: str) -> None:
    """In float32 at the fake-quantized input, against float64; zero where the output saturates."""
    net = linger.init(Both(), target=chip)
    net(torch.randn(4, 9))
    grids(net, 5, 8, probability=0.3, log=3.0)
    x = (torch.randint(-90, 90, (4, 9)) / 2.0**5).requires_grad_()
    weight = torch.randn(4, 9)
    y = net(x)[list(FUNCTIONS).index(name)]
    (y * weight).sum().backward()
    inside = (y * y.grid.scale > -128) & (y * y.grid.scale < 127)
    assert 0 < int(inside.sum()) < inside.numel()
    wide = x.detach().double().requires_grad_()
    (FUNCTIONS[name](wide) * weight.double() * inside).sum().backward()
    assert torch.allclose(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-6)  # float32 sums of 9 terms


def test_losses_stay_in_float() -> None:
    """A loss outside of the net sees plain numbers; one inside of it is not routed either."""

    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.loss = nn.Linear(6, 5), nn.CrossEntropyLoss()

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            z = self.fc(x)
            return z, self.loss(z, y)

    net = Trained()
    linger.disable_quant(net.loss)
    linger.init(net)
    x, y = torch.randn(7, 6), torch.arange(7) % 5
    z, inner = net(x, y)
    values = z.detach()
    assert z.grid is not None
    assert torch.equal(F.cross_entropy(z, y), F.cross_entropy(values, y))
    assert torch.equal(inner, F.cross_entropy(values, y))
    outside = F.log_softmax(z, -1)
    assert torch.equal(outside, F.log_softmax(values, -1))
    assert not any("oftmax" in k for k in net.state_dict())
    F.nll_loss(outside, y).backward()
    assert net.fc.weight.grad.abs().sum() > 0


def test_training_through_log_softmax_and_nll() -> None:
    net = linger.init(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3), nn.LogSoftmax(-1)), target="venus")
    x = torch.randn(64, 4)
    y = x[:, :3].argmax(1)
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(F.nll_loss(net(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 3
    with torch.no_grad():
        assert (net.eval()(x).argmax(1) == y).float().mean() > 0.9


@pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.* should not be instantiated"
)  # by PyTorch's own tracer
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("train", [True, False])
def test_compiled_is_eager(chip: str, train: bool) -> None:
    net = linger.init(Both(), target=chip)
    net(X)
    net.train(train)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    state = {k: v.clone() for k, v in net.state_dict().items()}
    found = compiled(X)
    net.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(found, net(X), strict=True))


# --- limits of the chip


@pytest.mark.parametrize("chip", CHIPS)
def test_sum_saturates_at_256(chip: str) -> None:
    """255 equal scores are right, more come out as 1/256 each; log-softmax from the sum stays right."""
    net = both(chip, 4, probability=2.0**-8, log=8.0)
    for length in (255, 256, 257, 1000):
        soft, log = (float(y[0, 0]) for y in net(torch.zeros(1, length)))
        wrong = length > 255
        assert saturating_rows(np.zeros((1, length), np.int8), 16.0, platform=chip).tolist() == [wrong]
        assert abs(soft - 1 / min(length, 256)) < 2.0**-14
        assert abs(log + math.log(length if TARGETS[chip].softmax.log_of_sum else min(length, 256))) <= 2.0**-5


@pytest.mark.parametrize("chip", CHIPS)
def test_rows_with_masked_scores(chip: str) -> None:
    """Minus infinity is the lowest level; a row that saturates throughout is uniform, at either end."""
    net = both(chip, 3)
    x = torch.tensor([[1.0, 2.0, -math.inf, -1e9], [-math.inf] * 4, [1e30] * 4, [3.0, -1e30, -1e30, -1e30]])
    soft, log = net(x)
    assert soft[0, 2:].tolist() == [0, 0]
    assert torch.equal(soft[1:3], torch.full((2, 4), 0.25))
    assert torch.equal(log[1:3], torch.full((2, 4), -1.375))  # ln 4 = 1.386 at 2^3
    assert soft[3].tolist() == [127 / 128, 0, 0, 0]


def test_output_grid_follows_the_largest_probability() -> None:
    """Never finer than the probabilities themselves, 2^15."""
    for peak, scale in ((6.0, 2.0**7), (0.0, 2.0**15)):
        net = linger.init(Both())
        x = torch.zeros(2, 250)
        x[0, 0] = 2 * peak
        assert net(x)[0].grid.scale == scale
    deep = linger.init(Both(16))
    assert deep(X)[0].grid.scale == 2.0**15
    single = linger.init(Both())
    assert single(torch.zeros(3, 1))[1].grid.scale <= 2.0**25
