"""Checkpoints: every earlier stage into every later one, upstream's keys, sites from keys, misfits, nothing changed by saving."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import linger

State = dict[str, Tensor]

STAGES = ("raw", "traced", "normalized", "fixed")
LATER = STAGES[1:]
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
WEIGHTED = ("running_x", "running_w", "running_o", "scale_x", "scale_w", "scale_o")
ADD = "_linger_round_tensor_iqadd__default_index_0"
BOUND = 32.0
SHAPE = (2, 3, 6, 6)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.bn = nn.BatchNorm2d(4, eps=1e-2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + x)


class Net(nn.Module):
    """conv + bn at the top and in a block, a functional sum, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.block = Block()
        self.fc = nn.Linear(144, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.relu(self.bn(self.conv(x))))
        return self.fc(torch.flatten(x, 1))


PAIRS = {"conv": ("bn", 1e-5), "block.conv": ("block.bn", 1e-2)}


class Wrapper(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


class Mixed(nn.Module):
    """Every layer and call of upstream 1.1.1 that has state: fused conv, lone bn, pool, relu6, linear, + * / cat sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.pool = nn.AvgPool2d(2)
        self.norm = nn.BatchNorm2d(4)
        self.relu6 = nn.ReLU6()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.pool(F.relu(self.bn(self.conv(x)))))
        z = self.relu6(y)
        a = y + z
        c = torch.cat([a, a * z], 1) / 2.0
        return self.fc(c.sum((2, 3)))


MIXED_BUFFERS: dict[str, tuple[str, ...]] = {
    "conv": WEIGHTED,
    "norm": WEIGHTED,
    "fc": WEIGHTED,
    "pool": ("running_x", "running_o", "scale_x", "scale_o"),
    "relu6": ("running_x", "scale_x"),
    ADD: ("running_o", "scale_o"),
    "_linger_round_tensor_iqmul__default_index_1": ("running_o", "scale_o", "y"),
    "_linger_round_tensor_iqcat_2": ("running_o", "scale_o"),
    "_linger_round_tensor_iqdiv__default_index_3": ("running_o", "scale_o"),
    "_linger_round_tensor_iqsum__default_index_4": ("running_o", "scale_o"),
}


class Routed(nn.Module):
    """Sites at the top, in a block used twice in one container, from quant_tensor, and with an operand that has no grid."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(linger.quant_tensor(self, x, "entry"))
        y = self.blocks(y)
        return torch.cat([y, y * torch.sin(x[:, :1])], 1).sum(1)


def randomized(net: nn.Module, seed: int = 0) -> nn.Module:
    """The net with weights and statistics that are not those of a new one."""
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=made) + 0.5)
            elif name.endswith("num_batches_tracked"):
                value.fill_(seed + 7)
            else:
                value.copy_(torch.randn(value.shape, generator=made) * 0.4)
    return net


def batch(seed: int = 1, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def convert(net: nn.Module, stage: str, start: str = "raw", sample: Tensor | None = None) -> nn.Module:
    """``net`` taken from stage ``start`` to ``stage`` through every stage between."""
    for step in STAGES[STAGES.index(start) + 1 : STAGES.index(stage) + 1]:
        if step == "traced":
            linger.trace_layers(net, net, batch() if sample is None else sample)
        elif step == "normalized":
            net = linger.normalize_layers(
                net, normalize_weight_value=BOUND, normalize_bias_value=BOUND, normalize_output_value=BOUND
            )
        else:
            net = linger.init(net)
    return net


def see(net: nn.Module, x: Tensor) -> None:
    """One batch in train mode, for the grids."""
    with torch.no_grad():
        net.train()(x)


def output(net: nn.Module, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return net.eval()(batch(2) if x is None else x)


def source(stage: str, seed: int = 0) -> nn.Module:
    """A net to save: known values, taken to ``stage``; in fixed point with grids."""
    net = convert(randomized(Net(), seed), stage)
    if stage == "fixed":
        see(net, batch(seed + 10))
    return net.eval()


def clones(state: Mapping[str, Tensor]) -> State:
    return {key: value.clone() for key, value in state.items()}


def saved_of(net: nn.Module) -> State:
    return clones(net.state_dict())


def saved(stage: str, seed: int = 0) -> State:
    return saved_of(source(stage, seed))


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    different = [key for key in wanted if not torch.equal(found[key], wanted[key])]
    assert not different


def expected(values: State, stage: str) -> State:
    """The parameters and statistics of ``values``, a raw state dict of Net, under the keys of ``stage``."""
    out = dict(values)
    if stage == "raw":
        return out
    for conv, (bn, eps) in PAIRS.items():
        weight, bias = out.pop(f"{conv}.weight"), out.pop(f"{conv}.bias", None)
        norm = {key: out.pop(f"{bn}.{key}") for key in NORM}
        if stage == "fixed":
            alpha = norm["weight"] * torch.rsqrt(norm["running_var"] + eps)
            out[f"{conv}.weight"] = weight * alpha[:, None, None, None]
            out[f"{conv}.bias"] = ((0 if bias is None else bias) - norm["running_mean"]) * alpha + norm["bias"]
        else:
            out |= {f"{conv}.bn.{key}": value for key, value in norm.items()} | {f"{conv}.conv.weight": weight}
            out |= {} if bias is None else {f"{conv}.conv.bias": bias}
    return out


def not_grids(state: Mapping[str, Tensor]) -> State:
    grid = re.compile(r"\.(scale_\w+|running_(?!mean$|var$)\w+)$")
    return {key: value for key, value in state.items() if not grid.search(key)}


def named(error: BaseException) -> set[str]:
    """Every key that the message of a failed load names."""
    text = str(error)
    return set(re.findall(r'"([^"]+)"', text)) | set(re.findall(r"size mismatch for ([\w.]+):", text))


# --- 1: the table

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


# --- 2: repeated loads


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


# --- 3: keys of upstream 1.1.1


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


# --- 4: sites from keys


def untraced(make: Callable[[], nn.Module] = Routed, **options: int) -> nn.Module:
    return linger.init(randomized(make()), **options)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("make", [Net, Mixed, Routed])
def test_a_net_that_never_ran_makes_its_sites(make: type[nn.Module], bits: int) -> None:
    """Keys alone suffice: the loaded net has the saved state at once and computes the same."""
    origin = untraced(make, data_bits=bits, out_bits=bits)
    see(origin, batch())
    net = linger.init(make(), data_bits=bits, out_bits=bits)
    net.load_state_dict(origin.state_dict(), strict=True)
    assert torch.equal(output(net), output(origin))
    assert_same(net.state_dict(), origin.state_dict())
    assert torch.equal(output(net, batch(4)), output(origin, batch(4)))
    see(net, batch(5))
    see(origin, batch(5))
    assert_same(net.state_dict(), origin.state_dict())


@pytest.mark.parametrize("bits", [8, 16])
def test_the_state_is_whole_before_the_first_forward(bits: int) -> None:
    """Saving what was just loaded gives the same checkpoint, scales of the sites included."""
    origin = untraced(data_bits=bits, out_bits=bits)
    see(origin, batch())
    net = linger.init(Routed(), data_bits=bits, out_bits=bits)
    net.load_state_dict(origin.state_dict())
    assert_same(net.state_dict(), origin.state_dict())


def test_traced_and_untraced_nets_agree_on_sites() -> None:
    """Same names whether trace, the first forward or a checkpoint made them."""
    traced = convert(Mixed(), "fixed")
    ran = linger.init(Mixed())
    see(ran, batch())
    loaded = linger.init(Mixed())
    loaded.load_state_dict(ran.state_dict())
    names = [[name for name, _ in net.named_modules() if "_linger_" in name] for net in (traced, ran, loaded)]
    assert [set(each) for each in names] == [{name for name in MIXED_BUFFERS if "_linger_" in name}] * 3


def test_quant_tensor_can_be_traced() -> None:
    """A net whose forward calls quant_tensor takes the whole way and loads what it saved."""
    origin = convert(randomized(Routed()), "fixed")
    see(origin, batch())
    net = convert(Routed(), "fixed")
    net.load_state_dict(origin.state_dict())
    assert torch.equal(output(net), output(origin))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("", "_linger_round_tensor_iqadd__default_index_7"),
        ("", "_linger_round_tensor_iqmul__default_index_1"),
        ("", "_linger_round_tensor_iq_tensor_quant_other"),
        ("blocks.1", "_linger_round_tensor_iqcat_1"),
    ],
)
@torch.no_grad()
def test_a_site_that_nothing_uses_is_an_error(owner: str, name: str, training: bool) -> None:
    """The first forward after the load names the site in full, and only it."""
    origin = untraced()
    see(origin, batch())
    net = linger.init(Routed())
    key = f"{owner}.{name}".lstrip(".")
    net.load_state_dict(saved_of(origin) | {f"{key}.running_o": torch.tensor(2.0)}, strict=True)
    with pytest.raises(linger.LingerError) as caught:
        net.train(training)(batch())
    assert re.findall(r"[\w.]*_linger_round_tensor_\w+", str(caught.value)) == [key]


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_a_site_of_another_call_is_an_error(training: bool) -> None:
    """A sum in the checkpoint where the forward multiplies: the first forward names the sum."""
    origin = untraced()
    see(origin, batch())
    wrong = "_linger_round_tensor_iqadd__default_index_0"
    state = {
        key.replace("_linger_round_tensor_iqmul__default_index_0", wrong): v for key, v in saved_of(origin).items()
    }
    net = linger.init(Routed())
    net.load_state_dict(state, strict=True)
    with pytest.raises(linger.LingerError, match=rf"(^|\s){wrong}\b"):
        net.train(training)(batch())


def test_a_refused_checkpoint_leaves_no_sites() -> None:
    """After a load that raised, the right checkpoint loads and the forward runs."""
    origin = untraced()
    see(origin, batch())
    net = linger.init(Routed())
    keys = set(net.state_dict())
    other = saved_of(origin) | {f"{ADD[:-1]}9.running_o": torch.tensor(2.0), "conv.weight": torch.ones(9)}
    with pytest.raises(linger.LingerError) as caught:
        net.load_state_dict(other)
    assert named(caught.value) == {"conv.weight"}
    assert set(net.state_dict()) == keys
    net.load_state_dict(origin.state_dict(), strict=True)
    assert torch.equal(output(net), output(origin))


@pytest.mark.parametrize(
    "key",
    [
        "ghost._linger_round_tensor_iqadd__default_index_0.running_o",
        "_linger_round_tensor_iqghost_0.running_o",
        "conv._linger_round_tensor_iqadd__default_index_0.running_o",
    ],
)
def test_a_site_that_cannot_be_is_unexpected(key: str) -> None:
    """No such owner, no such call, or an owner that is a layer: refused at the load."""
    net = linger.init(Routed())
    with pytest.raises(linger.LingerError) as caught:
        net.load_state_dict(saved_of(net) | {key: torch.tensor(2.0)})
    assert named(caught.value) == {key}


# --- 5: checkpoints that do not fit

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


def float_name(key: str) -> str:
    """The inverse of ``at_stage``."""
    return next((raw for raw in RAW_KEYS if key in (raw, at_stage(raw, "traced"))), key)


def blamed(key: str, target: str) -> set[str]:
    """The keys that may be named when ``key`` is missing: in fixed point those folded with it, elsewhere itself alone."""
    layer = key.rpartition(".")[0].replace("bn", "conv")
    if target != "fixed" or layer not in PAIRS:
        return {key}
    return {f"{layer}.weight", f"{layer}.bias", *(f"{PAIRS[layer][0]}.{name}" for name in NORM)}


@pytest.mark.parametrize("key", RAW_KEYS)
@pytest.mark.parametrize(("stage", "target"), FLOAT_ROUTES)
def test_missing_key(stage: str, target: str, key: str) -> None:
    """One missing tensor is an error that names it, as in the float net, and no other layer's."""
    state = saved(stage)
    del state[at_stage(key, stage)]
    with pytest.raises(linger.LingerError) as caught:
        convert(Net(), target).load_state_dict(state)
    assert {key} <= named(caught.value) <= blamed(key, target)


@pytest.mark.parametrize("key", RAW_KEYS)
@pytest.mark.parametrize(("stage", "target"), FLOAT_ROUTES)
def test_missing_key_when_not_strict(stage: str, target: str, key: str) -> None:
    """strict=False returns the missing key and loads every other layer, and in float every other tensor."""
    state = saved(stage)
    del state[at_stage(key, stage)]
    net = convert(Net(), target)
    result = net.load_state_dict(state, strict=False)
    assert {key} <= {float_name(name) for name in result.missing_keys} <= blamed(key, target)
    assert not result.unexpected_keys
    wanted, found = expected(saved("raw"), target), not_grids(net.state_dict())
    assert set(found) == set(wanted)
    others = [name for name in wanted if float_name(name) not in blamed(key, target)]
    assert not [name for name in others if not torch.equal(found[name], wanted[name])]


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


@pytest.mark.parametrize("key", ["ghost.weight", "conv.ghost", "block.ghost", "block.conv.ghost", "fc.ghost"])
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


# --- 6: nothing is changed by saving, and only values by loading


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


# --- 7: inside a larger module, and every kind of conv + bn


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


class Pair(nn.Module):
    def __init__(self, conv: nn.Module, bn: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = conv, bn

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Nested(nn.Module):
    """Modules whose float names look like fused ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.bn = Pair(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
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
    net = randomized(Pair(conv(4, 8, 3, **options, **conv_options), bn(8, **bn_options)), seed)
    if gamma is not None:
        with torch.no_grad():
            net.bn.weight[1:4] = gamma
    return net


def fold(net: nn.Module) -> tuple[Tensor, Tensor]:
    """(W', b') of a raw Pair, one output channel at a time."""
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


# --- 8: files


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
