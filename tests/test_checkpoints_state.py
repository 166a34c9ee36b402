"""Nothing is changed by saving, and only values by loading."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from checkpoint_nets import (
    LATER,
    STAGES,
    Net,
    State,
    assert_same,
    batch,
    clones,
    convert,
    expected,
    not_grids,
    output,
    randomized,
    saved,
    saved_of,
    see,
    source,
)
from torch import nn


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_saving_changes_nothing(stage: str, training: bool) -> None:
    """Two state dicts in a row are equal, and parameters beyond their bound stay as they are."""
    net = source(stage)
    net.train(training)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1000.0)
    before = {name: value.clone() for name, value in (*net.named_parameters(), *net.named_buffers())}
    versions = {name: p._version for name, p in net.named_parameters()}
    first = saved_of(net)
    assert_same(net.state_dict(), first)
    assert_same(dict((*net.named_parameters(), *net.named_buffers())), before)
    assert {name: p._version for name, p in net.named_parameters()} == versions
    assert all(m.training == training for m in net.modules())


@pytest.mark.parametrize(("stage", "target"), [(a, b) for i, a in enumerate(STAGES) for b in STAGES[i:]])
def test_loading_leaves_the_checkpoint_and_the_parameters(stage: str, target: str) -> None:
    """The dict passed in keeps its keys, order, objects and values; parameters and modules stay the same objects."""
    state = OrderedDict(saved(stage))
    kept, objects = clones(state), dict(state)
    net = convert(Net(), target)
    parameters, modules = dict(net.named_parameters()), dict(net.named_modules())
    net.load_state_dict(state)
    assert list(state) == list(kept)
    assert all(state[key] is objects[key] for key in state)
    assert {name: id(p) for name, p in net.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert {name: id(m) for name, m in net.named_modules()} == {name: id(m) for name, m in modules.items()}
    assert all(p.requires_grad and p.is_leaf for p in parameters.values())
    with torch.no_grad():
        for value in (*net.parameters(), *net.buffers()):
            value.fill_(3)
    assert_same(state, kept)


@pytest.mark.parametrize("target", LATER)
@pytest.mark.parametrize("made_at", ["raw", "target"])
def test_an_optimizer_made_before_the_load_still_trains(target: str, made_at: str) -> None:
    """Conversion and load keep the parameter objects, so a step moves the net."""
    net: nn.Module = Net()
    owned = list(net.parameters())
    if made_at == "target":
        net = convert(net, target)
        owned = list(net.parameters())
    optimizer = torch.optim.SGD(owned, lr=0.1)
    if made_at == "raw":
        net = convert(net, target)
    net.load_state_dict(saved("raw"))
    assert {id(p) for p in net.parameters()} <= {id(p) for p in owned}
    before = clones(dict(net.named_parameters()))
    net.train()(batch()).square().mean().backward()
    optimizer.step()
    assert not [name for name, p in net.named_parameters() if p.dim() > 1 and torch.equal(p, before[name])]


@pytest.mark.parametrize("target", LATER)
def test_a_deep_copy_loads_for_itself(target: str) -> None:
    """The hooks of a copy change the copy, and those of the original the original."""
    net = convert(randomized(Net(), 5), target)
    other = copy.deepcopy(net)
    before = saved_of(net)
    other.load_state_dict(saved("raw"))
    assert_same(net.state_dict(), before)
    assert_same(not_grids(other.state_dict()), expected(saved("raw"), target))
    net.load_state_dict(saved("raw", 3))
    assert_same(not_grids(other.state_dict()), expected(saved("raw"), target))
    assert_same(not_grids(net.state_dict()), expected(saved("raw", 3), target))


@pytest.mark.parametrize("target", LATER)
def test_a_pickled_net_loads_for_itself(target: str, tmp_path: Path) -> None:
    """The whole net through a file: what it loads goes into it and not into the original."""
    net = convert(randomized(Net(), 5), target)
    before = saved_of(net)
    torch.save(net, tmp_path / "net.pt")
    other = torch.load(tmp_path / "net.pt", weights_only=False)
    other.load_state_dict(saved("raw"))
    assert_same(net.state_dict(), before)
    assert_same(not_grids(other.state_dict()), expected(saved("raw"), target))


LEGAL = [(stage, target) for i, stage in enumerate(STAGES) for target in STAGES[max(i, 1) :]]


def cast(state: State, dtype: torch.dtype) -> State:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("stage", "target"), LEGAL)
def test_precision_of_a_checkpoint(stage: str, target: str, dtype: torch.dtype) -> None:
    """It is that of its values and not that of the folding: the same as the values in float32."""
    state = cast(saved(stage), dtype)
    found, wanted = convert(Net(), target), convert(Net(), target)
    found.load_state_dict(state, strict=True)
    wanted.load_state_dict(cast(state, torch.float32), strict=True)
    assert_same(found.state_dict(), wanted.state_dict())
    assert {value.dtype for value in found.state_dict().values()} <= {torch.float32, torch.int64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("stage", "target"), LEGAL)
def test_assign(stage: str, target: str, dtype: torch.dtype) -> None:
    """assign=True gives the same values; ranges stay float32, and a fixed-point net runs."""
    state = cast(saved(stage), dtype)
    found, wanted = convert(randomized(Net(), 5), target), convert(Net(), target)
    found.load_state_dict(state, strict=True, assign=True)
    wanted.load_state_dict(state, strict=True)
    assert_same(cast(not_grids(found.state_dict()), torch.float32), not_grids(wanted.state_dict()))
    assert all(p.requires_grad and p.is_leaf for p in found.parameters())
    if target == "fixed":
        for net in (found, wanted):
            see(net, batch())
        assert torch.equal(output(found), output(wanted))
