"""Recurrent twins by what they take: layers over sequences (padded, without a batch axis, packed), and single steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from linger.numerics import set_grid
from linger.ops import _recurrent_lower as lowering
from linger.ops._lowered import Lowered, Operand
from linger.ops._recurrent import Batch, RecurrentInt
from linger.ops._recurrent_check import check_input, check_packed, check_states

States = tuple[Tensor | None, Tensor | None]


class SequenceInt(RecurrentInt):
    """A layer over whole sequences."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        if isinstance(input, PackedSequence):
            return self.forward_packed(input, hx)
        check_input(input, self.input_size, (2, 3), 1 if self.batch_first else 0)
        batched, axis = input.dim() == 3, 0 if self.batch_first else 1
        h0, c0 = self.states(hx, input.shape[axis] if batched else None)
        x, s_x = self.enter(input, "i")
        x = x if batched else x.unsqueeze(axis)
        steps = x.transpose(0, 1) if self.batch_first else x
        count, n = steps.shape[:2]
        sizes = torch.full((count,), n, dtype=torch.int64)
        rows = Batch(x=steps.reshape(count * n, self.input_size), scale=s_x, bits=self.data_bits, sizes=sizes, count=n)
        out, h, c = self.run_layers(rows, h0, c0)
        out = out.view(count, n, self.directions * self.out_size)
        out = out.transpose(0, 1) if self.batch_first else out
        if not batched:
            out, h, c = out.squeeze(axis), h.squeeze(1), c.squeeze(1)
        return set_grid(out, self.grid(self.num_layers - 1)), self.tagged(h, c)

    def forward_packed(self, packed: PackedSequence, hx: Any) -> Any:
        """The same on rows; states are in the order of the unpacked batch."""
        check_packed(packed, self.input_size)
        data, sizes, order, back = packed
        count = int(sizes[0])
        h0, c0 = self.states(hx, count)
        if order is not None:
            h0, c0 = (None if s is None else s.index_select(1, order) for s in (h0, c0))
        x, s_x = self.enter(data, "i")
        out, h, c = self.run_layers(Batch(x=x, scale=s_x, bits=self.data_bits, sizes=sizes, count=count), h0, c0)
        if back is not None:
            h, c = h.index_select(1, back), c.index_select(1, back) if self.kind == "lstm" else c
        return PackedSequence(set_grid(out, self.grid(self.num_layers - 1)), sizes, order, back), self.tagged(h, c)

    def states(self, hx: Any, count: int | None) -> States:
        """h and c that were given (layers * directions, N, size); ``count``: sequences, None without a batch axis."""
        if hx is None:
            return None, None
        batch = () if count is None else (count,)
        layers = self.num_layers * self.directions
        wanted = [("h_0", (layers, *batch, self.out_size)), ("c_0", (layers, *batch, self.hidden_size))]
        given = check_states(hx, wanted[: 2 if self.kind == "lstm" else 1])
        h, c = (*given, None)[:2]
        if count is None:
            h, c = (None if s is None else s.unsqueeze(1) for s in (h, c))
        return h, c

    def tagged(self, h: Tensor, c: Tensor) -> Any:
        """States as the layer returns them; those of several layers are on several grids, so that they are plain."""
        if self.num_layers == 1:
            h = set_grid(h, self.grid(0))
        return (h, set_grid(c, self.cell_grid())) if self.kind == "lstm" else h

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        return lowering.sequence(self, operands, call.get("packed_first"))


class CellInt(RecurrentInt):
    """A single step: nn.LSTMCell, nn.GRUCell, nn.RNNCell."""

    num_layers: ClassVar[int] = 1  # type: ignore[misc]
    batch_first: ClassVar[bool] = False  # type: ignore[misc]
    bidirectional: ClassVar[bool] = False  # type: ignore[misc]
    dropout: ClassVar[float] = 0.0  # type: ignore[misc]
    proj_size: ClassVar[int] = 0  # type: ignore[misc]

    def suffix(self, layer: int, direction: int) -> str:
        return ""

    def forward(self, input: Any, hx: Any = None) -> Any:
        check_input(input, self.input_size, (1, 2), None)
        batched = input.dim() == 2
        batch = (input.shape[0],) if batched else ()
        wanted = [(name, (*batch, self.hidden_size)) for name in ("h_0", "c_0")][: 2 if self.kind == "lstm" else 1]
        given = () if hx is None else check_states(hx, wanted)
        h0, c0 = (*(s.reshape(1, -1, self.hidden_size) for s in given), None, None)[:2]
        x, s_x = self.enter(input, "i")
        x = x if batched else x.unsqueeze(0)
        sizes = torch.full((1,), x.shape[0], dtype=torch.int64)
        rows = Batch(x=x, scale=s_x, bits=self.data_bits, sizes=sizes, count=x.shape[0])
        _, h, c = self.run_layers(rows, h0, c0)
        h = set_grid(h.reshape(*batch, self.hidden_size), self.grid(0))
        return (h, set_grid(c.reshape(*batch, self.hidden_size), self.cell_grid())) if self.kind == "lstm" else h

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        return lowering.single(self, operands)
