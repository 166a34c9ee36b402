"""Quant, Dequant, Requant: where a plain tensor enters fixed point, leaves it, or changes its width.

Quant    q = clamp(floor(float32(x * s) + 0.5)), 32 bits to -2^24 .. 2^24 - 1 in float64                (1)
Dequant  x = q / s                                                                                 (2)
Requant  q' = saturate(shift_round(q, log2(s_x / s_o)))                                            (3)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from linger.numerics import WIDEST, Grid, exponent, grid_of, quantize_array, saturate, set_grid, shift_round
from linger.ops._base import Op, constants, real_text, requant_text
from linger.ops._case import Case
from linger.ops._lowered import Lowered, Operand
from linger.ops._site import Site
from linger.rounding import HALF_UP
from linger.steps import piecewise


@piecewise
def run_quant(x: np.ndarray, *, scale_x: float, data_bits: int = 8, rounding: str = HALF_UP, **_: Any) -> np.ndarray:
    """float32 of any shape -> integers; equation (1), up to 16 bits with the float32 rounding of the sum (``engine`` 3)."""
    return quantize_array(x, scale_x, data_bits, rounding)


@piecewise
def run_dequant(x: np.ndarray, *, scale_o: float, **_: Any) -> np.ndarray:
    """Integers -> float32; equation (2)."""
    return (x.astype(np.float64) / scale_o).astype(np.float32)


@piecewise
def run_requant(
    x: np.ndarray, *, scale_x: float, scale_o: float, o_bits: int = 8, rounding: str = HALF_UP, **_: Any
) -> np.ndarray:
    """Equation (3)."""
    return saturate(shift_round(x, exponent(scale_x) - exponent(scale_o), rounding), o_bits)


def body_quant(form: str, opset: int, rounding: str = HALF_UP) -> tuple[str, str]:
    bits = int(form or 8)
    if bits <= 16:
        return "X", constants(s="@scale_x") + requant_text("X", "s", "Y", bits, rounding=rounding)
    text = constants(s="@scale_x") + "sd = Cast <to: int = 11> (s)\nXd = Cast <to: int = 11> (X)\n"
    return "X", text + requant_text("Xd", "sd", "Y", bits, double=True, limit=WIDEST, rounding=rounding)


def body_dequant(form: str, opset: int) -> tuple[str, str]:
    return "X", constants(s="@scale_o") + "F = Cast <to: int = 1> (X)\nY = Div (F, s)\n"


def body_requant(form: str, opset: int, rounding: str = HALF_UP) -> tuple[str, str]:
    text = constants(sx="@scale_x", so="@scale_o") + "Mf = Div (so, sx)\nM = Cast <to: int = 11> (Mf)\n"
    text += "F = Cast <to: int = 11> (X)\n"
    return "X", text + requant_text("F", "M", "Y", int(form or 8), double=True, rounding=rounding)


class ScaledRoundLayer(Site):
    """What ``quant_tensor`` calls: a tensor put on a grid of ``bits`` bits; observes the range of a plain one."""

    observed = ("x",)
    bits = 8

    def forward(self, x: Tensor) -> Tensor:
        grid = grid_of(x)
        if grid is not None and grid.bits == self.bits:
            return x
        self.out_bits = self.bits
        y, scale = self.enter(x, "x", self.bits)
        return set_grid(y, Grid(scale, self.bits))

    def operand_bits(self, bits: Sequence[int]) -> int:
        return self.bits

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        return ()


SAME = real_text("Y = Identity (X)")  # on floats, rounding is the pair of QuantizeLinear and DequantizeLinear behind it

CASES = (Case(name="quant", make=lambda: nn.Identity(), shapes=((4, 60),), bits=(8, 16, 32)),)

OPS = (
    Op(name="Quant", run=run_quant, body=body_quant, real=SAME),
    Op(name="Dequant", run=run_dequant, body=body_dequant, real=SAME),
    Op(name="Requant", run=run_requant, body=body_requant, real=SAME),
    Op(
        name="quant_tensor",
        run=run_requant,
        body=body_requant,
        real=SAME,
        integer=ScaledRoundLayer,
        site="iq_tensor_quant",
    ),
)
