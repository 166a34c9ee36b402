"""Sum and mean over dimensions.

iqSum   out = sat( rsh( sum of x, log2(s_x / s_o) ) ),  s_o <= s_x                                 (1)
iqMean  out = sat( D(sum of x, k) ), s_o = s_x, D as in average pooling (``engine`` 3)             (2)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linger.numerics import Grid, exponent, rounded_mean, saturate, set_grid, shift_round, straight_through
from linger.ops._base import Op, constants, output_bits, requant_text
from linger.ops._case import Case
from linger.ops._lowered import Lowered, Operand
from linger.ops._site import Site
from linger.ops.pool import divided, division_text, pool_node, ties_away
from linger.rounding import HALF_UP


def _dims(rank: int, dim: Any) -> tuple[int, ...]:
    """The reduced dimensions, non-negative and sorted; all of them for None and ()."""
    given = range(rank) if dim is None or dim == () else (dim,) if isinstance(dim, int) else tuple(dim)
    return tuple(sorted([int(d) % max(rank, 1) for d in given]))


class _ReduceSite(Site):
    op_type: str

    @classmethod
    def takes(cls, *args: Any, dtype: Any = None, **call: Any) -> bool:
        return dtype in (None, torch.float32)

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        dims = _dims(len(operands[0].shape), call.get("dim"))
        return self.nodes(operands[0], out, dims, bool(call.get("keepdim", False)))

    def nodes(self, x: Operand, out: Operand, dims: tuple[int, ...], keepdim: bool) -> tuple[Lowered, ...]:
        raise NotImplementedError

    def node(self, x: Operand, out: Operand, dims: tuple[int, ...], keepdim: bool, form: str) -> tuple[Lowered, ...]:
        attrs = {
            "dims": dims, "keepdim": int(keepdim), "scale_x": x.scale, "scale_o": out.scale,
            "data_bits": x.bits, "o_bits": out.bits,
        }  # fmt: skip
        form += "" if out.bits == 8 else f"_o{out.bits}"
        return (Lowered(op_type=self.op_type, inputs=(0,), attrs=attrs, bits=out.bits, form=form),)


class SumSite(_ReduceSite):
    """``x.sum(dim, keepdim)``"""

    op_type = "iqSum"

    def forward(self, x: Tensor, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
        self.out_bits = bits = self.width(x)
        x, s_x = self.operand(x, "x", bits)
        dims = _dims(x.dim(), dim)
        terms = math.prod([x.shape[d] for d in dims])
        finest = s_x if bits < 32 else s_x / 2.0 ** (terms - 1).bit_length()
        return self.leave(x.double().sum(dims, keepdim), finest)

    def nodes(self, x: Operand, out: Operand, dims: tuple[int, ...], keepdim: bool) -> tuple[Lowered, ...]:
        return self.node(x, out, dims, keepdim, "")


class MeanSite(_ReduceSite):
    """``x.mean(dim, keepdim)``"""

    op_type = "iqMean"
    observed = ()

    def forward(self, x: Tensor, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
        bits = self.width(x)
        x, scale = self.operand(x, "x", bits)
        dims = _dims(x.dim(), dim)
        mean = x.mean(dims, keepdim)
        total = x.detach().double().sum(dims, keepdim) * scale.double()
        area = math.prod([x.shape[d] for d in dims])
        return set_grid(
            straight_through(mean, divided(total, area, self.rounding), scale.double(), bits), Grid(scale, bits)
        )

    def nodes(self, x: Operand, out: Operand, dims: tuple[int, ...], keepdim: bool) -> tuple[Lowered, ...]:
        if len(x.shape) == 4 and dims == (2, 3):
            pooled = pool_node(x, x.shape[2:], x.shape[2:], (0, 0))
            if keepdim:
                return (pooled,)
            return (pooled, Lowered(op_type="Squeeze", inputs=("%0",), attrs={"axes": (2, 3)}, bits=x.bits))
        area = math.prod([x.shape[d] for d in dims])
        return self.node(x, out, dims, keepdim, f"k{area}")


def run_sum(
    x: np.ndarray, *, dims: tuple[int, ...], keepdim: int = 0, scale_x: float, scale_o: float, o_bits: int = 0,
    rounding: str = HALF_UP, **_: Any,
) -> np.ndarray:  # fmt: skip
    """Equation (1)."""
    total = x.astype(np.int64).sum(axis=tuple(dims), keepdims=bool(keepdim))
    return saturate(shift_round(total, exponent(scale_x) - exponent(scale_o), rounding), o_bits or 8 * x.dtype.itemsize)


def run_mean(
    x: np.ndarray, *, dims: tuple[int, ...], keepdim: int = 0, o_bits: int = 0, rounding: str = HALF_UP, **_: Any
) -> np.ndarray:
    """Equation (2)."""
    total = x.astype(np.int64).sum(axis=tuple(dims), keepdims=bool(keepdim))
    k = math.prod([x.shape[d] for d in dims])
    return saturate(rounded_mean(total, k, ties_away(k), rounding), o_bits or 8 * x.dtype.itemsize)


def _reduced(source: str, result: str, opset: int, op: str = "ReduceSum", since: int = 13) -> str:
    """A reduction over ``@dims``; before opset ``since`` the axes are an attribute."""
    if opset < since:
        return f"{result} = {op} <axes: ints = @dims, keepdims: int = @keepdim> ({source})\n"
    return f"ax = Constant <value_ints: ints = @dims> ()\n{result} = {op} <keepdims: int = @keepdim> ({source}, ax)\n"


def body_sum(form: str, opset: int, rounding: str = HALF_UP) -> tuple[str, str]:
    _, bits = output_bits(form)
    text = constants(sx="@scale_x", so="@scale_o") + "mf = Div (so, sx)\nm = Cast <to: int = 11> (mf)\n"
    text += "Xd = Cast <to: int = 11> (X)\n" + _reduced("Xd", "S", opset)
    return "X", text + requant_text("S", "m", "Y", bits, double=True, rounding=rounding)


def body_mean(form: str, opset: int, rounding: str = HALF_UP) -> tuple[str, str]:
    base, bits = output_bits(form)
    k = int(base[1:])
    text = "Xd = Cast <to: int = 11> (X)\n" + _reduced("Xd", "S", opset)
    return "X", text + division_text("S", k, bits, rounding)


NAMES = ("dim", "keepdim")

CASES = (
    Case(name="sum", make=lambda: lambda x: x.sum(1), shapes=((4, 6, 10),)),
    Case(name="sum-keepdim", make=lambda: lambda x: torch.sum(x, (1, 3), keepdim=True), shapes=((2, 6, 5, 4),)),
    Case(name="sum-negative", make=lambda: lambda x: x.sum(dim=-1), shapes=((4, 6, 10),)),
    Case(name="mean-pool", make=lambda: lambda x: x.mean((2, 3)), shapes=((2, 5, 6, 4),)),
    Case(name="mean-pool-keepdim", make=lambda: lambda x: x.mean([-1, -2], keepdim=True), shapes=((2, 5, 7, 7),)),
    Case(name="mean-10", make=lambda: lambda x: torch.mean(x, 1), shapes=((4, 10, 9),)),
    Case(name="mean-16", make=lambda: lambda x: x.mean(-1, True), shapes=((4, 3, 16),)),
    Case(name="mean-6", make=lambda: lambda x: x.mean(dim=(1, 2)), shapes=((40, 2, 3),)),
)

OPS = (
    Op(name="iqSum", run=run_sum, body=body_sum, real=lambda form, opset: _reduced("X", "Y", opset), integer=SumSite, site="iqsum", calls=(torch.sum, Tensor.sum),
       names={torch.sum: NAMES, Tensor.sum: NAMES}),
    Op(name="iqMean", run=run_mean, body=body_mean, real=lambda form, opset: _reduced("X", "Y", opset, "ReduceMean", 18), integer=MeanSite, site="iqmean", calls=(torch.mean, Tensor.mean),
       names={torch.mean: NAMES, Tensor.mean: NAMES}),
)  # fmt: skip
