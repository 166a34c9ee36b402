"""Softmax, softmin and log-softmax over one dimension, in the chip's own integers.

    z = sat32(rsh(x, q_x - 25)),  d = z - max z over the row                      Q25                  (1)
    p = softmax of z                                                              Q15                  (2)
    l = ln p  or  rsh(d, 10) - ln(sum of e^d), whichever the chip has             Q25 or Q15           (3)
    out = sat(rsh(p, 15 - q_o)),  sat(rsh(l, fraction - q_o))                                          (4)

``ops/_softmax`` holds the arithmetic of (2) and (3). Softmin is softmax of sat(-x).

- The sum saturates at 256 (2^31 - 1 in Q23), so a row whose sum of e^d exceeds it comes out too large: for instance more
  than 255 elements that are nearly the row's maximum. ``saturating_rows`` finds such rows. Where a chip has log-softmax
  from the sum, that sum does not saturate.
- Log-softmax as ln p: what is less probable than 2^-16 has p = 0, and ln 0 is -64. The output range therefore never
  follows anything below ln(2^-15) = -10.4, the lowest logarithm of a p > 0.
- The output grid follows the largest probability seen, and is never finer than p itself (2^15). A fixed 2^7 would hold the
  same range, but would be all zeros for rows of more than 256 equal scores; where a probability near 1 was seen the
  observed grid is 2^7 too.
- A masked score is an integer like any other: minus infinity is the lowest level of the scores' grid, and it weighs
  e^(lowest - max). Rows in which all scores saturate, at either end, are uniform.

The gradient is that of the float function at the fake-quantized input, zero where the output saturates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linger import observe
from linger.errors import LingerError
from linger.numerics import Grid, exponent, fake_quant, grid_of, int_dtype, levels, saturate, set_grid, shift_round
from linger.ops import _softmax as chip_math
from linger.ops._base import Op
from linger.ops._case import Case
from linger.ops._lowered import Lowered, Operand
from linger.ops._site import Site, constant_operand
from linger.ops._softmax_body import body_log, body_softmax, real_log, real_softmax
from linger.steps import piecewise
from linger.targets import TARGETS, Softmax, known
from linger.targets._softmax import EXP_OF_0, HIGHEST

WIDEST = 16  # bits of the input
LEAST = 15 * float(np.log(2))  # -ln of the smallest probability above 0
FAR = 40  # a shift that leaves nothing of an int32


class _Result(torch.autograd.Function):
    """saturate(integers) / scale with the gradient of the float function at ``x``, zero where it saturates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, integers: Tensor, scale: Tensor, bits: int, dim: int, log: bool) -> Tensor:
        q = integers.clamp(-levels(bits) - 1, levels(bits))
        ctx.save_for_backward(x, q == integers)
        ctx.dim, ctx.log = dim, log
        return q.float().div_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        x, inside = ctx.saved_tensors
        g, p = grads[0] * inside, torch.softmax(x, ctx.dim)
        if ctx.log:
            return g - p * g.sum(ctx.dim, keepdim=True), None, None, None, None, None
        return p * (g - (g * p).sum(ctx.dim, keepdim=True)), None, None, None, None, None


def look_up(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.flatten()).view(index.shape)


def computes(x: Tensor, table: int) -> bool:
    """Whether a function of every element costs less than its table; while compiling, sizes are not looked at."""
    return not torch.compiler.is_compiling() and x.numel() < table


def halfway(weight: Tensor) -> Tensor:
    """What floor(v * weight + .) adds for floor(v + 1/2) rounded half up again at a scale of ``weight``, at most 1."""
    return 0.5 * weight + 0.5 * (weight < 1)


class SoftmaxSite(Site):
    """``torch.softmax``"""

    op_type: ClassVar[str] = "SoftmaxInt"
    negates: ClassVar[bool] = False
    log: ClassVar[bool] = False

    @classmethod
    def takes(cls, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> bool:
        """A result of another type than float32 is computed in float."""
        return dtype in (None, torch.float32)

    def operand_bits(self, bits: Sequence[int]) -> int:
        return min(super().operand_bits(bits), WIDEST)

    def chosen(self) -> Softmax:
        """The chip's variant."""
        return known(self.chip).softmax

    def forward(self, x: Tensor, dim: int | None = None, **_: Any) -> Tensor:
        bits = self.out_bits = self.operand_bits([g.bits for g in [grid_of(x)] if g is not None])
        axis = row_axis(x.dim(), dim)
        x, scale = self.operand(x, "x", bits)
        x = fake_quant(-x, scale, bits) if self.negates else x
        with torch.no_grad():
            integers, s_o = self.integers(x, scale, axis, bits)
        return set_grid(_Result.apply(x, integers, s_o, bits, axis, self.log), Grid(s_o, bits))

    def integers(self, x: Tensor, scale: Tensor, axis: int, bits: int) -> tuple[Tensor, Tensor]:
        """Equation (4) before it saturates, and the output scale."""
        if not x.shape[axis]:  # rows without elements
            return x.clone(), self.output_scale(x, bits)
        k, scale = chip_math.distances(x, scale, axis, bits)
        d = chip_math.arguments(scale, bits)
        if computes(k, d.numel()):
            y = chip_math.torch_exp(look_up(d, k), self.chosen()).double()
        else:
            y = look_up(chip_math.torch_exp(d, self.chosen()).double(), k)
        return self.finish(y, y.sum(axis, keepdim=True), d, k, axis, bits)

    def finish(self, y: Tensor, s: Tensor, d: Tensor, k: Tensor, axis: int, bits: int) -> tuple[Tensor, Tensor]:
        """From the exponentials ``y`` of d[k] and their sums ``s``."""
        r = chip_math.torch_reciprocal(s.clamp(max=HIGHEST).long(), self.chosen())
        if observe.watcher() is not None:
            self.watch("o", y * r / 2.0**15)
        s_o = self.output_scale((r * EXP_OF_0 + 0.5).floor() / 2.0**15, bits)
        weight = s_o.double() / 2.0**15
        return y.mul_(r * weight).add_(halfway(weight)).floor_(), s_o

    def output_scale(self, extreme: Tensor, bits: int) -> Tensor:
        """From the running maximum of each row's result that is farthest from 0."""
        self.observe("o", extreme)
        return self.scale("o", bits)

    def scale(self, name: str, bits: int) -> Tensor:
        """That of the output is never finer than what the chip computes."""
        scale = super().scale(name, bits)
        return scale.clamp(max=2.0 ** self.fraction()) if name == "o" else scale

    def fraction(self) -> int:
        """Fraction bits of the result before it is brought to the output grid."""
        return self.chosen().log_fraction if self.log else 15

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        x = operands[0]
        rank = len(x.shape)
        axis = row_axis(rank, call.get("dim")) - rank
        attrs = {"scale_x": x.scale, "scale_o": out.scale, "data_bits": x.bits, "o_bits": out.bits}
        attrs |= {"axis": axis, "dim": axis}
        platform = known(self.chip).platform
        form = f"{platform} {exponent(x.scale)} {exponent(out.scale)} {x.bits} {out.bits} {axis}"
        source: int | str = "%0" if self.negates else 0
        node = Lowered(op_type=self.op_type, inputs=(source,), attrs=attrs, bits=out.bits, form=form)
        return (negation(x), node) if self.negates else (node,)


class SoftminSite(SoftmaxSite):
    """``F.softmin``"""

    negates = True


class LogSoftmaxSite(SoftmaxSite):
    """``torch.log_softmax``"""

    op_type = "LogSoftmaxInt"
    log = True

    def finish(self, y: Tensor, s: Tensor, d: Tensor, k: Tensor, axis: int, bits: int) -> tuple[Tensor, Tensor]:
        chip = self.chosen()
        s_o = self.output_scale(self.extreme(d, k, s, axis, bits) if self.training else s, bits)
        weight = s_o.double() / 2.0**chip.log_fraction
        if chip.log_of_sum:
            ln = chip_math.torch_ln_sum(s.long())
            y = look_up(chip_math.rounded_shift(d, 10).double(), k).sub_(ln)
            return y.mul_(weight).add_(0.5).floor_(), s_o
        r = chip_math.torch_reciprocal(s.clamp(max=HIGHEST).long(), chip)
        p = y.mul_(r).add_(0.5).long()
        if computes(p, 2**15):
            return (chip_math.torch_ln_probability(p) * weight).add_(0.5).floor_(), s_o
        every = torch.arange(2**15 + 1, device=p.device)
        return look_up((chip_math.torch_ln_probability(every) * weight).add_(0.5).floor_(), p), s_o

    def extreme(self, d: Tensor, k: Tensor, s: Tensor, axis: int, bits: int) -> Tensor:
        """The float function's lowest value in each row, as far as the chip can say it."""
        farthest = k.amax(axis, keepdim=True) & (2**bits - 1)
        low = look_up(d, farthest) / 2.0**25 - torch.log(s / 2.0**23)
        return low if self.chosen().log_of_sum else low.clamp(min=-LEAST)


def row_axis(rank: int, dim: int | None) -> int:
    """The dimension as 0 .. rank - 1; where none is given, the one that ``F.softmax`` takes.

    Raises:
        LingerError: there is no such dimension.
    """
    if rank == 0:
        raise LingerError("found a tensor without dimensions, allowed are tensors with at least one; use x.reshape(1)")
    axis = (0 if rank in (1, 3) else 1) if dim is None else int(dim)
    if not -rank <= axis < rank:
        raise LingerError(f"dim is {dim}, allowed are {-rank} to {rank - 1} for {rank} dimensions; pass one of them")
    return axis % rank


def negation(x: Operand) -> Lowered:
    """sat(-x) as a product with -1."""
    value, scale = constant_operand(-1.0, 8)
    attrs = {"scale_x": x.scale, "scale_y": scale, "scale_o": x.scale, "data_bits": 8, "o_bits": x.bits}
    form = "" if x.bits == 8 else f"_o{x.bits}"
    return Lowered(op_type="iqMul", inputs=(0, "value"), attrs=attrs, params={"value": value}, bits=x.bits, form=form)


def run_softmax(
    x: np.ndarray, *, scale_x: float, scale_o: float, axis: int | None = None, dim: int = -1, platform: str = "venus",
    o_bits: int = 0, **_: Any,
) -> np.ndarray:  # fmt: skip
    """x int8 or int16 of any shape -> the same shape in ``o_bits`` bits; equations (1), (2), (4) over ``axis``."""
    bits = o_bits or 8 * x.dtype.itemsize
    if x.size == 0:
        return x.astype(int_dtype(bits))
    chip = known(platform.lower()).softmax
    p = chip_math.probability(piecewise(chip_math.argument)(x, scale_x=scale_x), dim if axis is None else axis, chip)
    return saturate(shift_round(p, min(15 - exponent(scale_o), FAR)), bits)


def run_log(
    x: np.ndarray, *, scale_x: float, scale_o: float, axis: int | None = None, dim: int = -1, platform: str = "venus",
    o_bits: int = 0, **_: Any,
) -> np.ndarray:  # fmt: skip
    """x int8 or int16 of any shape -> the same shape in ``o_bits`` bits; equations (1), (3), (4) over ``axis``."""
    bits = o_bits or 8 * x.dtype.itemsize
    if x.size == 0:
        return x.astype(int_dtype(bits))
    chip = known(platform.lower()).softmax
    y = chip_math.log_probability(
        piecewise(chip_math.argument)(x, scale_x=scale_x), dim if axis is None else axis, chip
    )
    return saturate(shift_round(y, min(chip.log_fraction - exponent(scale_o), FAR)), bits)


def saturating_rows(x: np.ndarray, scale_x: float, axis: int = -1, platform: str = "venus") -> np.ndarray:
    """Which rows of integers at ``scale_x`` have a sum of e^d above 256, where the chip's probabilities are too large.

    Returns:
        bool of the shape of ``x`` without ``axis``.
    """
    z = chip_math.argument(x, scale_x)
    e = chip_math.exp(z - z.max(axis, keepdims=True, initial=-(2**31)), known(platform.lower()).softmax)
    return e.sum(axis) > HIGHEST  # type: ignore[no-any-return]


FUNCTION, METHOD = ("dim", "_stacklevel", "dtype"), ("dim", "dtype")
CHIPS = tuple(TARGETS)

CASES = (
    Case(name="softmax", make=lambda: lambda x: torch.softmax(x, -1), shapes=((2, 3, 20),), targets=CHIPS),
    Case(name="softmax-axis-1", make=lambda: lambda x: x.softmax(1), shapes=((2, 7, 3, 4),)),
    Case(name="softmax-2d", make=lambda: nn.Softmax2d(), shapes=((2, 3, 5, 4),)),
    Case(name="softmin", make=lambda: nn.Softmin(dim=1), shapes=((2, 20),)),
    Case(name="log-softmax", make=lambda: nn.LogSoftmax(dim=-1), shapes=((2, 3, 20),), targets=CHIPS),
    Case(name="log-softmax-axis-1", make=lambda: lambda x: x.log_softmax(1), shapes=((2, 7, 3, 4),)),
)

OPS = (
    Op(name="SoftmaxInt", run=run_softmax, body=body_softmax, real=real_softmax, half_up=True, integer=SoftmaxSite, site="SoftmaxInt",
       calls=(torch.softmax, Tensor.softmax, F.softmax, torch.special.softmax), aliases=("QSoftmax",), modules=(nn.Softmax, nn.Softmax2d),
       names={F.softmax: FUNCTION} | dict.fromkeys((torch.softmax, Tensor.softmax, torch.special.softmax), METHOD)),
    Op(name="softmin", run=run_softmax, body=body_softmax, real=real_softmax, half_up=True, integer=SoftminSite, site="softmin",
       calls=(F.softmin,), modules=(nn.Softmin,), names={F.softmin: FUNCTION}),
    Op(name="LogSoftmaxInt", run=run_log, body=body_log, real=real_log, half_up=True, integer=LogSoftmaxSite, site="LogSoftmaxInt",
       calls=(torch.log_softmax, Tensor.log_softmax, F.log_softmax, torch.special.log_softmax), modules=(nn.LogSoftmax,),
       names={F.log_softmax: FUNCTION} | dict.fromkeys((torch.log_softmax, Tensor.log_softmax, torch.special.log_softmax), METHOD)),
)  # fmt: skip
