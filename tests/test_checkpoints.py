"""Every earlier stage into every later one, any number of times, through files too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_nets import (
    ADD,
    BOUND,
    LATER,
    STAGES,
    Mixed,
    Net,
    Routed,
    assert_same,
    batch,
    clones,
    convert,
    expected,
    named,
    not_grids,
    output,
    randomized,
    saved,
    see,
    source,
    untraced,
)
from torch import Tensor, nn

import linger
from linger.checkpoint import Pair, plan_of, remap

ROUTES = [(a, b, c) for i, a in enumerate(STAGES) for j, b in enumerate(STAGES) for c in STAGES[j:] if i <= j]


@pytest.mark.parametrize(("stage", "loaded_at", "last"), ROUTES)
def test_earlier_stage_into_later(stage: str, loaded_at: str, last: str) -> None:
    """A checkpoint loaded at its own or any later stage gives the last stage exactly the values it holds."""
    origin = source(stage)
    net = convert(randomized(Net(), 5), loaded_at)
    result = net.load_state_dict(origin.state_dict(), strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    net = convert(net, last, loaded_at)
    assert_same(not_grids(net.state_dict()), expected(saved("raw"), last))
    if stage == "fixed":
        assert torch.equal(output(net), output(origin))
        assert_same(net.state_dict(), origin.state_dict())
    elif last == "fixed":
        see(net, batch(10))
        assert torch.equal(output(net), output(source("fixed")))
        wanted = output(origin)
        assert (output(net) - wanted).abs().max() < 0.2 * wanted.abs().max()
    else:
        assert torch.allclose(output(net), output(origin), atol=1e-4)


@pytest.mark.parametrize("target", ["traced", "normalized"])
def test_fixed_point_into_a_float_stage_is_refused(target: str) -> None:
    """The error names what a folded checkpoint lacks and what only it has, as in the float net."""
    with pytest.raises(linger.LingerError) as caught:
        convert(Net(), target).load_state_dict(saved("fixed"))
    names = named(caught.value)
    assert {"conv.running_x", f"block.{ADD}.running_o", "fc.scale_o"} <= names
    assert {"bn.weight", "bn.running_var", "block.bn.weight", "block.bn.running_mean"} <= names
    assert not any(".conv.conv." in f".{name}" or ".conv.bn." in f".{name}" for name in names)


@pytest.mark.parametrize("stage", LATER)
def test_later_stage_into_an_untouched_net_is_refused_by_torch(stage: str) -> None:
    """A net that linger never saw takes only its own checkpoints."""
    with pytest.raises(RuntimeError) as caught:
        Net().load_state_dict(saved(stage))
    assert ("conv.running_x" if stage == "fixed" else "conv.conv.weight") in named(caught.value)


@pytest.mark.parametrize("target", STAGES)
def test_normalized_without_trace_is_raw(target: str) -> None:
    """Layers normalized one by one keep the float net's keys, so their checkpoint loads wherever a raw one does."""
    origin = linger.normalize_layers(randomized(Net()), normalize_output_value=BOUND)
    net = convert(Net(), target)
    net.load_state_dict(origin.state_dict())
    assert_same(not_grids(net.state_dict()), expected(saved("raw"), target))


def test_init_called_twice_still_loads_a_raw_checkpoint() -> None:
    """The tutorial's two calls of init, the second with more types, leave the net loadable."""
    net = convert(Net(), "traced")
    net = linger.init(net, quant_modules=(nn.Conv2d, linger.NormalizeConvBN2d))
    net = linger.init(net)
    net.load_state_dict(saved("raw"))
    assert_same(not_grids(net.state_dict()), expected(saved("raw"), "fixed"))


@pytest.mark.parametrize("order", ["aaa", "aba", "ababa", "bba"])
@pytest.mark.parametrize(
    ("stage", "target"), [(a, b) for i, a in enumerate(STAGES) for b in STAGES[i:] if (a, b) != ("raw", "raw")]
)
def test_loading_again_is_loading_once(stage: str, target: str, order: str) -> None:
    """However often and whatever was loaded before, the last checkpoint counts, in state and in output."""
    states = {"a": saved(stage, 0), "b": saved(stage, 3)}
    once, often = convert(Net(), target), convert(Net(), target)
    once.load_state_dict(states["a"])
    for key in order:
        often.load_state_dict(states[key])
        if stage == "fixed":
            assert torch.equal(output(often), output(source("fixed", 0 if key == "a" else 3)))
    assert_same(often.state_dict(), once.state_dict())
    if target == "fixed":
        see(once, batch())
        see(often, batch())
    assert torch.equal(output(often), output(once))


@pytest.mark.parametrize("between", ["raw", "traced", "normalized"])
def test_stages_alternate(between: str) -> None:
    """A fixed-point net takes checkpoints of different stages in turn."""
    net = convert(Net(), "fixed")
    for _ in range(3):
        net.load_state_dict(saved("fixed", 0))
        assert_same(net.state_dict(), saved("fixed", 0))
        assert torch.equal(output(net), output(source("fixed", 0)))
        net.load_state_dict(saved(between, 3))
        assert_same(not_grids(net.state_dict()), not_grids(saved("fixed", 3)))


@torch.no_grad()
def test_loading_into_a_net_that_stays_in_eval() -> None:
    """What was proved and checked of the old values is forgotten, without a call of train() or eval() between."""
    net = source("fixed", 0)
    net(batch(2))
    net.load_state_dict(saved("fixed", 3))
    assert torch.equal(net(batch(2)), output(source("fixed", 3)))
    net.load_state_dict(convert(Net(), "fixed").state_dict())
    with pytest.raises(linger.LingerError, match="running_x is 0"):
        net(batch(2))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("make", [Net, Mixed])
def test_through_a_file(make: type[nn.Module], stage: str, tmp_path: Path) -> None:
    """torch.save and torch.load(weights_only=True) give a checkpoint that loads strictly, at this stage and in fixed point."""
    origin = convert(randomized(make()), stage)
    see(origin, batch())
    torch.save(origin.state_dict(), tmp_path / "net.pt")
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    assert_same(state, origin.state_dict())
    net = convert(make(), stage)
    net.load_state_dict(state, strict=True)
    assert torch.equal(output(net), output(origin))
    convert(make(), "fixed").load_state_dict(state, strict=True)


@pytest.mark.parametrize("make", [Net, Mixed, Routed])
def test_a_fixed_point_checkpoint_is_tensors(make: type[nn.Module]) -> None:
    """No object of linger's is in it: plain strings, plain tensors that ask for no gradient."""
    net = untraced(make)
    see(net, batch())
    state = net.state_dict()
    assert all(type(key) is str for key in state)
    assert all(type(value) is Tensor and not value.requires_grad for value in state.values())


# --- remap alone


def plan(integer: bool) -> list[Pair]:
    """What trace_layers finds in Net."""
    return [replace(p, integer=integer) for p in plan_of(convert(Net(), "traced"))]


REMAPS = [*((stage, "traced") for stage in STAGES[:3]), *((stage, "fixed") for stage in STAGES)]


@pytest.mark.parametrize(("stage", "target"), REMAPS)
def test_remap(stage: str, target: str) -> None:
    """A pure function: the same tensors, or new ones where a pair is folded; done twice it is done once."""
    state = expected(saved("raw"), stage)
    kept, objects = clones(state), dict(state)
    found = remap(state, plan(target == "fixed"))
    assert_same(found, expected(saved("raw"), target))
    assert_same(remap(found, plan(target == "fixed")), found)
    assert_same(state, kept)
    assert all(state[key] is objects[key] for key in state)
    assert found["fc.weight"] is state["fc.weight"]


def test_remap_leaves_what_it_cannot_fold() -> None:
    """A pair without its variance keeps the keys of the traced net; the other one is folded."""
    state = saved("raw")
    del state["bn.running_var"]
    found = remap(state, plan(integer=True))
    assert "conv.weight" not in found
    assert found["conv.conv.weight"] is state["conv.weight"]
    assert found["conv.bn.bias"] is state["bn.bias"]
    assert torch.equal(found["block.conv.weight"], expected(saved("raw"), "fixed")["block.conv.weight"])


def test_remap_of_another_net_changes_nothing() -> None:
    state = {"encoder.weight": torch.ones(2), "bn._linger_ignore_parameter": torch.zeros(1)}
    assert_same(remap(state, []), state)
    assert_same(remap(state, plan(integer=True)), {"encoder.weight": state["encoder.weight"]})
