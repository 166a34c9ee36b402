"""Every switch does what its name says at the next conversion, and nothing to nets converted before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger import settings
from linger.numerics import grid_of
from linger.ops import BY_CALL, COMPOSED
from linger.settings import PlatFormQuant, QuantMode

Call = Callable[[Tensor], Tensor]

# switch -> (on by default, a call it governs, the function behind that call)
SWITCHES: dict[str, tuple[bool, dict[Any, Call]]] = {
    "SetIQTensorAdd": (True, {torch.add: lambda x: x + x, torch.sub: lambda x: x - 0.5}),
    "SetIQTensorMul": (True, {torch.mul: lambda x: x * x}),
    "SetIQTensorDiv": (True, {torch.div: lambda x: x / 2}),
    "SetIQTensorSum": (True, {torch.sum: lambda x: x.sum(-1), torch.mean: lambda x: x.mean(-1)}),
    "SetIQTensorCat": (True, {torch.cat: lambda x: torch.cat([x, x], 1)}),
    "SetIQTensorClamp": (True, {torch.clamp: lambda x: x.clamp(0, 1), F.relu6: lambda x: F.relu6(x)}),
    "SetIQTensorSigmoid": (True, {torch.sigmoid: lambda x: x.sigmoid()}),
    "SetIQTensorTanh": (True, {torch.tanh: lambda x: x.tanh()}),
    "SetIQTensorSoftmax": (True, {torch.softmax: lambda x: x.softmax(-1)}),
    "SetIQTensorLogSoftmax": (True, {torch.log_softmax: lambda x: x.log_softmax(-1)}),
    "SetIQTensorVar": (True, {torch.var: lambda x: x.var(-1)}),
    "SetFunctionBmmQuant": (True, {torch.bmm: lambda x: torch.bmm(x, x.transpose(1, 2))}),
}
OTHERS = {"SetPlatFormQuant", "SetBnMomentumUpdate", "SetFunctionChannelShuffleQuant"}
ROWS = [(name, func) for name, (_, calls) in SWITCHES.items() for func in calls]
IDS = [f"{name}-{func.__name__}" for name, func in ROWS]


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """The switches are global: every test leaves them as it found them."""
    before = (settings.config.platform_quant, settings.config.bn_frozen, set(settings.config.off))
    yield
    settings.config.platform_quant, settings.config.bn_frozen, settings.config.off = before


class Net(nn.Module):
    """A layer that gives its result a grid, then one call."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 1)
        self.call = call
        self.gridded = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.call(self.conv(x))
        self.gridded = grid_of(y) is not None
        return y


def has_form(func: Any) -> bool:
    """Whether the op table has the call, or what it is made of."""
    return func in BY_CALL or func in COMPOSED


def in_fixed_point(call: Call) -> bool:
    """Whether a net converted now runs the call in fixed point."""
    net = Net(call)
    linger.init(net)(torch.randn(2, 2, 4))
    return net.gridded


def test_every_switch_is_here() -> None:
    assert {name for name in dir(settings) if name.startswith("Set")} == SWITCHES.keys() | OTHERS
    assert all(getattr(linger, name) is getattr(settings, name) for name in SWITCHES.keys() | OTHERS)
    assert linger.config is settings.config


def test_what_is_off_at_first() -> None:
    """Nothing: unlike in upstream, batched products are in fixed point, so that an attention is."""
    assert settings.Config().off == set()


@pytest.mark.parametrize(("name", "func"), ROWS, ids=IDS)
def test_by_default(name: str, func: Any) -> None:
    on, calls = SWITCHES[name]
    assert in_fixed_point(calls[func]) is (on and has_form(func))


@pytest.mark.parametrize(("name", "func"), ROWS, ids=IDS)
def test_off_is_a_float_island_and_on_brings_it_back(name: str, func: Any) -> None:
    """Off, the call's result has no grid and the net has no site for it; the values are those of the float call."""
    switch, call = getattr(linger, name), SWITCHES[name][1][func]
    switch(False)
    net = Net(call)
    linger.init(net)
    x = torch.randn(2, 2, 4)
    out = net(x)
    assert not net.gridded
    assert not [child for child in net._modules if child != "conv"]
    with torch.no_grad():
        assert torch.equal(net.eval()(x), call(net.conv(x)))
    assert torch.equal(out, net(x))
    switch(True)
    assert in_fixed_point(call) is (has_form(func))
    switch(False)
    switch()
    assert in_fixed_point(call) is (has_form(func))


@pytest.mark.parametrize(("name", "func"), ROWS, ids=IDS)
def test_one_switch_is_one_kind_of_call(name: str, func: Any) -> None:
    """Turning everything else off leaves this call in fixed point."""
    for other in SWITCHES:
        getattr(linger, other)(other == name)
    assert in_fixed_point(SWITCHES[name][1][func]) is (has_form(func))


def test_read_at_conversion() -> None:
    """A net keeps what was switched on when it was converted."""
    net = Net(lambda x: x + x)
    linger.init(net)
    linger.SetIQTensorAdd(False)
    net(torch.randn(2, 2, 4))
    assert net.gridded


def test_switches_name_the_sites_of_the_op_table() -> None:
    """A site that is renamed in the op table takes its switch along."""
    switched: set[str] = set()
    for name in SWITCHES:
        settings.config.off = set()
        getattr(linger, name)(False)
        switched |= settings.config.off
    assert {op.site for func, op in BY_CALL.items() for _, f in ROWS if f is func} <= switched


# --- batch normalization, platform, modes


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fused = nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3)
        self.alone = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.alone(torch.relu(self.fused(self.conv(x))))


def statistics(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items() if k.endswith(("running_mean", "running_var"))}


@pytest.mark.parametrize("stage", ["normalize", "init"])
@pytest.mark.parametrize("frozen", [True, False])
def test_bn_statistics(stage: str, frozen: bool) -> None:
    """Frozen ones stay as they were loaded; ``fused`` has none left after ``init``."""
    net, x = Norms(), torch.randn(4, 2, 5) + 3
    linger.trace_layers(net, net, x)
    linger.SetBnMomentumUpdate(frozen)
    linger.normalize_layers(net) if stage == "normalize" else linger.init(net)
    before = statistics(net)
    assert len(before) == (4 if stage == "normalize" else 2)
    for _ in range(3):
        net.train()(x)
    after = statistics(net)
    assert all(torch.equal(before[key], after[key]) is frozen for key in before)


def test_bn_converted_before_or_left_alone_follows() -> None:
    bn, net = nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm1d(2))
    linger.normalize_layers(net)
    linger.SetBnMomentumUpdate()
    assert (bn.momentum, net[0].momentum) == (0.1, 0.1)
    assert linger.config.bn_frozen


def test_platform() -> None:
    linger.SetPlatFormQuant(PlatFormQuant.luna_quant)
    linger.SetPlatFormQuant()
    assert linger.config.platform_quant is PlatFormQuant.luna_quant
    with pytest.raises(
        linger.LingerError, match=r"SetPlatFormQuant: found gpu, allowed is PlatFormQuant\.luna_quant; pass"
    ):
        linger.SetPlatFormQuant("gpu")  # type: ignore[arg-type]


def test_modes() -> None:
    """The members and values that upstream's scripts use."""
    assert {m.name: m.value for m in QuantMode} == {"QValue": 1}
    assert {m.name: m.value for m in PlatFormQuant} == {"luna_quant": 1}


def test_channel_shuffle_is_stored() -> None:
    for enable, stored in ((True, False), (False, True)):
        linger.SetFunctionChannelShuffleQuant(enable)
        assert ("channel_shuffle" in linger.config.off) is stored
