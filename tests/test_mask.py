"""Masked scores: every form everywhere equal, the room below them, and their gradient."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import DIALECTS, Calls, assert_equal, export, samples, trained
from torch import Tensor
from torch.overrides import handle_torch_function

import linger
from linger.ops.mask import masked

HIDE = torch.rand(5, 6, generator=torch.Generator().manual_seed(3)) < 0.4
ADD = torch.randn(5, 6, generator=torch.Generator().manual_seed(4)) * 3
INF = torch.where(HIDE, -math.inf, ADD)


def call(*masks: str, **options: Any) -> Any:
    """The op on a gridded input, as attention calls it; masks are buffers of the net."""
    return lambda net, x: handle_torch_function(masked, (x,), x, *(getattr(net, m) for m in masks), **options)


FORMS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "bool": (("hide",), {}),
    "kept": (("hide",), {"kept": True}),
    "added": (("add",), {}),
    "-inf": (("inf",), {}),
    "causal": ((), {"causal": True}),
    "all": (("hide", "add", "inf"), {"causal": True}),
}


def net_of(form: str, bits: int = 8, **options: Any) -> Calls:
    masks, more = FORMS[form]
    return Calls(call(*masks, **more, **options), bits=bits, hide=HIDE, add=ADD, inf=INF)


def hidden(form: str) -> Tensor:
    later = torch.triu(torch.ones(5, 6, dtype=torch.bool), 1)
    nothing = torch.zeros(5, 6, dtype=torch.bool)
    return {"bool": HIDE, "kept": ~HIDE, "added": nothing, "-inf": HIDE, "causal": later, "all": HIDE | later}[form]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_equal_everywhere(form: str, moved: bool, dialect: str, tmp_path: Path) -> None:
    for bits in (8, 16, 32):
        for size in (0.02, 1.0, 200.0):
            x = samples(((3, 5, 6),))[0] * size
            net = trained(net_of(form, bits, moved=moved), (x,), data_bits=bits, out_bits=bits)
            export(net, (x,), tmp_path / "net.onnx", dialect=dialect)
            assert_equal(net, (samples(((7, 5, 6),), seed=1)[0] * size * 1.5,), tmp_path / "net.onnx")


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("form", FORMS)
def test_room_below_the_scores(form: str, bits: int, moved: bool) -> None:
    """Hidden entries are at the lowest level, and the others so far above that the softmax of it is below half a level."""
    for size in (0.02, 1.0, 20.0):
        x = samples(((3, 5, 6),))[0] * size
        net = trained(net_of(form, bits, moved=moved), (x,), traced=False, data_bits=bits, out_bits=bits)
        y = net(x * 4)
        levels = y * y.grid.scale
        assert (levels[:, hidden(form)] == -(2 ** (bits - 1))).all()
        if form in ("bool", "kept", "causal"):
            room = (levels[:, ~hidden(form)].min() + 2 ** (bits - 1)) / y.grid.scale
            assert math.exp(-room) * 2 ** (bits - 1) < 0.5 / math.sqrt(2)


def test_scores_are_kept() -> None:
    """What was observed is not clamped, and only moved by a constant where softmax alone reads it."""
    x = samples(((3, 5, 6),))[0]
    for moved in (False, True):
        net = trained(net_of("bool", moved=moved), (x,), traced=False)
        y = net(x)
        difference = (y - x)[:, ~HIDE]
        assert difference.max() - difference.min() <= 1 / y.grid.scale + 1 / 32
        assert (difference.mean() > 1) == moved


def test_moving_gives_a_bit_back() -> None:
    x = samples(((3, 5, 6),))[0].clamp(-4, 4)
    scales = [trained(net_of("bool", moved=m), (x,), traced=False)(x).grid.scale.item() for m in (False, True)]
    assert scales[1] == 2 * scales[0]


@pytest.mark.parametrize("form", ["bool", "inf", "added"])
def test_gradient(form: str) -> None:
    """1 where an entry is neither hidden nor clamped, 0 elsewhere; the same for an additive mask."""
    bias = torch.where(HIDE, -math.inf, ADD) if form == "inf" else ADD
    bias = bias.clone().requires_grad_(form == "added")
    mask = HIDE if form == "bool" else bias
    net = linger.init(Calls(lambda n, x: handle_torch_function(masked, (x,), x, mask)))
    x = (torch.randint(-60, 61, (2, 5, 6), generator=torch.Generator().manual_seed(0)) / 16).requires_grad_()
    up = torch.arange(60.0).reshape(2, 5, 6) + 1
    net(x)
    net._linger_round_tensor_iqmask_0.running("o").fill_(0.5)
    y = net.eval()(x)
    y.backward(up)
    scale = y.grid.scale.item()
    levels = (x.detach() * scale + 0.5).floor()
    levels = levels if form == "bool" else levels + (bias.detach() * scale + 0.5).floor()
    lowest = -128 + math.ceil((8 * math.log(2) + 1) * scale) if form == "bool" else -128
    inside = (levels >= lowest) & (levels <= 127) & (torch.zeros_like(HIDE) if form == "added" else HIDE).logical_not()
    assert torch.equal(x.grad, up * inside)
    clamped = ~inside if form == "added" else ~inside & ~HIDE
    assert 0 < clamped.sum() < inside.sum()
    if form == "added":
        assert torch.equal(bias.grad, (up * inside).sum(0))


def test_a_mask_of_nan_is_not_hidden_silently() -> None:
    net = linger.init(Calls(lambda n, x: handle_torch_function(masked, (x,), x, torch.full((5, 6), math.nan))))
    with pytest.raises(linger.LingerError, match="the range of running_o is nan, allowed are finite values"):
        net(samples(((3, 5, 6),))[0])
