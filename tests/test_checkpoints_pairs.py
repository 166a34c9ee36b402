"""Every kind of conv + bn, by whatever names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from checkpoint_nets import (
    LATER,
    STAGES,
    Block,
    ConvNorm,
    assert_same,
    batch,
    convert,
    named,
    not_grids,
    output,
    randomized,
    saved_of,
    see,
)
from torch import Tensor, nn

import linger


class Nested(nn.Module):
    """Modules whose float names look like fused ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = ConvNorm(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.bn = ConvNorm(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.layers = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.bn(self.conv(x)))


KINDS: dict[str, tuple[type[nn.Module], type[nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "Conv1d": (nn.Conv1d, nn.BatchNorm1d, (6,), {}),
    "Conv1d groups": (nn.Conv1d, nn.BatchNorm1d, (6,), {"groups": 2, "padding": 1}),
    "Conv2d": (nn.Conv2d, nn.BatchNorm2d, (6, 5), {}),
    "Conv2d depthwise": (nn.Conv2d, nn.BatchNorm2d, (6, 5), {"groups": 4, "stride": 2}),
    "ConvTranspose1d": (nn.ConvTranspose1d, nn.BatchNorm1d, (6,), {"stride": 2}),
    "ConvTranspose1d groups": (nn.ConvTranspose1d, nn.BatchNorm1d, (6,), {"groups": 2}),
    "ConvTranspose2d": (nn.ConvTranspose2d, nn.BatchNorm2d, (6, 5), {}),
    "ConvTranspose2d groups": (nn.ConvTranspose2d, nn.BatchNorm2d, (6, 5), {"groups": 2, "stride": 2}),
    "ConvTranspose2d 4 groups": (nn.ConvTranspose2d, nn.BatchNorm2d, (6, 5), {"groups": 4}),
}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], float | None]] = {
    "plain": ({}, {}, None),
    "eps 0.1": ({}, {"eps": 0.1}, None),
    "no bias": ({"bias": False}, {}, None),
    "no affine": ({}, {"affine": False}, None),
    "no bias, no affine, eps 0.5": ({"bias": False}, {"affine": False, "eps": 0.5}, None),
    "gamma 0": ({}, {}, 0.0),
    "gamma negative": ({"bias": False}, {"eps": 1e-3}, -1.5),
}


def make_pair(kind: str, variant: str, seed: int) -> nn.Module:
    conv, bn, _, options = KINDS[kind]
    conv_options, bn_options, gamma = VARIANTS[variant]
    net = randomized(ConvNorm(conv(4, 8, 3, **options, **conv_options), bn(8, **bn_options)), seed)
    if gamma is not None:
        with torch.no_grad():
            net.bn.weight[1:4] = gamma
    return net


def fold(net: nn.Module) -> tuple[Tensor, Tensor]:
    """(W', b') of a raw ConvNorm, one output channel at a time."""
    conv, bn = net.conv, net.bn
    weight, bias = torch.empty_like(conv.weight), torch.empty(8)
    each = 8 // conv.groups
    for channel in range(8):
        alpha = torch.rsqrt(bn.running_var[channel] + bn.eps)
        alpha = alpha if bn.weight is None else bn.weight[channel] * alpha
        if conv.transposed:
            group, column = divmod(channel, each)
            rows = slice(group * 4 // conv.groups, (group + 1) * 4 // conv.groups)
            weight[rows, column] = conv.weight[rows, column] * alpha
        else:
            weight[channel] = conv.weight[channel] * alpha
        shift = (0 if conv.bias is None else conv.bias[channel]) - bn.running_mean[channel]
        bias[channel] = shift * alpha + (0 if bn.bias is None else bn.bias[channel])
    return weight, bias


@pytest.mark.parametrize("loaded_at", LATER)
@pytest.mark.parametrize("stage", STAGES[:3])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind_of_pair_folds(kind: str, variant: str, stage: str, loaded_at: str) -> None:
    """Fixed-point weights are W gamma / sqrt(var + eps) to the last bit, wherever the checkpoint was loaded."""
    if STAGES.index(stage) > STAGES.index(loaded_at):
        loaded_at = stage
    x = batch(1, (2, 4, *KINDS[kind][2])).clamp(-0.99, 0.99)
    origin = make_pair(kind, variant, 0).eval()
    weight, bias = fold(origin)
    direct = copy.deepcopy(origin.conv).double()
    direct.weight.data, direct.bias = weight.double(), nn.Parameter(bias.double())
    wanted = copy.deepcopy(origin).double()(x.double())
    assert torch.allclose(direct(x.double()), wanted, atol=1e-5), "the formula is conv + bn"
    net = convert(make_pair(kind, variant, 5), loaded_at, sample=x)
    net.load_state_dict(convert(origin, stage, sample=x).state_dict(), strict=True)
    net = convert(net, "fixed", loaded_at)
    assert torch.equal(net.conv.weight, weight)
    assert torch.equal(net.conv.bias, bias)
    see(net, x)
    top = 127 / net.state_dict()["conv.scale_o"]
    assert top > 0.7 * wanted.abs().max()
    assert (output(net, x) - wanted.clamp(-top, top)).abs().max() < 0.1 * top
    again = convert(make_pair(kind, variant, 6), "fixed", sample=x)
    again.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(output(again, x), output(net, x))


@pytest.mark.parametrize("target", LATER)
def test_float_names_that_look_fused(target: str) -> None:
    """conv.conv, conv.bn and bn.bn of the float net are not mistaken for fused keys, in loads or in messages."""
    origin = randomized(Nested())
    raw = saved_of(origin)
    fixed = convert(copy.deepcopy(origin), "fixed")
    for stage in STAGES[: STAGES.index(target) + 1]:
        net = convert(Nested(), target)
        net.load_state_dict(convert(copy.deepcopy(origin), stage).state_dict(), strict=True)
        net = convert(net, "fixed", target)
        assert_same(not_grids(net.state_dict()), not_grids(fixed.state_dict()))
    misfit = {"bn.conv.ghost": torch.ones(1), "layers.0.weight": torch.ones(4, 5, 1, 1)}
    with pytest.raises(linger.LingerError) as caught:
        convert(Nested(), target).load_state_dict(raw | misfit)
    assert named(caught.value) == set(misfit)


class Alias(nn.Module):
    """A pair in a Sequential whose layers have a second name, registered before or after."""

    def __init__(self, conv: str, bn: str) -> None:
        super().__init__()
        layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        for when in ("before", "after"):
            if conv == when:
                self.conv = layers[0]
            if bn == when:
                self.norm = layers[1]
            self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


ALIASES = [(a, b) for a in ("no", "before", "after") for b in ("no", "before", "after") if (a, b) != ("no", "no")]


@pytest.mark.parametrize(("conv", "bn"), ALIASES)
@pytest.mark.parametrize("target", LATER)
def test_layers_with_two_names(target: str, conv: str, bn: str) -> None:
    """Every key of the float net is taken, under every name, from the root and from the Sequential alone."""
    wanted = saved_of(convert(randomized(Alias(conv, bn)), target))
    for stage in STAGES[: STAGES.index(target) + 1]:
        state = saved_of(convert(randomized(Alias(conv, bn)), stage))
        net, part = convert(Alias(conv, bn), target), convert(Alias(conv, bn), target)
        net.load_state_dict(state, strict=True)
        part.layers.load_state_dict({k.removeprefix("layers."): v for k, v in state.items() if k.startswith("layers.")})
        assert_same(net.state_dict(), wanted)
        assert_same(part.state_dict(), wanted)
    state = saved_of(randomized(Alias(conv, bn)))
    lacking = {key: value for key, value in state.items() if not key.endswith("running_var")}
    with pytest.raises(linger.LingerError) as caught:
        net.load_state_dict(lacking)
    assert "layers.1.running_var" in named(caught.value) <= state.keys() - lacking.keys()
    missing = net.load_state_dict(lacking, strict=False).missing_keys
    assert sorted(missing) == sorted(named(caught.value))


class SharedBlock(nn.Module):
    """One block under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.block = Block()
        self.blocks = nn.ModuleList([self.block])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](self.first(x))


@pytest.mark.parametrize("name", ["block", "blocks.0"])
@pytest.mark.parametrize("target", LATER)
def test_a_block_with_two_names(target: str, name: str) -> None:
    """Both are taken, and a key that is missing is named under the name that lacks it."""
    state = saved_of(randomized(SharedBlock()))
    net = convert(SharedBlock(), target)
    net.load_state_dict(state, strict=True)
    assert_same(not_grids(net.state_dict()), not_grids(convert(randomized(SharedBlock()), target).state_dict()))
    del state[f"{name}.bn.bias"]
    with pytest.raises(linger.LingerError) as caught:
        net.load_state_dict(state)
    assert named(caught.value) == {f"{name}.bn.bias"}


class Tied(nn.Module):
    """Two convolutions with one weight, each before its own batch normalization: nothing is fused."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.b.weight = self.a.weight
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.b(self.bn1(self.a(x))))


@pytest.mark.parametrize("target", LATER)
def test_tied_weights_stay_tied(target: str) -> None:
    state = saved_of(randomized(Tied()))
    net = convert(Tied(), target)
    net.load_state_dict(state, strict=True)
    assert net.a.weight is net.b.weight
    assert_same(not_grids(net.state_dict()), state)
