"""Sites made from the keys of a checkpoint, and checked by the first forward."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from checkpoint_nets import (
    ADD,
    MIXED_BUFFERS,
    PAIRS,
    Mixed,
    Net,
    Routed,
    assert_same,
    batch,
    convert,
    expected,
    named,
    not_grids,
    output,
    randomized,
    saved_of,
    see,
    untraced,
)
from torch import Tensor, nn

import linger


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


def test_a_checkpoint_of_a_part_keeps_the_sites_of_the_whole() -> None:
    """strict=False with the keys of one layer, before the first forward, takes nothing away."""
    origin = untraced()
    see(origin, batch())
    net = linger.init(Routed())
    net.load_state_dict(origin.state_dict())
    net.load_state_dict({"conv.weight": saved_of(origin)["conv.weight"]}, strict=False)
    assert_same(net.state_dict(), origin.state_dict())
    assert torch.equal(output(net), output(origin))


def test_the_right_checkpoint_takes_the_place_of_a_wrong_one() -> None:
    """Sites that only the first one holds are gone with it, though it was loaded without an error."""
    origin = untraced()
    see(origin, batch())
    net = linger.init(Routed())
    net.load_state_dict(saved_of(origin) | {f"{ADD[:-1]}9.running_o": torch.tensor(2.0)})
    net.load_state_dict(origin.state_dict())
    assert_same(net.state_dict(), origin.state_dict())
    assert torch.equal(output(net), output(origin))


def test_fixed_point_without_trace_into_a_traced_net() -> None:
    """The pair is folded; its input range is the convolution's and its output range the batch normalization's."""
    origin = untraced(Net)
    see(origin, batch())
    state, net = saved_of(origin), convert(Net(), "fixed")
    net.load_state_dict(state, strict=True)
    found = net.state_dict()
    assert_same(not_grids(found), expected(not_grids(state), "fixed"))
    for conv, (bn, _) in PAIRS.items():
        assert found[f"{conv}.running_x"] == state[f"{conv}.running_x"]
        assert found[f"{conv}.running_o"] == state[f"{bn}.running_o"] != state[f"{conv}.running_o"]
    assert (output(net) - output(origin)).abs().max() < 0.2 * output(origin).abs().max()


class Entry(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(linger.quant_tensor(self, x, "entry"))


@pytest.mark.parametrize("converted", [linger.normalize_layers, linger.init])
def test_quant_tensor_in_a_float_net(converted: Callable[[nn.Module], nn.Module]) -> None:
    """Its range is in a float checkpoint too, and a net that never ran takes it."""
    origin, net = randomized(Entry()), converted(Entry())
    see(origin, batch())
    net.load_state_dict(origin.state_dict(), strict=True)
    key = "_linger_round_tensor_iq_tensor_quant_entry.running_x"
    assert net.state_dict()[key] == origin.state_dict()[key] > 0
    see(net, batch())


def test_a_refused_checkpoint_does_not_excuse_the_one_before() -> None:
    """What the last good load brought is still checked by the first forward."""
    origin = untraced()
    see(origin, batch())
    ghost = f"{ADD[:-1]}9"
    net = linger.init(Routed())
    net.load_state_dict(saved_of(origin) | {f"{ghost}.running_o": torch.tensor(2.0)})
    with pytest.raises(linger.LingerError, match="size mismatch"):
        net.load_state_dict(saved_of(origin) | {"conv.weight": torch.ones(9)})
    with pytest.raises(linger.LingerError, match=rf"holds {ghost}, which this forward does not use"):
        see(net, batch())


class Residual(nn.Module):
    """A module without a tensor of its own that has a site."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Scattered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.residual = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(self.conv(x), x)


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
def test_sites_from_keys_are_where_the_net_is() -> None:
    origin = untraced(Scattered)
    see(origin, batch())
    net = linger.init(Scattered().to("meta"))
    net.load_state_dict(origin.state_dict(), strict=True)
    site = dict(net.residual.named_buffers())
    assert {name.rpartition(".")[2]: value.device.type for name, value in site.items()} == {
        "running_o": "meta",
        "running_y": "meta",
    }


class Bare(nn.Module):
    """A net without a layer or a tensor of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y = linger.quant_tensor(self, x, "entry")
        return y * y + 1.0


def test_sites_of_a_net_without_layers() -> None:
    origin, net = linger.init(Bare()), linger.init(Bare())
    see(origin, batch())
    net.load_state_dict(origin.state_dict(), strict=True)
    assert_same(net.state_dict(), origin.state_dict())
    assert torch.equal(output(net), output(origin))
