"""Long short-term memory: equations (1) to (5) of ``_cells``. The chips have a node for one direction of one layer."""

from __future__ import annotations

from torch import Tensor, nn

from linger.ops._base import Op
from linger.ops._recurrent_body import body, real
from linger.ops._recurrent_modules import CellInt, SequenceInt
from linger.ops._recurrent_normalize import NormalizedRecurrent
from linger.ops._recurrent_run import node


def ordered(parameter: Tensor) -> Tensor:
    """Gates i, f, g, o of PyTorch as o, i, f, g."""
    return parameter.unflatten(0, (4, -1)).roll(1, 0).flatten(0, 1)


class LSTMInt(SequenceInt, nn.LSTM):
    """``torch.nn.LSTM`` in fixed point."""

    kind = "lstm"
    op_type = "LSTMInt"

    def ordered(self, parameter: Tensor) -> Tensor:
        return ordered(parameter)


class LSTMCellInt(CellInt, nn.LSTMCell):
    """``torch.nn.LSTMCell`` in fixed point."""

    kind = "lstm"
    op_type = "LSTMInt"

    def ordered(self, parameter: Tensor) -> Tensor:
        return ordered(parameter)


class NormalizeLSTM(NormalizedRecurrent, nn.LSTM):
    """``torch.nn.LSTM`` whose weights, biases and output stay within bounds."""


class NormalizeLSTMCell(NormalizedRecurrent, nn.LSTMCell):
    """``torch.nn.LSTMCell`` whose weights, biases and hidden state stay within bounds."""


OPS = (
    Op(name="LSTMInt", run=node("lstm"), body=body, real=real, half_up=True, integer=LSTMInt, floats=(nn.LSTM,), normalized=NormalizeLSTM,
       aliases=("QLSTM",), outputs="Y, H, C"),
    Op(name="lstm_cell", run=node("lstm"), body=body, real=real, half_up=True, integer=LSTMCellInt, floats=(nn.LSTMCell,),
       normalized=NormalizeLSTMCell, outputs="Y, H, C"),
)  # fmt: skip
