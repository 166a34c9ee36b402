"""Checkpoints with the keys of upstream 1.1.1."""

from __future__ import annotations

import re

import pytest
import torch
from checkpoint_nets import (
    ADD,
    LATER,
    MIXED_BUFFERS,
    PAIRS,
    Mixed,
    Net,
    State,
    Wrapper,
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
    saved_of,
    see,
    source,
)
from torch import nn

import linger


def upstream_fixed() -> State:
    """A state dict of Mixed in fixed point as upstream 1.1.1 writes it (upstream.md 3.1); every number differs."""
    state: State = {"bn._linger_ignore_parameter": torch.zeros(1)}
    values = saved_of(randomized(Mixed()))
    state |= {key: value for key, value in values.items() if not key.startswith("bn.")}
    for n, (name, buffers) in enumerate(MIXED_BUFFERS.items()):
        state |= {f"{name}.{key}": torch.full((1,), 1.5 + 0.25 * n + 0.0625 * k) for k, key in enumerate(buffers)}
    thresholds = {"min_thresh": 0, "max_thresh": 96}
    return state | {f"relu6.{key}": torch.tensor(value, dtype=torch.int8) for key, value in thresholds.items()}


OBSERVED = ("running_x", "running_o")


def test_upstream_fixed_point_checkpoint() -> None:
    """strict=True; the ranges are those of the file, the scales follow from them, and eval needs no batch."""
    state = upstream_fixed()
    net = convert(Mixed(), "fixed")
    result = net.load_state_dict(state, strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    own = net.state_dict()
    names = [
        f"{name}.{key}"
        for name, buffers in MIXED_BUFFERS.items()
        for key in OBSERVED
        if key in buffers and (name, key) != ("pool", "running_o")
    ]
    for name in names:
        assert own[name].shape == ()
        assert own[name] == state[name].item(), name
        assert own[name.replace("running_", "scale_")] == 2.0 ** torch.log2(127 / state[name]).round().item(), name
    for key, value in state.items():
        if not re.search(r"running_[xwo]$|scale_|thresh$|ignore|\.y$", key):
            assert torch.equal(own[key], value), key
    assert output(net).shape == (2, 5)


def test_upstream_sites_arrive_before_the_first_forward() -> None:
    """A net that was not traced makes upstream's sites from upstream's keys."""
    fused = {"bn._linger_ignore_parameter"}
    net = linger.init(Mixed())
    bare = saved_of(net)
    state = {key: value for key, value in upstream_fixed().items() if key not in fused}
    state |= {key: value for key, value in bare.items() if key.startswith("bn.")}
    state["bn.running_x"] = state["bn.running_o"] = torch.full((1,), 3.0)
    net.load_state_dict(state, strict=True)
    for name in MIXED_BUFFERS:
        for key in OBSERVED:
            if f"{name}.{key}" in net.state_dict():
                assert net.state_dict()[f"{name}.{key}"] == state[f"{name}.{key}"].item()
    assert {name for name, _ in net.named_children() if "_linger_" in name} == {
        name for name in MIXED_BUFFERS if "_linger_" in name
    }
    assert output(net).shape == (2, 5)


@pytest.mark.parametrize("target", LATER)
def test_upstream_traced_checkpoint(target: str) -> None:
    """The traced stage of 1.1.1 differs by the dummy parameter of every batch normalization."""
    state = saved("traced")
    state |= {f"{bn}._linger_ignore_parameter": torch.zeros(1) for bn, _ in PAIRS.values()}
    net = convert(Net(), target)
    net.load_state_dict(state, strict=True)
    assert_same(not_grids(net.state_dict()), expected(saved("raw"), target))


def test_upstream_keys_below_a_prefix() -> None:
    """The dummy parameter and the ranges of shape [1] are accepted inside a larger module too."""
    net = Wrapper(convert(Mixed(), "fixed"))
    state = {f"net.{key}": value for key, value in upstream_fixed().items()}
    net.load_state_dict(state | {f"head.{key}": value for key, value in net.head.state_dict().items()}, strict=True)
    assert net.state_dict()[f"net.{ADD}.running_o"] == state[f"net.{ADD}.running_o"].item()


def exported(net: nn.Module) -> State:
    """What upstream 1.1.1 saves after an export: integers where the weights were, and the scales they were made with."""
    state = saved_of(net)
    for name in ("conv", "block.conv", "fc"):
        s_w, s_x = state[f"{name}.scale_w"], state[f"{name}.scale_x"]
        for key, scale, dtype in (("weight", s_w, torch.int8), ("bias", s_w * s_x, torch.int32)):
            state[f"{name}.{key}"] = torch.floor(state[f"{name}.{key}"].double() * scale + 0.5).to(dtype)
    return state


@pytest.mark.parametrize("seed", range(4))
def test_integers_left_by_an_export(seed: int) -> None:
    """They are the weights on their grids: eval gives what it gave before the export, and training goes on."""
    origin = source("fixed", seed)
    state = exported(origin)
    kept = clones(state)
    net = convert(Net(), "fixed")
    net.load_state_dict(state, strict=True)
    assert torch.equal(output(net), output(origin))
    assert_same(exported(net), kept)
    assert_same(state, kept)
    net.train()(batch()).square().mean().backward()
    assert net.fc.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("scale", "key"),
    [("fc.scale_w", "fc.weight"), ("fc.scale_w", "fc.bias"), ("block.conv.scale_x", "block.conv.bias")],
)
@pytest.mark.parametrize("how", ["absent", "zero", "not one"])
@pytest.mark.parametrize("strict", [True, False])
def test_integers_without_their_scale_are_refused(scale: str, key: str, how: str, strict: bool) -> None:
    """They would be weights of 100 and more: the error names them and the way out."""
    state = exported(source("fixed"))
    del state[scale]
    state |= {"absent": {}, "zero": {scale: torch.zeros(1)}, "not one": {scale: torch.ones(2)}}[how]
    net = source("fixed", 3)
    before = saved_of(net)
    with pytest.raises(linger.LingerError, match=rf'"{key}" holds integers .*load the checkpoint saved before'):
        net.load_state_dict(state, strict=strict)
    assert_same(net.state_dict(), before)


def test_integers_of_a_batch_normalization_are_refused() -> None:
    """Upstream folds the statistics into them, so the four float tensors are lost."""
    net = linger.init(Net())
    see(net, batch())
    state = saved_of(net) | {"bn.weight": torch.full((4,), 64, dtype=torch.int8)}
    with pytest.raises(linger.LingerError, match=r'"bn\.weight" holds integers') as caught:
        net.load_state_dict(state)
    assert named(caught.value) == {"bn.weight"}


def test_integers_refused_by_a_layer_leave_it_alone() -> None:
    """A layer that loads by itself is not left with them either."""
    net = source("fixed", 3)
    before = saved_of(net)
    with pytest.raises(RuntimeError, match='"weight" holds integers'):
        net.fc.load_state_dict({"weight": torch.full((5, 144), 100, dtype=torch.int8)}, strict=False)
    assert_same(net.state_dict(), before)


def test_the_dummy_parameter_alone() -> None:
    """The place of the batch normalization takes upstream's key, and no other."""
    net = convert(Net(), "fixed")
    net.bn.load_state_dict({"_linger_ignore_parameter": torch.zeros(1)}, strict=True)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight"'):
        net.bn.load_state_dict({"weight": torch.zeros(4)})
