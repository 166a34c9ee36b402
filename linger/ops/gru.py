"""Gated recurrent unit, as PyTorch defines it: equations (6), (7) of ``_cells``.

The engine's own node counts the previous state half (venus) or is meaningless (arcs, venusA): ``Target.lacks`` says so.
"""

from __future__ import annotations

from torch import nn

from linger.ops._base import Op
from linger.ops._recurrent_body import body, real
from linger.ops._recurrent_modules import CellInt, SequenceInt
from linger.ops._recurrent_normalize import NormalizedRecurrent
from linger.ops._recurrent_run import node


class GRUInt(SequenceInt, nn.GRU):
    """``torch.nn.GRU`` in fixed point."""

    kind = "gru"
    op_type = "GRUInt"


class GRUCellInt(CellInt, nn.GRUCell):
    """``torch.nn.GRUCell`` in fixed point."""

    kind = "gru"
    op_type = "GRUInt"


class NormalizeGRU(NormalizedRecurrent, nn.GRU):
    """``torch.nn.GRU`` whose weights, biases and output stay within bounds."""


class NormalizeGRUCell(NormalizedRecurrent, nn.GRUCell):
    """``torch.nn.GRUCell`` whose weights, biases and hidden state stay within bounds."""


OPS = (
    Op(name="GRUInt", run=node("gru"), body=body, real=real, half_up=True, integer=GRUInt, floats=(nn.GRU,), normalized=NormalizeGRU,
       aliases=("QGRU", "GRUInt_Is8_Is64", "GRUInt_Is8_Is64_If32"), outputs="Y, H"),
    Op(name="gru_cell", run=node("gru"), body=body, real=real, half_up=True, integer=GRUCellInt, floats=(nn.GRUCell,),
       normalized=NormalizeGRUCell, outputs="Y, H"),
)  # fmt: skip
