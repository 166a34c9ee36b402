"""The memory planner: never below what must be alive, never better than every plan there is, and sums of known nets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import linger
from linger.check._allocate import ORDERS, Block, lower_bound, plan
from linger.check._file import facts_of
from linger.check._memory import usage
from linger.check._net import exported
from linger.targets import known

BITS = {"data_bits": 8, "parameter_bits": 8, "out_bits": 8}


@st.composite
def graphs(draw: st.DrawFn) -> list[Block]:
    count = draw(st.integers(1, 6))
    made = []
    for i in range(count):
        begin = draw(st.integers(0, 5))
        made.append(Block(name=str(i), size=draw(st.integers(1, 9)), begin=begin, end=draw(st.integers(begin, 6))))
    return made


def partitions(blocks: list[Block]) -> Iterator[list[list[Block]]]:
    """Every way to put blocks into slots whose blocks never meet."""
    if not blocks:
        yield []
        return
    first, rest = blocks[0], blocks[1:]
    for slots in partitions(rest):
        yield [[first], *slots]
        for i, slot in enumerate(slots):
            if not any(first.meets(b) for b in slot):
                yield [*slots[:i], [first, *slot], *slots[i + 1 :]]


def optimum(blocks: list[Block]) -> int:
    """The smallest sum of slots of any plan."""
    return min(sum(max(b.size for b in slot) for slot in slots) for slots in partitions(blocks))


@settings(max_examples=120, deadline=None)
@given(graphs())
def test_between_the_bound_and_every_tensor_for_itself(blocks: list[Block]) -> None:
    best = optimum(blocks)
    for name, order in ORDERS.items():
        total, placed = order(blocks)
        assert lower_bound(blocks) <= best <= total <= sum(b.size for b in blocks), name
        for a in blocks:
            for b in blocks:
                assert a is b or placed[a.name] != placed[b.name] or not a.meets(b), name
    assert plan(blocks).total == min(order(blocks)[0] for order in ORDERS.values())


def test_a_plan_of_no_tensor() -> None:
    assert (plan([]).total, lower_bound([])) == (0, 0)


WINS = {  # order -> (size, begin, end) of every block, and what the orders make of them
    "size": (((5, 1, 1), (2, 3, 4), (4, 3, 3)), {"size": 7, "breadth": 11, "order": 9}),
    "breadth": (((1, 0, 2), (3, 3, 4), (3, 1, 1), (5, 2, 3)), {"size": 9, "breadth": 8, "order": 9}),
    "order": (((5, 4, 5), (4, 4, 5), (5, 3, 4), (5, 2, 2), (5, 1, 3)), {"size": 15, "breadth": 19, "order": 14}),
}


@pytest.mark.parametrize("name", WINS)
def test_each_order_wins_somewhere(name: str) -> None:
    rows, totals = WINS[name]
    blocks = [Block(name=str(i), size=s, begin=b, end=e) for i, (s, b, e) in enumerate(rows)]
    assert {n: order(blocks)[0] for n, order in ORDERS.items()} == totals
    assert plan(blocks).order == name


class Chain(nn.Module):
    """(1, 8, 16, 16): an input of 2 KB, tensors of 4, 4 and 1 KB, a result of 10 bytes"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16 * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        return self.fc(F.max_pool2d(x, 2).flatten(1))


@pytest.mark.parametrize(("chip", "workspace"), [("venus", 40), ("arcs", 1024 + 10), ("venusa", 1024)])
def test_a_chain_of_layers(chip: str, workspace: int) -> None:
    proto, _, _ = exported(Chain(), (torch.randn(1, 8, 16, 16),), {}, known(chip), BITS)
    used = usage(facts_of(proto), known(chip))
    parameters = {"a": 16 * 8 * 9 + 64, "b": 16 * 16 * 9 + 64, "fc": 10 * 1024 + 40}
    assert used.parameters == sum(parameters.values())
    assert used.prefetch == (parameters["fc"], parameters["b"])
    assert used.workspace == workspace
    tensors = {b.name: b.size for b in used.blocks}
    assert tensors["x"] == 2048
    assert sorted(tensors.values()) == sorted(
        [2048, 4096, 4096, 1024, 16, *(-(-v // 16) * 16 for v in (workspace, *used.prefetch))]
    )
    assert lower_bound(used.blocks) <= used.activations
    assert used.activations == optimum(list(used.blocks)), "a chain is planned as well as can be"


def test_padding_of_weights_is_stored() -> None:
    """3 input channels are stored as 8, 5 outputs as 6 or 8, depthwise channels as 16 or 8."""
    for chip, dense, each in (("venus", 6, 16), ("arcs", 6, 8), ("venusa", 8, 8)):
        net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 2, groups=5))
        proto, _, _ = exported(net, (torch.randn(1, 3, 9, 9),), {}, known(chip), BITS)
        assert usage(facts_of(proto), known(chip)).parameters == dense * 8 * 9 + 20 + each * 4 + 20


def test_a_tensor_too_large_for_share_memory_lies_in_psram() -> None:
    net = nn.Conv2d(4, 8, 1)
    report = linger.check(nn.Sequential(net), torch.randn(1, 4, 300, 300), target="venus", quiet=True)
    assert "703.1 KB of activations" in str(report.memory[1])


def test_too_little_memory_is_said() -> None:
    net = nn.Sequential(nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 3))
    report = linger.check(net, torch.randn(1, 8, 66, 66), target="arcs", quiet=True)
    assert not report.ok
    assert report.summary == "arcs: does not fit (too little share memory)"
    assert "of 384 KB" in str(report.memory[0])
    assert str(report.memory[0]).endswith("too much")
