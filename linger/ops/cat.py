"""Concatenation: every input is brought to the output grid.

out = [ sat(rsh(x_i, log2(s_i / s_o))) for every i ]                                               (1)

A chip that cannot shift inside of the node (``Target.cat_requants``) gets a Requant in front of it: the same integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linger import observe
from linger.eager import same
from linger.numerics import Grid, exponent, fake_quant, saturate, set_grid, shift_round
from linger.ops._base import Op, constants, output_bits, requant_text
from linger.ops._case import Case
from linger.ops._lowered import Lowered, Operand, requant_node
from linger.ops._site import Site
from linger.rounding import HALF_UP
from linger.steps import piecewise
from linger.targets import known


class CatSite(Site):
    """``torch.cat`` of any number of tensors."""

    op_type = "iqCat"

    def forward(self, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        self.out_bits = bits = self.width(*tensors)
        entered = [self.operand(t, f"x{i}", bits) for i, t in enumerate(tensors)]
        if self.following("o"):
            with torch.no_grad():
                for x, _ in entered:
                    self.watch("o", x)
                peaks = torch.stack([observe.peak(x) for x, _ in entered])
                self.follow("o", peaks.amax())
        scale = torch.minimum(self.scale("o", bits), torch.stack([s for _, s in entered]).amin())
        out = torch.cat(
            [x if same(s, scale) else fake_quant(x, scale, bits, rounding=self.rounding) for x, s in entered], dim
        )
        return set_grid(out, Grid(scale, bits))

    def operand_name(self, position: int) -> str:
        return f"x{position}"

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        dim = call.get("dim", call.get(1, 0)) % len(out.shape)
        finer = [i for i, x in enumerate(operands) if x.scale > out.scale and known(self.chip).cat_requants]
        before = tuple(replace(requant_node(operands[i], out), inputs=(i,)) for i in finer)
        operands = tuple(out if i in finer else x for i, x in enumerate(operands))
        attrs = {f"scale_x_{i}": x.scale for i, x in enumerate(operands)}
        attrs |= {"scale_o": out.scale, "dim": dim, "axis": dim, "o_bits": out.bits}
        form = f"n{len(operands)}" + ("" if out.bits == 8 else f"_o{out.bits}")
        inputs = tuple(f"%{finer.index(i)}" if i in finer else i for i in range(len(operands)))
        return (
            *before,
            Lowered(op_type=self.op_type, inputs=inputs, attrs=attrs, bits=out.bits, form=form),
        )


def run(
    *x: np.ndarray, scale_o: float, dim: int | None = None, axis: int | None = None, o_bits: int = 0,
    rounding: str = HALF_UP, **scales: Any,
) -> np.ndarray:  # fmt: skip
    """Equation (1); ``scale_x_<i>`` belongs to input i."""
    bits = o_bits or 8 * x[0].dtype.itemsize
    where = dim if dim is not None else axis
    shifts = [exponent(scales[f"scale_x_{i}"]) - exponent(scale_o) for i in range(len(x))]

    @piecewise
    def part(v: np.ndarray, *, n: int) -> np.ndarray:
        return saturate(shift_round(v, n, rounding), bits)

    return np.concatenate([part(v, n=n) for v, n in zip(x, shifts, strict=True)], axis=where or 0)


def body(form: str, opset: int, rounding: str = HALF_UP) -> tuple[str, str]:
    base, bits = output_bits(form)
    n = int(base[1:])
    double = bits > 16
    to = 11 if double else 1
    text = constants(so="@scale_o")
    for i in range(n):
        text += (
            constants(**{f"s{i}": f"@scale_x_{i}"}) + f"m{i}f = Div (so, s{i})\nm{i} = Cast <to: int = {to}> (m{i}f)\n"
        )
        text += f"x{i}f = Cast <to: int = {to}> (X{i})\n"
        text += requant_text(f"x{i}f", f"m{i}", f"q{i}", bits, double, rounding=rounding)
    text += f"Y = Concat <axis: int = @dim> ({', '.join(f'q{i}' for i in range(n))})\n"
    return ", ".join(f"X{i}" for i in range(n)), text


def real(form: str, opset: int) -> str:
    n = int(output_bits(form)[0][1:])
    return f"Y = Concat <axis: int = @dim> ({', '.join(f'X{i}' for i in range(n))})\n"


CASES = (
    Case(name="cat", make=lambda: lambda x, y: torch.cat([x, y], 1), shapes=((2, 3, 10), (2, 5, 10))),
    Case(
        name="cat-last",
        make=lambda: lambda x, y, z: torch.cat((x, y, z), dim=-1),
        shapes=((2, 3, 4), (2, 3, 5), (2, 3, 6)),
    ),
    Case(name="cat-one", make=lambda: lambda x: torch.cat([x], 1), shapes=((2, 3, 10),)),
    Case(name="stack", make=lambda: lambda x, y: torch.stack([x, y], dim=1), shapes=((2, 3, 10), (2, 3, 10))),
)

OPS = (
    Op(name="iqCat", run=run, body=body, real=real, integer=CatSite, site="iqcat",
       calls=(torch.cat, torch.concat, torch.concatenate, torch.stack), aliases=("QCat",)),
)  # fmt: skip
