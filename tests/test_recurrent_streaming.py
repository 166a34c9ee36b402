"""Running chunk by chunk with carried states gives the integers of one run, for any chunks: in PyTorch and in the file."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent import CELLS, CHIPS, LAYERS, D, H, Net, equal, first_states, fixed, states_of
from torch import Tensor, nn

import linger

STEPS = 24
NETS: dict[tuple[str, str, int], Any] = {}


def net_of(kind: str, chip: str, bits: int) -> Any:
    key = (kind, chip, bits)
    if key not in NETS:
        torch.manual_seed(1)
        layer = LAYERS[kind](D, H, num_layers=2)
        NETS[key] = fixed(Net(layer), (torch.randn(STEPS, 3, D), *first_states(layer, 3)), chip, bits)
    return NETS[key]


def parts(x: Tensor, cuts: list[int]) -> list[Tensor]:
    """x cut in front of these steps."""
    ends = sorted({c for c in cuts if 0 < c < len(x)})
    return [x[a:b] for a, b in itertools.pairwise([0, *ends, len(x)])]


@given(
    kind=st.sampled_from(sorted(LAYERS)), chip=st.sampled_from(CHIPS), bits=st.sampled_from([8, 16]),
    cuts=st.lists(st.integers(1, STEPS - 1), max_size=STEPS), seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_streaming_is_offline(kind: str, chip: str, bits: int, cuts: list[int], seed: int) -> None:
    net = net_of(kind, chip, bits)
    x = 2 * torch.randn(STEPS, 3, D, generator=torch.Generator().manual_seed(seed))
    state = states_of(first_states(net.rnn, 3, seed))
    whole, last = net.rnn(x, state)
    outs = []
    for chunk in parts(x, cuts):
        out, state = net.rnn(chunk, state)
        outs.append(out)
    assert torch.equal(torch.cat(outs), whole)
    assert equal(state, last)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("chip", CHIPS)
def test_streaming_in_the_runtime(kind: str, chip: str, tmp_path: Path) -> None:
    """A file with states in and out, its number of steps dynamic, run from chunk to chunk."""
    net = net_of(kind, chip, 8)
    x, states = 2 * torch.randn(STEPS, 3, D), first_states(net.rnn, 3)
    names = ["x", "h", "c"][: 1 + len(states)]
    linger.onnx.export(net, (x, *states), tmp_path / "net.onnx", input_names=names, dynamic_axes={"x": {0: "steps"}})
    model = linger.runtime.load(tmp_path / "net.onnx")
    whole, *_ = model(x.numpy(), *(s.numpy() for s in states))
    carried: list[Any] = [s.numpy() for s in states]
    outs = []
    for chunk in parts(x, [1, 2, 9, 20]):
        out, *carried = model(chunk.numpy(), *carried)
        outs.append(torch.from_numpy(out))
    assert torch.equal(torch.cat(outs), torch.from_numpy(whole))
    assert torch.equal(torch.from_numpy(whole), net(x, *states)[0])


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("chip", CHIPS)
def test_a_cell_is_a_step_of_its_layer(kind: str, chip: str) -> None:
    torch.manual_seed(2)
    layer = fixed(Net(LAYERS[kind](D, H)), (torch.randn(STEPS, 3, D),), chip).rnn
    made = CELLS[kind](D, H)
    made.load_state_dict({n.removesuffix("_l0"): p for n, p in layer.named_parameters()})
    cell = linger.init(nn.Sequential(made), target=chip)[0].eval()
    for name in ("i", "h"):
        cell.running(name).copy_(layer.running(name))
    x, state = torch.randn(STEPS, 3, D), None
    whole = layer(x)[0]
    for t in range(STEPS):
        state = cell(x[t], state)
        assert torch.equal(state[0] if kind == "lstm" else state, whole[t])


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), kind=st.sampled_from(sorted(LAYERS)))
@settings(max_examples=30, deadline=None)
def test_packed_is_each_sequence_alone(lengths: list[int], kind: str) -> None:
    """In any order of lengths, with states, both directions."""
    torch.manual_seed(3)
    layer = LAYERS[kind](D, H, bidirectional=True)
    x, states = torch.randn(9, len(lengths), D), first_states(layer, len(lengths))
    net = fixed(Net(layer, True, enforce_sorted=False), (x, torch.tensor(lengths), *states))
    out, counts, last = net(x, torch.tensor(lengths), *states)
    assert counts.tolist() == lengths
    for i, n in enumerate(lengths):
        alone, end = net.rnn(x[:n, i : i + 1], states_of([s[:, i : i + 1] for s in states]))
        assert torch.equal(out[:n, i], alone[:, 0])
        assert not out[n:, i].any()
        assert equal(
            [t[:, i] for t in torch.utils._pytree.tree_leaves(last)],
            [t[:, 0] for t in torch.utils._pytree.tree_leaves(end)],
        )
