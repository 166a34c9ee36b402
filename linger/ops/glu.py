"""GLU: the first half of an axis times the chip's sigmoid of the second half, in one step (``engine`` 3 and 9).

    s = rsh(pwl(z(b)), y_fraction - 15)                                                                (1)
    out = sat( rsh(a * s, 15 + log2 s_x - log2 s_o) ),  s_o <= 2^15 s_x                                (2)

z and pwl are those of sigmoid (``targets/_pwl``); s has 15 fraction bits and reaches 2^15.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linger.errors import LingerError
from linger.numerics import Grid, exponent, grid_of, saturate, set_grid, shift_round, straight_through
from linger.ops._base import Op, requant_text
from linger.ops._case import Case
from linger.ops._lowered import Lowered, Operand
from linger.ops._pwl import argument, evaluate, torch_values
from linger.ops._site import Site
from linger.ops._unary import WIDEST_TABLE, gather_text, levels_from_zero, positions
from linger.targets import Pwl, known

FRACTION = 15  # bits of s


def _sigmoid_of(platform: str) -> Pwl:
    return known(platform.lower()).functions["iqSigmoid"]


class GluSite(Site):
    """``F.glu``"""

    op_type = "GluInt"

    def operand_bits(self, bits: Sequence[int]) -> int:
        return min(super().operand_bits(bits), WIDEST_TABLE)

    def forward(self, x: Tensor, dim: int = -1) -> Tensor:
        if not -x.dim() <= dim < x.dim():
            raise LingerError(f"dim is {dim}, allowed are {-x.dim()} to {x.dim() - 1}; choose an axis of the input")
        if x.shape[dim] % 2:
            raise LingerError(f"axis {dim} has {x.shape[dim]} elements, allowed are even numbers; pad or split it")
        bits = self.out_bits = self.operand_bits([g.bits for g in [grid_of(x)] if g is not None])
        x, scale = self.operand(x, "x", bits)
        ideal = F.glu(x, dim)
        self.watch("o", ideal)
        self.observe("o", ideal)
        s_o = torch.minimum(self.scale("o", bits), scale * 2.0**FRACTION)
        return set_grid(straight_through(ideal, self.integers(x, scale, s_o, bits, dim), s_o, bits), Grid(s_o, bits))

    @torch.no_grad()
    def integers(self, x: Tensor, scale: Tensor, s_o: Tensor, bits: int, dim: int) -> Tensor:
        """Equation (2) before saturation, float64 where float32 does not hold the product."""
        a, b = x.chunk(2, dim)
        q = (b * scale).to(torch.int8 if bits == 8 else torch.int16)
        gates = self.gates(scale, bits, q).index_select(0, positions(q)).view(b.shape)
        a, s_o, scale = (a, s_o, scale) if bits == 8 else (a.double(), s_o.double(), scale.double())
        return torch.floor(a * gates.to(a.dtype) * (s_o / 2.0**FRACTION) + 0.5)

    def gates(self, scale: Tensor, bits: int, q: Tensor) -> Tensor:
        """Equation (1) for every level, from level 0 on, the negative ones last."""
        table = _sigmoid_of(self.chip)
        k = levels_from_zero(bits, q.device)
        return torch.floor(torch_values(k, scale, table) * 2.0 ** (FRACTION - table.y_fraction) + 0.5).float()

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        x = operands[0]
        dim = call.get("dim", -1) % len(x.shape)
        attrs = {"dim": dim, "scale_x": x.scale, "scale_o": out.scale, "data_bits": x.bits, "o_bits": out.bits}
        platform = known(self.chip).platform
        form = f"{platform} {exponent(x.scale)} {exponent(out.scale)} {out.bits} {dim}"
        return (Lowered(op_type=self.op_type, inputs=(0,), attrs=attrs, bits=out.bits, form=form),)


def run(
    x: np.ndarray, *, dim: int, scale_x: float, scale_o: float, platform: str = "venus", o_bits: int = 0, **_: Any
) -> np.ndarray:
    """x int8 or int16 with an even axis ``dim`` -> half as long; equation (2)."""
    a, b = np.split(x.astype(np.int64), 2, axis=dim)
    product = a * gate(b, scale_x, platform)
    shift = FRACTION + exponent(scale_x) - exponent(scale_o)
    return saturate(shift_round(product, shift), o_bits or 8 * x.dtype.itemsize)


def gate(b: np.ndarray, scale_x: float, platform: str) -> np.ndarray:
    """Equation (1) on integers of any shape."""
    table = _sigmoid_of(platform)
    return shift_round(evaluate(argument(b, scale_x, table), table), table.y_fraction - FRACTION)


def body(form: str, opset: int) -> tuple[str, str]:
    platform, *numbers = form.split(" ")
    q_x, q_o, bits, dim = map(int, numbers)
    gates = gate(np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)), 2.0**q_x, platform)
    halves = ", num_outputs: int = 2" if opset >= 18 else ""
    text = f"A, B = Split <axis: int = {dim}{halves}> (X)\n" + gather_text("B", "S", gates, "int32")
    text += "Ad = Cast <to: int = 11> (A)\nSd = Cast <to: int = 11> (S)\nP = Mul (Ad, Sd)\n"
    text += f"M = Constant <value = double {{{2.0 ** (q_o - q_x - FRACTION)!r}}}> ()\n"
    return "X", text + requant_text("P", "M", "Y", bits, double=True)


def real(form: str, opset: int) -> str:
    halves = ", num_outputs: int = 2" if opset >= 18 else ""
    return f"A, B = Split <axis: int = @dim{halves}> (X)\nS = Sigmoid (B)\nY = Mul (A, S)\n"


CHIPS = ("venus", "arcs", "venusa")

CASES = (
    Case(name="glu", make=lambda: nn.GLU(), shapes=((2, 3, 20),), targets=CHIPS),
    Case(name="glu-axis-1", make=lambda: lambda x: F.glu(x, 1), shapes=((2, 6, 4, 5),)),
)

OPS = (
    Op(name="GluInt", run=run, body=body, real=real, half_up=True, integer=GluSite, site="iqglu", calls=(F.glu,),
       names={F.glu: ("dim",)}, modules=(nn.GLU,)),
)  # fmt: skip
