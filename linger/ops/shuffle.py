"""Channel shuffle: (N, g, C/g, *) -> (N, C/g, g, *). A move: the grid stays.

out[n, i * g + j] = x[n, j * (C/g) + i]                                                            (1)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from linger.numerics import Grid, set_grid
from linger.ops._base import Op, output_bits
from linger.ops._case import Case
from linger.ops._lowered import Lowered, Operand
from linger.ops._site import Site


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """``torch.nn.functional.channel_shuffle``, under the name that linger always had.

    Args:
        x: (N, C, *).
        groups: divides C.
    """
    return F.channel_shuffle(x, groups)


class ShuffleSite(Site):
    """``F.channel_shuffle``"""

    observed = ()
    op_type = "ShuffleChannel"

    def forward(self, x: Tensor, groups: int) -> Tensor:
        bits = self.width(x)
        x, scale = self.operand(x, "x", bits)
        return set_grid(F.channel_shuffle(x, groups), Grid(scale, bits))

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        groups = int(call["groups"])
        attrs = {
            "groups": groups,
            "axis": 1,
            "scale_x": out.scale,
            "scale_o": out.scale,
            "data_bits": out.bits,
            "o_bits": out.bits,
        }
        form = f"g{groups}r{len(out.shape)}" + ("" if out.bits == 8 else f"_o{out.bits}")
        return (Lowered(op_type=self.op_type, inputs=(0,), attrs=attrs, bits=out.bits, form=form),)


def run(x: np.ndarray, *, groups: int, **_: Any) -> np.ndarray:
    """x (N, C, *); equation (1)."""
    n, c, *space = x.shape
    return x.reshape(n, groups, c // groups, *space).swapaxes(1, 2).reshape(x.shape)


def body(form: str, opset: int) -> tuple[str, str]:
    groups, rank = (int(v) for v in output_bits(form)[0][1:].split("r"))
    perm = ", ".join(map(str, (0, 2, 1, *range(3, rank + 1))))
    text = f"s = Shape (X)\ng = Constant <value = int64[1] {{{groups}}}> ()\n"
    for name, value in (("z", 0), ("o", 1), ("t", 2), ("e", 2**31)):
        text += f"{name} = Constant <value = int64[1] {{{value}}}> ()\n"
    text += "n = Slice (s, z, o)\nc = Slice (s, o, t)\nr = Slice (s, t, e)\nh = Div (c, g)\n"
    text += "w = Concat <axis: int = 0> (n, g, h, r)\nA = Reshape (X, w)\n"
    return "X", text + f"B = Transpose <perm: ints = [{perm}]> (A)\nY = Reshape (B, s)\n"


CASES = (
    Case(name="channel-shuffle", make=lambda: nn.ChannelShuffle(2), shapes=((2, 6, 3, 5),)),
    Case(name="channel-shuffle-1d", make=lambda: lambda x: channel_shuffle(x, groups=3), shapes=((2, 6, 11),)),
)

_CALLS = (F.channel_shuffle,)

OPS = (
    Op(name="ShuffleChannel", run=run, body=body, real=lambda form, opset: body(form, opset)[1], integer=ShuffleSite,
       site="channel_shuffle", calls=_CALLS, names=dict.fromkeys(_CALLS, ("groups",)), modules=(nn.ChannelShuffle,)),
)  # fmt: skip
