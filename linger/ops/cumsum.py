"""Running sum along one dimension.

out[k] = sat( rsh( x[0] + ... + x[k], log2(s_x / s_o) ) ),  s_o <= s_x                             (1)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linger.numerics import exponent, saturate, shift_round
from linger.ops._base import Op, constants, output_bits, requant_text
from linger.ops._case import Case
from linger.ops._lowered import Lowered, Operand
from linger.ops._site import Site
from linger.rounding import HALF_UP


class CumsumSite(Site):
    """``torch.cumsum(x, dim)``"""

    op_type = "iqCumSum"

    def forward(self, x: Tensor, dim: int = 0, dtype: Any = None) -> Tensor:
        self.out_bits = bits = self.width(x)
        x, s_x = self.operand(x, "x", bits)
        terms = max(1, x.shape[dim]) if x.dim() else 1
        finest = s_x if bits < 32 else s_x / 2.0 ** (terms - 1).bit_length()
        return self.leave(x.double().cumsum(dim), finest)

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        x = operands[0]
        attrs = {
            "axis": int(call["dim"]) % max(1, len(out.shape)), "scale_x": x.scale, "scale_o": out.scale,
            "data_bits": x.bits, "o_bits": out.bits,
        }  # fmt: skip
        form = f"a{attrs['axis']}" + ("" if out.bits == 8 else f"_o{out.bits}")
        return (Lowered(op_type=self.op_type, inputs=(0,), attrs=attrs, bits=out.bits, form=form),)


def run(
    x: np.ndarray, *, axis: int, scale_x: float, scale_o: float, o_bits: int = 0,
    rounding: str = HALF_UP, **_: Any,
) -> np.ndarray:  # fmt: skip
    """Equation (1)."""
    total = np.cumsum(x.astype(np.int64), axis=axis)
    return saturate(shift_round(total, exponent(scale_x) - exponent(scale_o), rounding), o_bits or 8 * x.dtype.itemsize)


def _axis(form: str) -> str:
    return f"ax = Constant <value = int64 {{{output_bits(form)[0][1:]}}}> ()\n"


def body(form: str, opset: int, rounding: str = HALF_UP) -> tuple[str, str]:
    bits = output_bits(form)[1]
    text = _axis(form) + constants(sx="@scale_x", so="@scale_o") + "mf = Div (so, sx)\nm = Cast <to: int = 11> (mf)\n"
    text += "Xd = Cast <to: int = 11> (X)\nS = CumSum (Xd, ax)\n"
    return "X", text + requant_text("S", "m", "Y", bits, double=True, rounding=rounding)


def real(form: str, opset: int) -> str:
    return _axis(form) + "Y = CumSum (X, ax)\n"


CASES = (
    Case(name="cumsum", make=lambda: lambda x: x.cumsum(-1), shapes=((2, 3, 20),)),
    Case(name="cumsum-axis-1", make=lambda: lambda x: torch.cumsum(x, dim=1), shapes=((2, 9, 7),)),
)

_CALLS = (torch.cumsum, Tensor.cumsum)

OPS = (
    Op(name="iqCumSum", run=run, body=body, real=real, integer=CumsumSite, site="iqcumsum", calls=_CALLS,
       names=dict.fromkeys(_CALLS, ("dim", "dtype"))),
)  # fmt: skip
