"""Sum, difference and product of two tensors, or of a tensor and a number, with broadcasting.

    iqAdd, iqSub  out = sat( sat(rsh(x, log2(s_x/s_o))) +- sat(rsh(y, log2(s_y/s_o))) )                (1)
    iqMul         out = sat( rsh(x * y, log2(s_x * s_y / s_o)) )                                       (2)

Each operand of a sum is rounded and clamped before the addition, as the chip does (``engine`` 3); the output grid is
never finer than an operand's (sum) or than the product's, so that every shift is >= 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linger import observe
from linger.numerics import WIDEST, Grid, exponent, saturate, set_grid, shift_round
from linger.ops import _sum
from linger.ops._base import Op, constants, output_bits, real_text, requant_text
from linger.ops._case import Case
from linger.ops._lowered import Lowered, Operand
from linger.ops._saturate import fits, offset_nodes
from linger.ops._site import Site, binary_nodes, constant_operand
from linger.rounding import HALF_UP
from linger.steps import piecewise

NUMBER = 8  # bits of a Python number


class _SumSite(Site):
    wide_numbers = True  # the sum is no finer than an operand
    learns = ("o",)
    sign = 1

    def forward(self, x: Any, y: Any) -> Tensor:
        bits = self.width(x, y)
        x, s_x = self.operand(x, "x", bits)
        y, s_y = self.operand(y, "y", bits)
        self.out_bits = bits
        blocked = self.learned("o") is None and _sum.takes(x, y, bits)
        seen = self.look(x, y, blocked) if self.following("o") else None
        finest = torch.minimum(s_x, s_y)
        own = self.scale("o", bits)
        scale = torch.minimum(own, finest if bits < 32 else finest / 2)
        if blocked:
            return set_grid(
                _sum.added((x, s_x), (y, s_y), self.sign, Grid(scale, bits), seen, self.rounding), Grid(scale, bits)
            )
        x, y = self.snapped(x, "o", scale, own, bits), self.snapped(y, "o", scale, own, bits)
        total = x + y if self.sign > 0 else x - y
        return set_grid(self.snapped(total, "o", scale, own, bits), Grid(scale, bits))

    @torch.no_grad()
    def look(self, x: Tensor, y: Tensor, blocked: bool) -> tuple[observe.Spread, ...] | None:
        """Let the range follow the operands and their sum; where they reach, if that is known."""
        if blocked and observe.watcher() is None:  # one look at the other ranks, whoever of them has no element
            seen = _sum.spreads(x, y, self.sign) if x.numel() else None
            self.follow("o", observe.peak(x, spread=seen and _sum.hull(seen)))
            return seen
        total = x + y if self.sign > 0 else x - y
        for t in (x, y, total):
            self.watch("o", t)
        result = observe.peak(total)
        peak = torch.maximum(torch.maximum(observe.peak(x), observe.peak(y)), result)
        self.follow("o", torch.where(result < 0, result, peak))  # an empty batch plus a number is empty
        return None

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        if len(operands) == 1 and out.bits == 8 and fits(operands[0]):
            return self.with_number(operands[0], out, call)
        return binary_nodes(self.op_type, operands, out, call, wide_numbers=True)

    def with_number(self, x: Operand, out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        """x + c, x - c and c - x: the chip's own node takes no number."""
        position = 0 if call.get(0) is not None else 1
        q, scale = constant_operand(float(call[position]), 8)
        number = int(saturate(shift_round(q, exponent(scale) - exponent(out.scale), self.rounding), 8))
        signs = (1, self.sign) if position == 0 else (self.sign, 1)  # of the number, of the tensor
        return offset_nodes(x, out, signs[1], signs[0] * number, self.rounding)


class AddSite(_SumSite):
    """``x + y``"""

    op_type = "iqAdd"


class SubSite(_SumSite):
    """``x - y``"""

    op_type = "iqSub"
    sign = -1


class MulSite(Site):
    """``x * y``"""

    op_type = "iqMul"
    learns = ("o",)

    def forward(self, x: Any, y: Any) -> Tensor:
        self.out_bits = bits = self.width(x, y)
        both = isinstance(x, Tensor) and isinstance(y, Tensor)
        x, s_x = self.operand(x, "x", bits)
        y, s_y = self.operand(y, "y", bits)
        product = x * y if bits == 8 else x.double() * y.double()
        room = 2.0 ** (WIDEST if both else NUMBER)  # what the other operand of a 32-bit one may multiply it by, in LSB
        return self.leave(product, s_x * s_y if bits < 32 else s_x * s_y / room)

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        """The operand of the result's shape first: the engine stretches only the second (``engine`` 2)."""
        (node,) = binary_nodes(self.op_type, operands, out, call)
        shapes = [operands[i].shape if isinstance(i, int) else () for i in node.inputs]
        if shapes[0] == out.shape or shapes[1] != out.shape:
            return (node,)
        attrs = {**node.attrs, "scale_x": node.attrs["scale_y"], "scale_y": node.attrs["scale_x"]}
        return (replace(node, inputs=node.inputs[::-1], attrs=attrs),)


def _run_sum(sign: int) -> Any:
    @piecewise
    def run(
        x: np.ndarray, y: np.ndarray, *, scale_x: float, scale_y: float, scale_o: float, o_bits: int = 0,
        rounding: str = HALF_UP, **_: Any,
    ) -> np.ndarray:  # fmt: skip
        """Equation (1); the width of the result is that of ``x`` unless ``o_bits`` is given."""
        bits = o_bits or 8 * x.dtype.itemsize
        a = saturate(shift_round(x, exponent(scale_x) - exponent(scale_o), rounding), bits).astype(np.int64)
        b = saturate(shift_round(y, exponent(scale_y) - exponent(scale_o), rounding), bits).astype(np.int64)
        return saturate(a + sign * b, bits)

    return run


@piecewise
def run_mul(
    x: np.ndarray, y: np.ndarray, *, scale_x: float, scale_y: float, scale_o: float, o_bits: int = 0,
    rounding: str = HALF_UP, **_: Any,
) -> np.ndarray:  # fmt: skip
    """Equation (2)."""
    product = x.astype(np.int64) * y.astype(np.int64)
    shift = exponent(scale_x) + exponent(scale_y) - exponent(scale_o)
    return saturate(shift_round(product, shift, rounding), o_bits or 8 * x.dtype.itemsize)


def _operands(names: str = "XY", double: bool = False) -> str:
    return "".join(f"{n}f = Cast <to: int = {11 if double else 1}> ({n})\n" for n in names)


def _body_sum(op: str) -> Any:
    def body(form: str, opset: int, rounding: str = HALF_UP) -> tuple[str, str]:
        _, bits = output_bits(form)
        double = bits > 16
        cast = "Mxf = Div (so, sx)\nMyf = Div (so, sy)\n"
        to = 11 if double else 1
        cast += f"Mx = Cast <to: int = {to}> (Mxf)\nMy = Cast <to: int = {to}> (Myf)\n"
        kind = "double" if double else "float"
        text = constants(sx="@scale_x", sy="@scale_y", so="@scale_o", one=f"{kind} {{1.0}}") + cast
        text += _operands(double=double) + requant_text("Xf", "Mx", "A", bits, double, cast=False, rounding=rounding)
        text += requant_text("Yf", "My", "B", bits, double, cast=False, rounding=rounding) + f"S = {op} (A, B)\n"
        return "X, Y0", text.replace("(Y)\n", "(Y0)\n") + requant_text("S", "one", "Y", bits, double)

    return body


def body_mul(form: str, opset: int, rounding: str = HALF_UP) -> tuple[str, str]:
    _, bits = output_bits(form)
    double = bits > 8
    text = constants(sx="@scale_x", sy="@scale_y", so="@scale_o") + "sxy = Mul (sx, sy)\nMf = Div (so, sxy)\n"
    text += f"M = Cast <to: int = {11 if double else 1}> (Mf)\n" + _operands(double=double) + "P = Mul (Xf, Yf)\n"
    return "X, Y0", text.replace("(Y)\n", "(Y0)\n") + requant_text("P", "M", "Y", bits, double, rounding=rounding)


_PAIR = ((2, 3, 20), (2, 3, 20))
_SPREAD = ((2, 3, 4, 5), (2, 3, 1, 1))

CASES = (
    Case(name="add", make=lambda: lambda x, y: x + y, shapes=_PAIR),
    Case(name="add-broadcast", make=lambda: lambda x, y: y + x, shapes=_SPREAD),
    Case(name="add-scalar", make=lambda: lambda x: x + 0.7, shapes=((2, 60),)),
    Case(name="add-scalar-left", make=lambda: lambda x: -3 + x, shapes=((2, 60),)),
    Case(name="add-alpha", make=lambda: lambda x, y: torch.add(x, y, alpha=2), shapes=_PAIR),
    Case(name="sub", make=lambda: lambda x, y: x - y, shapes=_PAIR),
    Case(name="sub-scalar-left", make=lambda: lambda x: 1 - x, shapes=((2, 60),)),
    Case(name="sub-alpha", make=lambda: lambda x, y: x.sub(y, alpha=0.5), shapes=_PAIR),
    Case(name="mul", make=lambda: lambda x, y: x * y, shapes=_PAIR),
    Case(name="mul-broadcast", make=lambda: lambda x, y: torch.mul(x, other=y), shapes=_SPREAD),
    Case(name="mul-scalar", make=lambda: lambda x: x * 0.3, shapes=((2, 60),)),
    Case(name="mul-by-0", make=lambda: lambda x: 0 * x, shapes=((2, 60),)),
)

OPS = (
    Op(name="iqAdd", run=_run_sum(1), body=_body_sum("Add"), real=real_text("Y = Add (X, Y0)"), integer=AddSite, site="iqadd",
       calls=(torch.add, Tensor.add, Tensor.add_), aliases=("QAdd",)),
    Op(name="iqSub", run=_run_sum(-1), body=_body_sum("Sub"), real=real_text("Y = Sub (X, Y0)"), integer=SubSite, site="iqsub",
       calls=(torch.sub, Tensor.sub, Tensor.sub_, torch.subtract, Tensor.subtract, Tensor.subtract_, Tensor.__rsub__, torch.rsub)),
    Op(name="iqMul", run=run_mul, body=body_mul, real=real_text("Y = Mul (X, Y0)"), integer=MulSite, site="iqmul",
       calls=(torch.mul, Tensor.mul, Tensor.mul_, torch.multiply, Tensor.multiply, Tensor.multiply_), aliases=("QMul",)),
)  # fmt: skip
