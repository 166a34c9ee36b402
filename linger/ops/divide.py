"""Quotient of two tensors, or of a tensor and a number, with broadcasting.

    x / y:  N = q_x * 2^max(m, 0),  D = q_y * 2^max(-m, 0),  m = log2(s_o * s_y / s_x)                 (1)
    out = sat( floor(N / D + 1/2) ) = sat( floor((2 N + D) / (2 D)) )  with the sign moved to N        (2)

Division by zero saturates with the sign of the dividend; 0 / 0 is 0. 32-bit results are limited to +-(2^24 - 1). For q_y / s_y = 2^k this is rsh(q_x, k + ...), the
form that the chip has (``engine`` 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linger import observe
from linger.numerics import Grid, exponent, saturate, set_grid, straight_through
from linger.ops._base import Op, constants, output_bits, real_text, requant_text
from linger.ops._case import Case
from linger.ops._lowered import Lowered, Operand
from linger.ops._site import Site, binary_nodes
from linger.rounding import divide_half_up, divided_half_up
from linger.steps import piecewise

LIMIT = 2**24 - 1  # what float32 holds of a 32-bit result
FINEST = 20  # |m| at most: every term of (2) stays an exact float64


class DivSite(Site):
    """``x / y``"""

    op_type = "iqDiv"

    @classmethod
    def takes(cls, *args: Any, rounding_mode: str | None = None, **kwargs: Any) -> bool:
        return rounding_mode is None

    def forward(self, x: Any, y: Any) -> Tensor:
        self.out_bits = bits = self.width(x, y)
        x, s_x = self.operand(x, "x", bits)
        y, s_y = self.operand(y, "y", bits)
        zero = y == 0  # a small divisor may round to it: it must leave no infinity in a gradient
        ideal = torch.where(zero, 0.0, x / torch.where(zero, 1.0, y))
        if self.training:
            with torch.no_grad():
                self.watch("o", ideal)
                self.follow("o", observe.peak(ideal))
        else:
            self.require_range("o")
        ratio = s_x / s_y
        scale = torch.maximum(torch.minimum(self.scale("o", bits), ratio * 2.0**FINEST), ratio * 2.0**-FINEST)
        n = x.detach().double() * s_x.double() * y.detach().sign()
        d = y.detach().double().abs() * s_y.double()
        m = (scale / ratio).double()
        n, d = n * m.clamp_min(1), d / m.clamp_max(1)
        q = divided_half_up(n, torch.where(d == 0, torch.ones_like(d), d))
        q = torch.where(zero, x.detach().double().sign() * LIMIT, q).clamp(-LIMIT, LIMIT)
        return set_grid(straight_through(ideal, q, scale.double(), bits).float(), Grid(scale, bits))

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        return binary_nodes(self.op_type, operands, out, call)


@piecewise
def run(
    x: np.ndarray, y: np.ndarray, *, scale_x: float, scale_y: float, scale_o: float, o_bits: int = 0, **_: Any
) -> np.ndarray:
    """Equations (1), (2)."""
    m = exponent(scale_o) + exponent(scale_y) - exponent(scale_x)
    divisor = y.astype(np.int64)
    n = x.astype(np.int64) * np.sign(divisor) << max(m, 0)
    d = np.abs(divisor) << max(-m, 0)
    q = divide_half_up(n, np.where(d == 0, 1, d))
    q = np.clip(np.where(d == 0, np.sign(x.astype(np.int64)) * LIMIT, q), -LIMIT, LIMIT)
    return saturate(q, o_bits or 8 * x.dtype.itemsize)


def body(form: str, opset: int) -> tuple[str, str]:
    _, bits = output_bits(form)
    text = constants(
        sx="@scale_x", sy="@scale_y", so="@scale_o", one="double {1.0}", two="double {2.0}", zero="double {0.0}"
    )
    text += (
        constants(big=f"double {{{LIMIT}}}", small=f"double {{{-LIMIT}}}")
        + "osy = Mul (so, sy)\nmf = Div (osy, sx)\nm = Cast <to: int = 11> (mf)\n"
    )
    text += "up = Max (m, one)\ndn = Min (m, one)\nXd = Cast <to: int = 11> (X)\nYd = Cast <to: int = 11> (Y0)\n"
    text += "ys = Sign (Yd)\nya = Abs (Yd)\nxs = Sign (Xd)\nxn = Mul (Xd, ys)\nn = Mul (xn, up)\nd = Div (ya, dn)\n"
    text += "d2 = Mul (d, two)\nz = Equal (d, zero)\nds = Where (z, one, d2)\nn2 = Mul (n, two)\nnd = Add (n2, d)\n"
    text += "r = Div (nd, ds)\nf = Floor (r)\nl = Mul (xs, big)\nw = Where (z, l, f)\nq = Clip (w, small, big)\n"
    return "X, Y0", text + requant_text("q", "one", "Y", bits, double=True)


CASES = (
    Case(name="div", make=lambda: lambda x, y: x / y, shapes=((2, 60), (2, 60)), divisor=True),
    Case(name="div-broadcast", make=lambda: lambda x, y: x / y, shapes=((2, 3, 20), (2, 3, 1)), divisor=True),
    Case(name="div-scalar", make=lambda: lambda x: x / 3, shapes=((2, 60),)),
    Case(name="div-scalar-left", make=lambda: lambda x: 2.5 / x, shapes=((2, 60),), divisor=True),
    Case(name="div-power-of-2", make=lambda: lambda x: x / 4, shapes=((2, 60),)),
)

OPS = (
    Op(name="iqDiv", run=run, body=body, real=real_text("Y = Div (X, Y0)"), integer=DivSite, site="iqdiv", half_up=True,
       calls=(torch.div, Tensor.div, Tensor.div_, torch.divide, Tensor.divide, Tensor.divide_, torch.true_divide,
              Tensor.true_divide, Tensor.true_divide_, Tensor.__rdiv__)),
)  # fmt: skip
