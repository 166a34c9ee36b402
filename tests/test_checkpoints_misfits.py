"""Checkpoints that do not fit: exactly what is wrong is named, as in the float net."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from checkpoint_nets import (
    ADD,
    LATER,
    PAIRS,
    Net,
    State,
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
    source,
    untraced,
)

import linger

RAW_KEYS = (
    "conv.weight", "conv.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var",
    "block.conv.weight", "block.bn.weight", "block.bn.running_var", "fc.weight", "fc.bias",
)  # fmt: skip


def at_stage(key: str, stage: str) -> str:
    """A key of the float net as a checkpoint of ``stage`` writes it."""
    if stage != "raw":
        for conv, (bn, _) in PAIRS.items():
            if key.startswith(f"{conv}."):
                return f"{conv}.conv.{key[len(conv) + 1 :]}"
            if key.startswith(f"{bn}."):
                return f"{conv}.bn.{key[len(bn) + 1 :]}"
    return key


FLOAT_ROUTES = [("raw", t) for t in LATER] + [("traced", t) for t in LATER]


def kept(key: str, target: str) -> set[str]:
    """What cannot be loaded when ``key`` is missing: in fixed point the layer folded from it, elsewhere itself alone."""
    layer = key.rpartition(".")[0].replace("bn", "conv")
    return {f"{layer}.weight", f"{layer}.bias"} if target == "fixed" and layer in PAIRS else {at_stage(key, target)}


@pytest.mark.parametrize("key", RAW_KEYS)
@pytest.mark.parametrize(("stage", "target"), FLOAT_ROUTES)
def test_missing_key(stage: str, target: str, key: str) -> None:
    """One missing tensor is an error that names it, as in the float net, and nothing else."""
    state = saved(stage)
    del state[at_stage(key, stage)]
    with pytest.raises(
        linger.LingerError, match=r"^load_state_dict: Net: Missing key.*; allowed are checkpoints"
    ) as caught:
        convert(Net(), target).load_state_dict(state)
    assert named(caught.value) == {key}


@pytest.mark.parametrize("key", RAW_KEYS)
@pytest.mark.parametrize(("stage", "target"), FLOAT_ROUTES)
def test_missing_key_when_not_strict(stage: str, target: str, key: str) -> None:
    """strict=False returns the missing key, loads every other layer (in float every other tensor), and leaves this one."""
    state = saved(stage)
    del state[at_stage(key, stage)]
    net = convert(randomized(Net(), 5), target)
    before = saved_of(net)
    result = net.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([key], [])
    wanted = expected(saved("raw"), target)
    assert_same(not_grids(net.state_dict()), wanted | {name: before[name] for name in kept(key, target)})


@pytest.mark.parametrize(("stage", "target"), FLOAT_ROUTES)
def test_several_missing_keys(stage: str, target: str) -> None:
    """Each is named, of one pair and of several; a pair that is complete is not."""
    keys = {"bn.weight", "conv.bias", "bn.running_mean", "fc.bias"}
    state = {key: value for key, value in saved(stage).items() if key not in {at_stage(k, stage) for k in keys}}
    with pytest.raises(linger.LingerError) as caught:
        convert(Net(), target).load_state_dict(state)
    assert named(caught.value) == keys


@pytest.mark.parametrize(("stage", "target"), FLOAT_ROUTES)
def test_what_the_float_layers_lack_is_unexpected(stage: str, target: str) -> None:
    """A bias for a convolution without one is not folded in."""
    state = saved(stage) | {at_stage("block.conv.bias", stage): torch.ones(4)}
    with pytest.raises(linger.LingerError) as caught:
        convert(Net(), target).load_state_dict(state)
    assert named(caught.value) == {"block.conv.bias"}


@pytest.mark.parametrize("value", [[1.0] * 4, np.ones(4, np.float32), None], ids=["list", "array", "None"])
@pytest.mark.parametrize("target", LATER)
def test_what_is_no_tensor_is_an_error(target: str, value: object) -> None:
    with pytest.raises(linger.LingerError, match=r"bn\.bias") as caught:
        convert(Net(), target).load_state_dict(saved("raw") | {"bn.bias": value})
    assert named(caught.value) == {"bn.bias"}


@pytest.mark.parametrize("target", ["traced", "normalized"])
def test_keys_returned_are_those_of_the_float_net(target: str) -> None:
    """What strict=False returns is spelled like what strict=True says."""
    state = saved("traced") | {"conv.conv.ghost": torch.zeros(3)}
    del state["block.conv.bn.bias"]
    result = convert(Net(), target).load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["block.bn.bias"], ["conv.ghost"])


@pytest.mark.parametrize("key", ["conv.weight", "conv.bias", "block.conv.weight", "block.conv.bias", "fc.weight"])
def test_missing_key_of_a_fixed_point_checkpoint(key: str) -> None:
    """Folded weights are as necessary as any other."""
    state = saved("fixed")
    del state[key]
    with pytest.raises(linger.LingerError) as caught:
        convert(Net(), "fixed").load_state_dict(state)
    assert named(caught.value) == {key}


@pytest.mark.parametrize("key", ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"])
def test_missing_key_of_a_lone_batch_normalization(key: str) -> None:
    """Statistics are not grids: without them the checkpoint does not fit."""
    origin = untraced(Net)
    see(origin, batch())
    state = saved_of(origin)
    del state[key]
    with pytest.raises(linger.LingerError) as caught:
        linger.init(Net()).load_state_dict(state)
    assert named(caught.value) == {key}


@pytest.mark.parametrize("traced", [True, False])
def test_grid_buffers_may_be_missing(traced: bool) -> None:
    """A checkpoint without any range or scale loads strictly, and eval then asks for a batch."""
    origin = source("fixed") if traced else untraced(Net)
    see(origin, batch())
    state = not_grids(origin.state_dict())
    net = convert(Net(), "fixed") if traced else linger.init(Net())
    net.load_state_dict(state, strict=True)
    assert_same(not_grids(net.state_dict()), state)
    with pytest.raises(linger.LingerError, match="running_x is 0"):
        output(net)


@pytest.mark.parametrize(
    "key", ["ghost.weight", "conv.ghost", "bn.ghost", "block.ghost", "block.conv.ghost", "block.bn.ghost", "fc.ghost"]
)
@pytest.mark.parametrize(("stage", "target"), [*FLOAT_ROUTES, ("fixed", "fixed")])
def test_unexpected_key(stage: str, target: str, key: str) -> None:
    """One tensor too many is named; strict=False returns it and loads the rest."""
    state = saved(stage) | {key: torch.zeros(3)}
    net = convert(Net(), target)
    with pytest.raises(linger.LingerError) as caught:
        net.load_state_dict(state)
    assert named(caught.value) == {key}
    net = convert(Net(), target)
    result = net.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], [key])
    assert_same(not_grids(net.state_dict()), expected(saved("raw"), target))


WRONG: dict[str, tuple[int, ...]] = {
    "conv.weight": (5, 3, 3, 3),
    "block.conv.weight": (4, 4, 3, 3),
    "conv.bias": (1,),
    "bn.weight": (1,),
    "bn.bias": (5,),
    "bn.running_mean": (1,),
    "bn.running_var": (5,),
    "block.bn.running_var": (1,),
    "fc.weight": (5, 143),
    "fc.bias": (),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("key", WRONG)
@pytest.mark.parametrize(("stage", "target"), FLOAT_ROUTES)
def test_wrong_shape(stage: str, target: str, key: str, strict: bool) -> None:
    """A tensor of another shape is an error that names it as in the float net; it is never broadcast."""
    state = saved(stage) | {at_stage(key, stage): torch.ones(WRONG[key])}
    with pytest.raises(linger.LingerError) as caught:
        convert(Net(), target).load_state_dict(state, strict=strict)
    assert named(caught.value) == {key}


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("conv.weight", (5, 3, 3, 3)),
        ("block.conv.bias", (1,)),
        ("fc.running_x", (2,)),
        (f"block.{ADD}.running_o", (3,)),
    ],
)
def test_wrong_shape_of_a_fixed_point_checkpoint(key: str, shape: tuple[int, ...]) -> None:
    """Folded weights and ranges are held to their shapes too."""
    with pytest.raises(linger.LingerError) as caught:
        convert(Net(), "fixed").load_state_dict(saved("fixed") | {key: torch.ones(shape)})
    assert named(caught.value) == {key}


@pytest.mark.parametrize("key", ["bn.running_mean", "bn.running_var", "bn.weight"])
def test_wrong_shape_of_a_lone_batch_normalization(key: str) -> None:
    """Its statistics are named like any other tensor."""
    net = linger.init(Net())
    with pytest.raises(linger.LingerError) as caught:
        net.load_state_dict(saved_of(net) | {key: torch.ones(5)})
    assert named(caught.value) == {key}


FAULTS: dict[str, Callable[[State], State]] = {
    "missing": lambda s: {key: value for key, value in s.items() if key != "fc.bias"},
    "missing in a pair": lambda s: {key: value for key, value in s.items() if key != "block.bn.bias"},
    "unexpected": lambda s: s | {"ghost.weight": torch.ones(2)},
    "wrong shape": lambda s: s | {"fc.bias": torch.ones(7)},
    "wrong shape in a pair": lambda s: s | {"block.bn.weight": torch.ones(3)},
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("target", LATER)
@torch.no_grad()
def test_a_refused_checkpoint_changes_nothing(target: str, fault: str, assign: bool) -> None:
    """Values, objects and results are those of before, and the right checkpoint loads afterwards."""
    net = source(target, 3)
    before, y = saved_of(net), net(batch(2))
    objects = {name: id(value) for name, value in (*net.named_parameters(), *net.named_buffers())}
    with pytest.raises(linger.LingerError):
        net.load_state_dict(FAULTS[fault](saved("raw")), assign=assign)
    assert_same(net.state_dict(), before)
    assert {name: id(value) for name, value in (*net.named_parameters(), *net.named_buffers())} == objects
    assert torch.equal(net(batch(2)), y)
    net.load_state_dict(saved("raw"), assign=assign)
    assert_same(not_grids(net.state_dict()), expected(saved("raw"), target))


def test_an_error_of_the_users_changes_nothing_and_stays() -> None:
    """A hook that raises in the middle of a load: the same error, and the net as before."""
    net = source("fixed", 3)
    before = saved_of(net)

    def fail(*_: object) -> None:
        raise KeyError("of the user's")

    handle = net.fc.register_load_state_dict_pre_hook(fail)
    with pytest.raises(KeyError, match="of the user's"):
        net.load_state_dict(saved("raw"))
    assert_same(net.state_dict(), before)
    handle.remove()
    with pytest.raises(TypeError, match="dict-like"):
        net.load_state_dict(3)
    net.load_state_dict(saved("raw"))
    assert_same(not_grids(net.state_dict()), expected(saved("raw"), "fixed"))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_checkpoint_of_a_wrapped_net_is_refused_with_the_way_out(prefix: str) -> None:
    """What takes the prefix off is named, and works."""
    net = convert(Net(), "fixed")
    state = {f"{prefix}{key}": value for key, value in saved("raw").items()}
    with pytest.raises(linger.LingerError, match=rf'every key starts with "{prefix}", .*consume_prefix_in_state_dict'):
        net.load_state_dict(state)
    torch.nn.modules.utils.consume_prefix_in_state_dict_if_present(state, prefix)
    net.load_state_dict(state)
    with pytest.raises(linger.LingerError) as caught:
        net.load_state_dict({"fc.weight": torch.ones(5, 144)})
    assert "every key starts" not in str(caught.value)


@pytest.mark.parametrize("target", LATER)
def test_two_stages_in_one_checkpoint(target: str) -> None:
    """Nobody can say which of two values is meant."""
    with pytest.raises(linger.LingerError) as caught:
        convert(Net(), target).load_state_dict(saved("traced") | saved("raw", 3))
    assert {"bn.weight", "block.bn.running_var"} <= named(caught.value)
