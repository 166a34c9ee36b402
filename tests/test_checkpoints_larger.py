"""Nets inside larger modules."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from checkpoint_nets import (
    LATER,
    STAGES,
    Net,
    State,
    Wrapper,
    assert_same,
    batch,
    convert,
    expected,
    named,
    not_grids,
    output,
    randomized,
    saved,
    saved_of,
    see,
)
from torch import nn

import linger


def _inner(wrapper: Wrapper, target: str) -> nn.Module:
    wrapper.net = convert(wrapper.net, target)
    return wrapper


def _outer(wrapper: Wrapper, target: str) -> nn.Module:
    linger.trace_layers(wrapper, wrapper.net, batch())
    return convert(wrapper, target, "traced")


def _across(wrapper: Wrapper, target: str) -> nn.Module:
    linger.trace_layers(wrapper.net, wrapper.net, batch())
    return convert(wrapper, target, "traced")


HOW = {
    "net alone": _inner,
    "traced and converted from outside": _outer,
    "traced alone, converted from outside": _across,
}


def wrapped(seed: int = 0) -> Wrapper:
    return Wrapper(randomized(Net(), seed))


@pytest.mark.parametrize("target", LATER)
@pytest.mark.parametrize("how", HOW)
def test_inside_a_larger_module(how: str, target: str) -> None:
    """The outer module loads raw and its own checkpoints under the prefix, in any order."""
    origin = wrapped()
    raw = saved_of(origin)
    wanted = {f"net.{key}": value for key, value in expected(saved("raw"), target).items()}
    wanted |= {key: value for key, value in raw.items() if key.startswith("head.")}
    net = HOW[how](Wrapper(Net()), target)
    net.load_state_dict(raw, strict=True)
    assert_same(not_grids(net.state_dict()), wanted)
    see(net, batch())
    own = saved_of(net)
    fresh = HOW[how](Wrapper(Net()), target)
    for state in (own, raw, own):
        fresh.load_state_dict(state, strict=True)
    assert torch.equal(output(fresh), output(net))


@pytest.mark.parametrize("how", ["net alone", "from outside"])
def test_sites_inside_a_larger_module(how: str) -> None:
    """A fixed-point checkpoint of the outer module makes the sites of a net that never ran."""

    def make() -> nn.Module:
        net = Wrapper(randomized(Net()))
        net.head.requires_grad_(False)
        if how == "from outside":
            return linger.init(net)
        net.net = linger.init(net.net)
        return net

    origin, net = make(), make()
    see(origin, batch())
    net.load_state_dict(origin.state_dict(), strict=True)
    assert torch.equal(output(net), output(origin))
    assert_same(net.state_dict(), origin.state_dict())


@pytest.mark.parametrize("target", LATER)
@pytest.mark.parametrize("how", ["traced and converted from outside", "traced alone, converted from outside"])
def test_misfit_of_a_larger_module(how: str, target: str) -> None:
    """A converted root names keys as its float net did, prefix included."""
    state = saved_of(wrapped()) | {"net.conv.weight": torch.ones(4, 3, 5, 5)}
    net = HOW[how](wrapped(), target)
    if how == "traced alone, converted from outside" and target == "traced":
        net = linger.normalize_layers(net)
    with pytest.raises(linger.LingerError) as caught:
        net.load_state_dict(state)
    assert named(caught.value) == {"net.conv.weight"}


@pytest.mark.parametrize("target", LATER)
def test_misfit_of_a_module_that_linger_never_saw(target: str) -> None:
    """Its own load, torch's, names keys and returns them as the float net did."""
    net = _inner(wrapped(), target)
    state = saved_of(wrapped())
    del state["net.block.bn.bias"]
    state["net.conv.ghost"] = state["net.bn.ghost"] = torch.ones(1)
    with pytest.raises(RuntimeError) as caught:
        net.load_state_dict(state)
    assert named(caught.value) == {"net.block.bn.bias", "net.conv.ghost", "net.bn.ghost"}
    result = net.load_state_dict(state, strict=False)
    assert result.missing_keys == ["net.block.bn.bias"]
    assert sorted(result.unexpected_keys) == ["net.bn.ghost", "net.conv.ghost"]
    with pytest.raises(RuntimeError) as caught:
        net.load_state_dict(saved_of(wrapped()) | {"net.bn.running_var": torch.ones(1)}, strict=False)
    assert named(caught.value) == {"net.bn.running_var"}


PARTS = [(stage, target) for i, stage in enumerate(STAGES) for target in STAGES[max(i, 1) :]]


@pytest.mark.parametrize(("stage", "target"), PARTS)
def test_a_part_of_the_net_loads_alone(stage: str, target: str) -> None:
    """A block takes the block's part of every earlier checkpoint, and so does its copy."""

    def part(state: State) -> State:
        return {key.removeprefix("block."): value for key, value in state.items() if key.startswith("block.")}

    net = convert(Net(), target)
    twin = copy.deepcopy(net.block)
    for block in (net.block, twin):
        block.load_state_dict(part(saved(stage)))
        assert_same(not_grids(block.state_dict()), part(expected(saved("raw"), target)))


@pytest.mark.parametrize("target", LATER)
def test_misfit_of_a_part_of_the_net(target: str) -> None:
    state = {key.removeprefix("block."): value for key, value in saved("raw").items() if key.startswith("block.")}
    del state["bn.bias"]
    with pytest.raises(RuntimeError) as caught:
        convert(Net(), target).block.load_state_dict(state)
    assert named(caught.value) == {"bn.bias"}


class Parallel(nn.Module):
    """The shape of DistributedDataParallel: everything below ``module``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.module = net


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "module.": Parallel,
    "_orig_mod.": lambda net: torch.compile(net, backend="eager"),
}


@pytest.mark.parametrize("target", LATER)
@pytest.mark.parametrize("prefix", WRAPPERS)
def test_wrapped_nets_load_under_their_prefix(prefix: str, target: str) -> None:
    net = convert(Net(), target)
    outer = WRAPPERS[prefix](net)
    for stage in STAGES[: STAGES.index(target) + 1]:
        outer.load_state_dict({f"{prefix}{key}": value for key, value in saved(stage).items()}, strict=True)
        assert_same(not_grids(net.state_dict()), expected(saved("raw"), target))
    assert outer.state_dict().keys() == {f"{prefix}{key}" for key in net.state_dict()}


def test_two_nets_traced_into_one_root() -> None:
    """Each call of trace_layers adds its pairs."""
    origin, net = (nn.ModuleDict({"a": Net(), "b": Net()}) for _ in range(2))
    raw = saved_of(randomized(origin))
    for name in ("a", "b"):
        linger.trace_layers(net, net[name], batch())
        linger.trace_layers(origin[name], origin[name], batch())
    net.load_state_dict(raw)
    assert_same(net.state_dict(), saved_of(origin))


def single(stage: str) -> nn.Module:
    net = randomized(nn.Linear(3, 2))
    net = net if stage == "raw" else linger.normalize_layers(net)
    return linger.init(net) if stage == "fixed" else net


@pytest.mark.parametrize("stage", ["raw", "normalized", "fixed"])
def test_a_single_layer(stage: str) -> None:
    """A net that is one layer: each twin loads into itself, whatever was loaded before it was swapped."""
    origin = single(stage)
    see(origin, batch(1, (2, 3)))
    net = linger.normalize_layers(randomized(nn.Linear(3, 2), 9))
    net.load_state_dict(saved_of(randomized(nn.Linear(3, 2), 8)))
    net = linger.init(net)
    gc.collect()
    net.load_state_dict(origin.state_dict(), strict=True)
    own, wanted = net.state_dict(), origin.state_dict()
    assert_same({key: own[key] for key in wanted}, wanted)
    if stage == "fixed":
        assert torch.equal(output(net, batch(2, (2, 3))), output(origin, batch(2, (2, 3))))
    with pytest.raises(RuntimeError, match='"weight"'):
        net.load_state_dict({"bias": torch.ones(2)})


@pytest.mark.parametrize("target", LATER)
def test_a_fused_layer_that_was_replaced(target: str) -> None:
    """What the user puts in its place loads its own keys, and the other pairs are translated as before."""
    net = convert(Net(), target)
    net.conv, net.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
    state = saved("raw") | {"conv.weight": torch.ones(4, 3, 1, 1)}
    net.load_state_dict(state, strict=True)
    assert torch.equal(net.conv.weight, state["conv.weight"])
    assert torch.equal(net.bn.running_var, state["bn.running_var"])
    found, wanted = net.state_dict(), expected(saved("raw"), target)
    assert_same(
        {key: found[key] for key in wanted if "block" in key}, {k: v for k, v in wanted.items() if "block" in k}
    )
