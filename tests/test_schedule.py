"""When what freezes: the plain functions, the epochs of a Schedule, and the damping of few bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import linger
from linger.schedule import oscillation
from linger.training import thresholds

X = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def make(stage: str = "fixed", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    linger.trace_layers(net, net, X)
    if stage == "normalized":
        return linger.normalize_layers(net)
    return linger.calibrate(linger.init(net, **options), [X], hold=False, progress=False)


def test_held_ranges() -> None:
    net = make().train()
    before = net[0].running("o").item()
    linger.hold_ranges(net)
    net(X * 9)
    assert net[0].running("o").item() == before
    linger.hold_ranges(net, False)
    net(X * 9)
    assert net[0].running("o").item() != before


def test_frozen_thresholds() -> None:
    net = make(observe="learned").train()
    optimizer = torch.optim.Adam(linger.param_groups(net, lr=1e-3), weight_decay=0.1)

    def step() -> list[float]:
        before = [p.item() for _, p in thresholds(net)]
        optimizer.zero_grad()
        net(X).pow(2).sum().backward()
        optimizer.step()
        return [b - p.item() for b, (_, p) in zip(before, thresholds(net), strict=True)]

    assert all(step())
    linger.freeze_thresholds(net)
    assert not any(step())
    linger.freeze_thresholds(net, False)
    assert all(step())


@pytest.mark.parametrize("stage", ["normalized", "fixed"])
def test_frozen_batch_normalization_trains_with_what_eval_uses(stage: str) -> None:
    net = make(stage)
    linger.freeze_batchnorm(net.train())
    before = {k: v.clone() for k, v in net.state_dict().items() if "running_mean" in k or "running_var" in k}
    linger.hold_ranges(net)
    out = net(X)
    assert before
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    torch.testing.assert_close(out, net.eval()(X), rtol=1e-5, atol=1e-5)
    linger.freeze_batchnorm(net.train())
    net(X).sum().backward()
    assert net[3].weight.grad is not None


def frozen(schedule: linger.Schedule, epoch: int) -> str:
    """One letter for each thing that is frozen in the epoch."""
    net = make(observe="learned").train()
    schedule.begin(net, epoch)
    found = {"r": net[0].still, "b": not net[3].training, "t": not next(thresholds(net))[1].requires_grad}
    return "".join(letter for letter, on in found.items() if on)


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"epochs": 4}, ["", "", "rb", "rbt"]),
        ({"epochs": 6, "normalize": 2}, ["", "", "", "", "rb", "rbt"]),
        ({"epochs": 2, "ranges": None, "thresholds": None, "batchnorm": 0}, ["b", "b"]),
        ({"epochs": 2, "ranges": 1.0, "thresholds": 0.5, "batchnorm": None}, ["", "t"]),
    ],
    ids=str,
)
def test_epochs(options: dict[str, Any], want: list[str]) -> None:
    schedule = linger.Schedule(**options)
    assert [frozen(schedule, epoch) for epoch in range(schedule.epochs)] == want
    assert [e for e in range(schedule.epochs) if schedule.converts(e)] == [options.get("normalize", 0)]


def test_damping_is_the_distance_to_the_levels_and_pulls_towards_them() -> None:
    net = linger.calibrate(
        linger.init(nn.Sequential(nn.Linear(4, 3)), parameter_bits=4), [torch.randn(2, 4)], progress=False
    )
    layer: Any = net[0]
    q = layer.grids(layer.scale("x", 8))[0].detach()
    value = oscillation(net)
    torch.testing.assert_close(value, (q - layer.weight).pow(2).sum())
    value.backward()
    torch.testing.assert_close(layer.weight.grad, -2 * (q - layer.weight.detach()))
    schedule = linger.Schedule(epochs=4, damp=0.5)
    assert [round(float(schedule.damping(net, e).detach() if e else 0) / value.item(), 6) for e in range(5)] == [
        0, 0.073223, 0.25, 0.426777, 0.5,
    ]  # fmt: skip
    assert linger.Schedule(epochs=4).damping(net, 3) == 0.0
    assert oscillation(make()) == 0


def test_no_pull_on_a_weight_that_saturates() -> None:
    net = linger.init(nn.Sequential(nn.Linear(4, 3)), parameter_bits=4, observe="learned")
    linger.calibrate(net, [torch.randn(2, 4)], progress=False)
    layer: Any = net[0]
    with torch.no_grad():
        layer.weight[0, 0] = 100.0
    oscillation(net).backward()
    assert layer.weight.grad[0, 0] == 0
    assert layer.weight.grad.count_nonzero() > 0


BAD = [
    ({"epochs": 3, "normalize": 3}, "normalize is 3, allowed are 0 to 2 of 3 epochs"),
    ({"epochs": 3, "ranges": 1.5}, "ranges is 1.5, allowed are None and parts from 0 to 1"),
    ({"epochs": 3, "damp": -1}, "damp is -1, allowed are 0 and above"),
]


@pytest.mark.parametrize(("options", "text"), BAD)
def test_errors(options: dict[str, Any], text: str) -> None:
    with pytest.raises(linger.LingerError, match=text):
        linger.Schedule(**options)
