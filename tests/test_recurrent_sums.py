"""The sums of a recurrent layer: each of the ways gives the integers of ``_cells``, and each is taken where it may be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from recurrent import CHIPS, LAYERS, D, H, Net, first_states
from torch import Tensor

import linger
from linger import eager
from linger.ops import _recurrent_step as step
from linger.ops._cells import arithmetic, gate, wide
from linger.ops._recurrent_rows import Rows
from linger.ops._recurrent_step import Reach, Setting, Sums

N, GATES, READY = 50, 12, 9
SINGLE = "cut_of_single"
# q_h for 8 bits, q_hw, max|w| and max|input's part| as real values; what is taken on venus with 8 bits, with 16, on arcs
CASES: dict[str, tuple[int, int, float, float, tuple[str, str, str]]] = {
    "small": (7, 9, 0.2, 3, ("cut", "cut", SINGLE)),
    "the finest fraction": (8, 11, 0.06, 5, ("cut", "cut", SINGLE)),
    "one bit more": (8, 12, 0.03, 5, ("floored", "cut", SINGLE)),
    "an input beyond": (7, 7, 0.4, 40, ("cut", "cut", "saturated")),
    "a state beyond": (7, 6, 1.9, 3, ("saturated", "saturated", "saturated")),
    "a fraction alone": (14, 14, 0.007, 3, ("floored", "cut", SINGLE)),
}
FORMS = {"venus": ("venus", 8), "venus 16": ("venus", 16), "arcs": ("arcs", 8)}


def setting(chip: str, bits: int, q_h: int, q_hw: int) -> Setting:
    scales = {"scale": torch.tensor(2.0**q_h), "weight_scale": torch.tensor(2.0**q_hw)}
    return Setting(how=arithmetic(chip, bits), bits=bits, wide=bits > 8, **scales)


def parameters(q_h: int, q_hw: int, most: float, count: int) -> tuple[Tensor, Tensor]:
    """W_hh (gates, H) and b_hh (gates,) on their grids."""
    w = (torch.rand(GATES, count) * 2 - 1) * most
    b = torch.rand(GATES) * min(0.5, 2.0 ** (20 - q_h - q_hw))
    return torch.round(w * 2.0**q_hw) / 2.0**q_hw, torch.round(b * 2.0 ** (q_h + q_hw)) / 2.0 ** (q_h + q_hw)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seen", [True, False], ids=["seen", "unseen"])
def test_each_way_gives_the_integers(name: str, form: str, seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    monkeypatch.setattr(eager, "LOOKS", seen)
    (q_h, q_hw, most, reached, ways), (chip, bits) = CASES[name], FORMS[form]
    q_h += bits - 8  # a state reaches as far
    s, (w, b) = setting(chip, bits, q_h, q_hw), parameters(q_h, q_hw, most, 16)
    how, dtype = s.how, s.tables.dtype
    acc = (torch.rand(N, GATES) * 2 - 1) * reached
    h = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (N, 16)).to(dtype)
    sums = Sums(acc, w, b, s, Reach.of(acc, w, b, s), READY, 6)
    assert sums.way.__name__ == (ways[list(FORMS).index(form)] if seen else "saturated")
    out = torch.empty(N, GATES, dtype=dtype)
    apart = sums.fill(acc, out)
    sums.add(out, h)

    a = wide(np.floor(acc.double().numpy() * 2.0**how.argument + 0.5).astype(np.int64), how.width)
    products = torch.round(h.double() @ (w.double().t() * 2.0**q_hw) + b.double() * 2.0 ** (q_h + q_hw)).long().numpy()
    of_state = gate(products, q_h + q_hw, how)
    assert np.array_equal(apart.numpy(), a[:, READY:])
    assert np.array_equal(torch.floor(out[:, READY:]).numpy(), of_state[:, READY:])
    both = wide(a + of_state, how.width)[:, :READY]
    rows = (torch.floor((out[:, :READY] - sums.look.first) / sums.look.unit)).numpy()
    assert np.array_equal(np.clip(rows, -s.limit, s.limit - 1), both)
    assert (out[:, :READY] >= 0).all()
    assert (out[:, :READY] < sums.look.rows).all()


def everything(net: Any, x: Tensor, states: list[Tensor]) -> list[Tensor]:
    """Results and gradients of a forward and a backward in eval."""
    net.zero_grad()
    given = [t.clone().requires_grad_() for t in (x, *states)]
    found: list[Tensor] = torch.utils._pytree.tree_leaves(net(*given))
    torch.stack([(t * t).sum() for t in found]).sum().backward()
    return [t.detach() for t in found] + [t.grad for t in (*given, *net.parameters()) if t.grad is not None]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("chip", CHIPS[:2])
@pytest.mark.parametrize("gain", [1.0, 6.0])
def test_a_device_computes_the_same(kind: str, chip: str, gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no value is looked at: every result and every gradient, to the bit. Chunks of another length give the same results."""
    torch.manual_seed(2)
    layer = LAYERS[kind](D, H, bidirectional=True)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(gain)
    x, states = torch.randn(23, 3, D), first_states(layer, 3)
    net: Any = linger.init(Net(layer), target=chip)
    net(x, *states)
    wanted = everything(net.eval(), x, states)
    with monkeypatch.context() as patch:
        patch.setattr(step, "BLOCK", 2**9)
        in_chunks = everything(net, x, states)
    monkeypatch.setattr(eager, "LOOKS", False)
    unseen = everything(net, x, states)
    assert len(unseen) == len(in_chunks) == len(wanted) > 8
    assert all(torch.equal(a, b) for a, b in zip(unseen, wanted, strict=True))
    assert torch.equal(in_chunks[0], wanted[0])
    for a, b in zip(
        in_chunks, wanted, strict=True
    ):  # PyTorch's tanh of the same number depends on its place in a tensor
        assert torch.allclose(a, b, rtol=0, atol=float(b.abs().max()) * 2.0**-20)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", [[3] * 7, [5, 5, 3, 2, 2, 1]], ids=["even", "packed"])
@pytest.mark.parametrize("most", [1, 6, 100])
def test_chunks_hold_every_step_once(sizes: list[int], reverse: bool, most: int) -> None:
    rows = Rows(sizes, reverse)
    at = torch.arange(sum(sizes))[:, None]
    chunks = rows.chunks(most)
    steps = [step for chunk in chunks for step in chunk.split(at)]
    assert [s.flatten().tolist() for s in steps] == [s.flatten().tolist() for s in rows.split(at)]
    assert all(c.total <= most or len(c.sizes) == 1 for c in chunks)
    assert len(chunks) == {1: len(sizes), 100: 1}.get(most, len(chunks))
