"""Long short-term memory: equations (1) to (5) of ``_cells``."""

from __future__ import annotations

from torch import Tensor, nn

from linger.ops._base import Op
from linger.ops._recurrent import SequenceInt
from linger.ops._recurrent_body import body
from linger.ops._recurrent_run import node


class LSTMInt(SequenceInt, nn.LSTM):
    """``torch.nn.LSTM`` in fixed point."""

    kind = "lstm"
    op_type = "LSTMInt"

    def ordered(self, parameter: Tensor) -> Tensor:
        return parameter.unflatten(0, (4, -1)).roll(1, 0).flatten(0, 1)  # i, f, g, o -> o, i, f, g


def real(form: str, opset: int) -> str:
    return ""


OPS = (
    Op(
        name="LSTMInt",
        run=node("lstm"),
        body=body,
        real=real,
        integer=LSTMInt,
        floats=(nn.LSTM,),
        aliases=("QLSTM",),
        outputs="Y, H, C",
    ),
)
