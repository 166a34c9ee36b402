"""Plain recurrent layers with tanh or relu: equation (8) of ``_cells``. The engine has no such node (``Target.lacks``)."""

from __future__ import annotations

from torch import nn

from linger.ops._base import Op
from linger.ops._recurrent_body import body, real
from linger.ops._recurrent_modules import CellInt, SequenceInt
from linger.ops._recurrent_normalize import NormalizedRecurrent
from linger.ops._recurrent_run import node


class RNNInt(SequenceInt, nn.RNN):
    """``torch.nn.RNN`` in fixed point."""

    kind = "rnn"
    op_type = "RNNInt"


class RNNCellInt(CellInt, nn.RNNCell):
    """``torch.nn.RNNCell`` in fixed point."""

    kind = "rnn"
    op_type = "RNNInt"


class NormalizeRNN(NormalizedRecurrent, nn.RNN):
    """``torch.nn.RNN`` whose weights, biases and output stay within bounds."""


class NormalizeRNNCell(NormalizedRecurrent, nn.RNNCell):
    """``torch.nn.RNNCell`` whose weights, biases and hidden state stay within bounds."""


OPS = (
    Op(name="RNNInt", run=node("rnn"), body=body, real=real, half_up=True, integer=RNNInt, floats=(nn.RNN,), normalized=NormalizeRNN,
       outputs="Y, H"),
    Op(name="rnn_cell", run=node("rnn"), body=body, real=real, half_up=True, integer=RNNCellInt, floats=(nn.RNNCell,),
       normalized=NormalizeRNNCell, outputs="Y, H"),
)  # fmt: skip
