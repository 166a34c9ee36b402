"""Equalization, batch statistics, clipped weights, corrected biases: each on its own, and what it promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.demo import ResidualNet
from linger.equalize import equalize
from linger.floating import in_float
from linger.numerics import best_weight_scale, fake_quant, scale_from_weight


class Chain(nn.Module):
    """Every kind of pair: fused, grouped, depthwise, plain, 1-d, behind pooling and a mean, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depth, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.groups = nn.Conv2d(8, 12, 1, groups=4)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(12, 6, 1, bias=False)
        self.fc1, self.fc2 = nn.Linear(6, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.depth(x)))
        x = self.conv2(self.pool(F.leaky_relu(self.groups(x), 0.25)))
        return self.fc2(torch.relu(self.fc1(x.mean((2, 3)))))


ALL = [("conv1", "depth"), ("depth", "groups"), ("groups", "conv2"), ("conv2", "fc1"), ("fc1", "fc2")]


def uneven(make: Callable[[], nn.Module] = Chain) -> nn.Module:
    """A net whose channels are up to 1,000 times apart."""
    torch.manual_seed(0)
    net = make()
    net(torch.randn(16, 3, 8, 8))
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, (nn.BatchNorm2d, nn.Linear)):
                assert m.weight is not None
                m.weight.mul_(10 ** (3 * torch.rand(len(m.weight)) - 1.5).view(-1, *[1] * (m.weight.dim() - 1)))
    return net.eval()


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))
DATA = [X, X + 1]


def traced(net: nn.Module) -> nn.Module:
    return linger.trace_layers(net, net, X.to(next(net.parameters()).dtype))


# --- equalization


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equalization_keeps_the_float_function_to_the_bit(dtype: torch.dtype) -> None:
    net = traced(uneven().to(dtype))
    before, weights = net(X.to(dtype)), {k: v.clone() for k, v in net.state_dict().items()}
    assert equalize(net, (X.to(dtype),)) == ALL
    assert torch.equal(net(X.to(dtype)), before)
    assert sum(not torch.equal(v, weights[k]) for k, v in net.state_dict().items()) >= 9


def test_channels_come_together() -> None:
    net = uneven()
    equalize(traced(net), (X,))
    for first, second in ALL[2:]:
        a = net.get_submodule(first).weight.abs().flatten(1).amax(1)
        weight = net.get_submodule(second).weight.abs()
        b = weight.flatten(2).amax(2).amax(0) if weight.dim() > 2 else weight.amax(0)
        assert float((a / b).detach().max()) <= 2.01, (first, second)
        assert float((a / b).detach().min()) >= 0.49, (first, second)


def apart() -> nn.Module:
    """An ordinary net, its channels then driven up to 1,000 times apart without a change of what it computes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1))
    factor = 10 ** (3 * torch.rand(16) - 1.5)
    with torch.no_grad():
        net[0].weight.mul_(factor.view(-1, 1, 1, 1))
        net[0].bias.mul_(factor)
        net[2].weight.div_(factor.view(1, -1, 1, 1))
    return net


def test_equalization_of_a_fixed_point_net_helps() -> None:
    want = apart()(X).detach()

    def error(**options: Any) -> float:
        net = linger.calibrate(linger.init(apart()), [X], progress=False, correct_bias=False, **options).eval()
        return float((net(X).detach() - want).pow(2).sum() / want.pow(2).sum())

    assert error(equalize=True) < error() / 100


NOT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a bound": (lambda net: linger.normalize_layers(net), ""),
    "tied weights": (
        lambda net: net.add_module("other", nn.Linear(6, 7)) or setattr(net.other, "weight", net.fc1.weight),
        "fc1",
    ),
    "a hook": (lambda net: net.conv2.register_forward_hook(lambda *a: None), "conv2"),
}


@pytest.mark.parametrize("name", NOT)
def test_what_cannot_be_equalized(name: str) -> None:
    net = traced(uneven())
    change, layers = NOT[name]
    change(net)
    left = [p for p in ALL if not set(p) & set(layers.split())] if layers else []
    assert equalize(net, (X,)) == left


def test_two_readers_a_sum_and_a_relu6_end_a_pair() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y = self.b(x) + x
            return self.d(F.relu6(self.c(F.relu(y))))

    assert equalize(Net(), (X,)) == []
    with pytest.raises(linger.LingerError, match="found no two layers of Net between which channels can be scaled"):
        linger.calibrate(Net(), DATA, equalize=True, progress=False)


def test_the_demos_net_is_looked_into() -> None:
    """Its classes live in linger, but are a user's net and no layer."""
    net, x = ResidualNet().eval(), torch.randn(1, 1, 28, 28)
    linger.trace_layers(net, net, x)
    assert isinstance(net.conv, linger.NormalizeConvBN2d)
    assert equalize(net, (x,)) == [(f"block{i}.conv1", f"block{i}.conv2") for i in (1, 2)]


def test_a_linear_layer_over_sequences() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    with torch.no_grad():
        net[0].weight[2] *= 100
    x = torch.randn(4, 9, 3, dtype=torch.float64)
    before = net(x)
    assert equalize(net, (x,)) == [("0", "2")]
    assert torch.equal(net(x), before)
    assert bool((net[0].weight[2].abs() < 20).all())


# --- statistics


@pytest.mark.parametrize("stage", ["float", "traced", "normalized", "alone in fixed point"])
def test_statistics_are_the_average_over_the_batches(stage: str) -> None:
    net: Any = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    want = [(m, torch.var(y, (0, 2, 3))) for x in DATA for y in [net[0](x)] for m in [y.mean((0, 2, 3))]]
    bn = net[1]
    if stage in ("traced", "normalized"):
        traced(net)
    if stage == "normalized":
        linger.normalize_layers(net)
    if stage == "alone in fixed point":
        linger.init(net)
        bn = net[1]
    linger.calibrate(net, DATA, batchnorm=True, progress=False)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if "fixed" not in stage else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(bn.running_mean, (want[0][0] + want[1][0]) / 2, **tolerance)
    torch.testing.assert_close(bn.running_var, (want[0][1] + want[1][1]) / 2, **{**tolerance, "rtol": 0.05})
    assert bn.momentum == 0.1
    assert net.training


def test_no_batch_normalization_left() -> None:
    with pytest.raises(linger.LingerError, match="without a batch normalization, which init folds"):
        linger.calibrate(linger.init(traced(uneven())), DATA, batchnorm=True, progress=False)


# --- weights and biases


@pytest.mark.parametrize("bits", [4, 8])
def test_the_weights_scale_is_the_best_power_of_two(bits: int) -> None:
    torch.manual_seed(0)
    for outlier in (1.0, 4.0, 30.0):
        weight = torch.cat((torch.randn(4000), torch.tensor([outlier])))
        chosen = float(best_weight_scale(weight, bits))
        scales = [2.0**n for n in range(-8, 12)]
        errors = [float((fake_quant(weight, torch.tensor(s), bits) - weight).pow(2).sum()) for s in scales]
        assert chosen == scales[errors.index(min(errors))] or outlier == 30.0
        assert chosen >= scale_from_weight(weight, bits)


def test_clipped_weights_get_the_scale() -> None:
    net = linger.init(nn.Sequential(nn.Linear(64, 64)), parameter_bits=4)
    with torch.no_grad():
        net[0].weight.normal_(0, 0.02)[0, 0] = 0.15
    best = best_weight_scale(net[0].weight.detach(), 4)
    assert best > scale_from_weight(net[0].weight, 4)
    linger.calibrate(net, [torch.randn(8, 64)], weights="mse", progress=False)
    assert torch.equal(scale_from_weight(net[0].weight, 4), best)


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(8, 12, 2, bidirectional=True),
    "gru": lambda: nn.GRU(8, 12),
    "rnn": lambda: nn.RNN(8, 12),
    "cell": lambda: nn.LSTMCell(8, 12),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_clipped_weights_of_recurrent_layers(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(RECURRENT[name]())
    matrices = {n: p for n, p in net.named_parameters() if p.dim() > 1}
    with torch.no_grad():
        for p in matrices.values():
            p.normal_(0, 0.02)[0, 0] = 0.15
    net = linger.init(net, parameter_bits=4)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    data = [torch.randn(6, 4, 8) if name != "cell" else torch.randn(4, 8)]
    linger.calibrate(net, data, progress=False)
    for n, p in net.named_parameters():
        if n in matrices:
            assert torch.equal(scale_from_weight(p, 4), best_weight_scale(before[n], 4))
            assert not torch.equal(p, before[n])
        else:
            assert torch.equal(p, before[n])
    with in_float(net):
        assert all(torch.equal(p, before[n]) for n, p in net.named_parameters()), "what it is compared with"
    linger.calibrate(net, data, weights=None, progress=False)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters()), "a second calibration takes it back"


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_a_bounded_recurrent_layer_in_float_is_its_normalized_twin(name: str) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(RECURRENT[name]()), torch.randn(6, 4, 8)
    linger.normalize_layers(net, normalize_output_value=0.05)
    want, states = net(x)
    assert float(want.detach().abs().max()) == pytest.approx(0.05)
    fixed = linger.calibrate(linger.init(net), [x], weights=None, progress=False)
    with in_float(fixed), torch.no_grad():
        found, kept = fixed(x)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(kept, states)


def test_a_corrected_bias_makes_up_for_the_mean_that_weights_lose() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).requires_grad_(False)
    data = [torch.rand(16, 3, 8, 8) for _ in range(4)]
    with torch.no_grad():
        want = [torch.cat([net[: n + 1](x) for x in data]).mean((0, 2, 3)) for n in (0, 2)]
    fixed = linger.init(net, parameter_bits=4)

    def lost(**options: Any) -> float:
        linger.calibrate(fixed, data, progress=False, **options)
        with torch.no_grad():
            return float((torch.cat([fixed.eval()(x) for x in data]).mean((0, 2, 3)) - want[1]).abs().max())

    before = lost(correct_bias=False)
    assert lost(correct_bias=True) < before / 3


def test_a_net_that_went_through_everything_is_exported_equal(tmp_path: Path) -> None:
    net = linger.init(traced(uneven()), parameter_bits=4)
    linger.calibrate(net, DATA, "kl", weights="mse", equalize=True, correct_bias=True, progress=False)
    linger.onnx.export(net, (X,), tmp_path / "net.onnx")
    assert linger.verify(net, tmp_path / "net.onnx", X, quiet=True).equal


# --- the net in float


@torch.no_grad()
def test_in_float_is_the_float_net_and_leaves_nothing_behind() -> None:
    want = uneven()(X)
    net = linger.calibrate(linger.init(traced(uneven()), parameter_bits=4), DATA, progress=False)
    fixed, state = net(X), {k: v.clone() for k, v in net.state_dict().items()}
    with in_float(net):
        torch.testing.assert_close(net(X), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(net(X), fixed)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    with in_float(net, but=[net.get_submodule("fc2")]):
        assert 0 < float((net(X) - want).abs().max()) < float((fixed - want).abs().max())


def test_weights_option() -> None:
    with pytest.raises(linger.LingerError, match="weights is 'max', allowed are None and 'mse'"):
        linger.calibrate(linger.init(uneven()), DATA, weights="max")
