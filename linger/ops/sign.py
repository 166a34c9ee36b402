"""Absolute value, negation and sign: exact, on grids that hold the result.

iqAbs   out = sat(|q|),   s_o = s_x, so that |-128| is 127                                         (1)
iqNeg   out = sat(-q),    s_o = s_x                                                                (2)
iqSign  out = sign(q) s_o,  s_o = 2^(b-2), the finest grid that holds 1                            (3)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from linger.numerics import WIDEST, Grid, levels, saturate, set_grid
from linger.ops._base import ONNX_INT, Op, constants, real_text
from linger.ops._case import Case
from linger.ops._lowered import Lowered, Operand
from linger.ops._site import Site


def sign_scale(bits: int) -> float:
    """s_o of equation (3); that of 16 bits for a wider grid."""
    return 2.0 ** (min(bits, 16) - 2)


class _Saturated(torch.autograd.Function):
    """min(y, top), 0-d ``top``, straight through: it changes the lowest level of a grid only."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, top: Tensor) -> Tensor:
        return torch.minimum(y, top)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _SignSite(Site):
    observed = ()
    function: ClassVar[Callable[[Tensor], Tensor]]

    def forward(self, x: Tensor) -> Tensor:
        self.out_bits = bits = self.width(x)
        x, scale = self.operand(x, "x", bits)
        scale = self.output_scale(scale, bits)
        y = _Saturated.apply(type(self).function(x), levels(min(bits, WIDEST + 1)) / scale)
        return set_grid(y, Grid(scale, bits))

    def output_scale(self, scale: Tensor, bits: int) -> Tensor:
        return scale

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        attrs = {"scale_x": operands[0].scale, "scale_o": out.scale, "data_bits": out.bits, "o_bits": out.bits}
        return (Lowered(op_type=self.op_type, inputs=(0,), attrs=attrs, bits=out.bits, form=str(out.bits)),)


class AbsSite(_SignSite):
    """``torch.abs``"""

    op_type = "iqAbs"
    function = torch.abs


class NegSite(_SignSite):
    """``-x``"""

    op_type = "iqNeg"
    function = torch.neg


class SignSite(_SignSite):
    """``torch.sign``"""

    op_type = "iqSign"
    function = torch.sign

    def output_scale(self, scale: Tensor, bits: int) -> Tensor:
        return scale.new_full((), sign_scale(bits))


def run_abs(x: np.ndarray, **_: Any) -> np.ndarray:
    """Equation (1)."""
    return saturate(np.abs(x.astype(np.int64)), 8 * x.dtype.itemsize)


def run_neg(x: np.ndarray, **_: Any) -> np.ndarray:
    """Equation (2)."""
    return saturate(-x.astype(np.int64), 8 * x.dtype.itemsize)


def run_sign(x: np.ndarray, *, scale_o: float, **_: Any) -> np.ndarray:
    """Equation (3)."""
    return (np.sign(x.astype(np.int64)) * int(scale_o)).astype(x.dtype)


def _body(op: str) -> Callable[[str, int], tuple[str, str]]:
    def body(form: str, opset: int) -> tuple[str, str]:
        bits = int(form)
        scale = int(sign_scale(bits)) if op == "Sign" else 1
        text = constants(top=f"double {{{2 ** (bits - 1) - 1}}}", s=f"double {{{scale}}}")
        text += f"Xd = Cast <to: int = 11> (X)\nA = {op} (Xd)\nB = Mul (A, s)\nC = Min (B, top)\n"
        return "X", text + f"Y = Cast <to: int = {ONNX_INT[bits]}> (C)\n"

    return body


CASES = (
    Case(name="abs", make=lambda: abs, shapes=((2, 60),)),
    Case(name="neg", make=lambda: lambda x: -x, shapes=((2, 60),)),
    Case(name="sign", make=lambda: torch.sign, shapes=((2, 60),)),
)

OPS = (
    Op(name="iqAbs", run=run_abs, body=_body("Abs"), real=real_text("Y = Abs (X)"), integer=AbsSite, site="iqabs",
       calls=(torch.abs, torch.absolute, Tensor.abs, Tensor.absolute, torch.abs_, Tensor.abs_, Tensor.absolute_)),
    Op(name="iqNeg", run=run_neg, body=_body("Neg"), real=real_text("Y = Neg (X)"), integer=NegSite, site="iqneg",
       calls=(torch.neg, torch.negative, Tensor.neg, Tensor.negative, torch.neg_, torch.negative_, Tensor.neg_, Tensor.negative_)),
    Op(name="iqSign", run=run_sign, body=_body("Sign"), real=real_text("Y = Sign (X)"), integer=SignSite, site="iqsign",
       calls=(torch.sign, Tensor.sign, Tensor.sign_)),
)  # fmt: skip
