"""torch.tril and torch.triu: a triangle of every matrix, the rest 0. A move: the grid stays.

tril  out[i, j] = x[i, j] where j - i <= diagonal, else 0;   triu: where j - i >= diagonal         (1)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from linger.numerics import Grid, set_grid
from linger.ops._base import ONNX_INT, Op, output_bits
from linger.ops._case import Case
from linger.ops._lowered import Lowered, Operand
from linger.ops._site import Site


class TrilSite(Site):
    """``torch.tril(x, diagonal)``"""

    observed = ()
    op_type = "iqTril"
    cut: ClassVar[Any] = staticmethod(torch.tril)

    def forward(self, x: Tensor, diagonal: int = 0) -> Tensor:
        bits = self.width(x)
        x, scale = self.operand(x, "x", bits)
        return set_grid(self.cut(x, diagonal), Grid(scale, bits))

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        diagonal = int(call.get("diagonal", 0))
        attrs = {
            "diagonal": diagonal,
            "scale_x": out.scale,
            "scale_o": out.scale,
            "data_bits": out.bits,
            "o_bits": out.bits,
        }
        form = f"d{diagonal}" + ("" if out.bits == 8 else f"_o{out.bits}")
        return (Lowered(op_type=self.op_type, inputs=(0,), attrs=attrs, bits=out.bits, form=form),)


class TriuSite(TrilSite):
    """``torch.triu(x, diagonal)``"""

    op_type = "iqTriu"
    cut = staticmethod(torch.triu)


def _run(lower: bool) -> Any:
    def run(x: np.ndarray, *, diagonal: int, **_: Any) -> np.ndarray:
        """Equation (1) on the last two axes."""
        i, j = np.arange(x.shape[-2])[:, None], np.arange(x.shape[-1])
        kept = j - i <= diagonal if lower else j - i >= diagonal
        return np.where(kept, x, np.zeros((), x.dtype))

    return run


def _text(form: str, lower: bool, kind: str, cast: str) -> str:
    diagonal = int(output_bits(form)[0][1:])
    text = f"s = Shape (X)\nd = Constant <value = int64 {{{diagonal}}}> ()\nz = Constant <value = int64 {{0}}> ()\n"
    text += "o = Constant <value = int64 {1}> ()\na = Constant <value = int64 {-2}> ()\nb = Constant <value = int64 {-1}> ()\n"
    text += "h = Gather (s, a)\nw = Gather (s, b)\nri = Range (z, h, o)\nj = Range (z, w, o)\n"
    text += "c = Constant <value = int64[2] {-1, 1}> ()\ni = Reshape (ri, c)\nm = Sub (j, i)\n"
    beyond = "Greater" if lower else "Less"
    text += f"out = {beyond} (m, d)\nX0 = Cast <to: int = {kind}> (X)\n"
    text += "n = Sub (X0, X0)\nW = Where (out, n, X0)\n"
    return text + cast


def _body(lower: bool) -> Any:
    def body(form: str, opset: int) -> tuple[str, str]:
        bits = output_bits(form)[1]
        return "X", _text(form, lower, "6", f"Y = Cast <to: int = {ONNX_INT[bits]}> (W)\n")

    return body


def _real(lower: bool) -> Any:
    return lambda form, opset: _text(form, lower, "1", "Y = Identity (W)\n")


CASES = (
    Case(name="tril", make=lambda: lambda x: x.tril(), shapes=((2, 3, 5, 7),)),
    Case(name="triu", make=lambda: lambda x: torch.triu(x, diagonal=1), shapes=((2, 6, 6),)),
    Case(name="tril-below", make=lambda: lambda x: torch.tril(x, -2), shapes=((2, 6, 4),)),
)

_NAMES = ("diagonal",)

OPS = (
    Op(name="iqTril", run=_run(True), body=_body(True), real=_real(True), integer=TrilSite, site="iqtril",
       calls=(torch.tril, Tensor.tril, Tensor.tril_), names=dict.fromkeys((torch.tril, Tensor.tril, Tensor.tril_), _NAMES)),
    Op(name="iqTriu", run=_run(False), body=_body(False), real=_real(False), integer=TriuSite, site="iqtriu",
       calls=(torch.triu, Tensor.triu, Tensor.triu_), names=dict.fromkeys((torch.triu, Tensor.triu, Tensor.triu_), _NAMES)),
)  # fmt: skip
