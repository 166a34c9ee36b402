"""Recurrent nets and inputs that the tests of recurrent layers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import linger

CHIPS = ("venus", "arcs", "venusa")
LAYERS: dict[str, type[nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
CELLS: dict[str, type[nn.RNNCellBase]] = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}
D, H = 6, 10


class Net(nn.Module):
    """A layer whose states are inputs of the net, and, with ``packed``, the lengths too."""

    def __init__(self, layer: nn.Module, packed: bool = False, enforce_sorted: bool = True) -> None:
        super().__init__()
        self.rnn, self.packed, self.enforce_sorted = layer, packed, enforce_sorted

    def forward(self, x: Tensor, *rest: Tensor) -> Any:
        if not self.packed:
            return self.rnn(x, states_of(rest))
        lengths, *states = rest
        first = self.rnn.batch_first
        rows = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=self.enforce_sorted)
        out, last = self.rnn(rows, states_of(states))
        return *pad_packed_sequence(out, batch_first=first), last


def states_of(given: Any) -> Any:
    """What a layer takes as hx."""
    return None if not given else tuple(given) if len(given) > 1 else given[0]


def first_states(layer: Any, count: int | None, seed: int = 1) -> list[Tensor]:
    """Random initial states of ``count`` sequences, None for a layer without a batch axis."""
    g = torch.Generator().manual_seed(seed)
    layers = getattr(layer, "num_layers", 1) * (2 if getattr(layer, "bidirectional", False) else 1)
    front = (layers,) if isinstance(layer, nn.RNNBase) else ()
    batch = () if count is None else (count,)
    sizes = [getattr(layer, "proj_size", 0) or layer.hidden_size]
    sizes += [layer.hidden_size] if isinstance(layer, (nn.LSTM, nn.LSTMCell)) else []
    return [0.7 * torch.randn(*front, *batch, size, generator=g) for size in sizes]


def fixed(net: nn.Module, inputs: tuple[Tensor, ...], target: str = "venus", hidden_bits: int = 8) -> Any:
    """The net in fixed point, after one training forward, in eval mode."""
    made = linger.init(net, target=target, hidden_bits=hidden_bits)
    made(*inputs)
    return made.eval()


def equal(a: Any, b: Any) -> bool:
    """Whether two results hold the same numbers."""
    flat_a, flat_b = (torch.utils._pytree.tree_leaves(t) for t in (a, b))
    return len(flat_a) == len(flat_b) and all(torch.equal(x, y) for x, y in zip(flat_a, flat_b, strict=True))
