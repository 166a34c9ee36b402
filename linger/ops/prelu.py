"""PReLU: the negative side times a learned slope on its own grid, one slope for all or one per channel.

acc = q * 2^n for q >= 0, q * q_w for q < 0,  n = log2 s_w, 0 <= n <= 15                           (1)
out = sat( rsh(acc, log2(s_x * s_w / s_o)) ),  s_o <= s_x * s_w                                    (2)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linger.errors import LingerError
from linger.numerics import (
    bound_parameter,
    exponent,
    fake_quant,
    levels,
    quantize,
    reach,
    saturate,
    scale_from_weight,
    shift_round,
)
from linger.ops._base import IntModule, Op, output_bits
from linger.ops._case import Case, Holder
from linger.ops._constant import constant_of
from linger.ops._lowered import Lowered, Operand
from linger.ops._normalize import Normalized
from linger.ops._site import Site
from linger.ops._weighted import room_for_sum
from linger.ops._weighted_text import result_text
from linger.rounding import HALF_UP

FINEST = 2.0**15  # s_w at most: finer slopes change no 16-bit result


class _Slopes(IntModule):
    """Equations (1) and (2) on slopes that are handed in."""

    weighted = True
    op_type = "PReLUInt"

    def placed(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The slopes on their grid, and its scale: never below 1, so that slopes beyond 127 saturate in 8 bits."""
        weight = bound_parameter(weight.float(), self.normalize_weight)
        s_w = scale_from_weight(weight, self.parameter_bits).clamp(1.0, FINEST)
        return fake_quant(weight, s_w, self.parameter_bits), s_w

    def sloped(self, x: Tensor, weight: Tensor) -> Tensor:
        channels = x.shape[1] if x.dim() > 1 else 1
        if weight.numel() not in (1, channels):
            raise LingerError(f"found an input of {channels} channels, allowed are {weight.numel()}; give as many")
        x, s_x = self.enter(x)
        w, s_w = self.placed(weight)
        finest = s_x * s_w
        if self.out_bits == 32:
            finest = room_for_sum(finest, self.bound(w, s_w))
        if self.data_bits > 8 or self.parameter_bits > 8:
            x, w = x.double(), w.double()
        return self.leave(F.prelu(x, w), finest)

    def bound(self, w: Tensor, s_w: Tensor) -> Tensor:
        """max|acc|, 0-d."""
        return reach(self.data_bits) * s_w * w.detach().abs().amax().clamp_min(1)

    @torch.no_grad()
    def nodes(self, x: Operand, out: Operand, weight: Tensor) -> tuple[Lowered, ...]:
        """The node that computes the same integers."""
        w, s_w = self.placed(weight)
        attrs = {
            "data_bits": x.bits, "parameter_bits": self.parameter_bits, "o_bits": out.bits,
            "scale_x": x.scale, "scale_w": float(s_w), "scale_o": out.scale,
        }  # fmt: skip
        params = {"weight": quantize(w, s_w, self.parameter_bits)}
        form = f"r{len(x.shape)}" + ("" if out.bits == 8 else f"_o{out.bits}")
        peak = float(self.bound(w, s_w))
        return (
            Lowered(
                op_type=self.op_type, inputs=(0, "weight"), attrs=attrs, params=params, bits=out.bits, form=form, peak=peak
            ),
        )  # fmt: skip


class PReLUInt(_Slopes, nn.PReLU):
    """``torch.nn.PReLU`` in fixed point."""

    def forward(self, x: Tensor) -> Tensor:
        return self.sloped(x, self.weight)

    @torch.no_grad()
    def accumulator_peak(self, s_x: Tensor) -> float:
        return float(self.bound(*self.placed(self.weight)))

    @torch.no_grad()
    def derived(self) -> dict[str, Tensor]:
        s_w = self.placed(self.weight)[1]
        return super().derived() | {"scale_w": s_w, "running_w": levels(self.parameter_bits) / s_w}

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        return self.nodes(operands[0], out, self.weight)


class PReLUSite(_Slopes, Site):
    """``F.prelu`` with slopes that are parameters of the net, or computed from some. Widths are those given to ``init``."""

    observed: ClassVar[tuple[str, ...]] = ("x", "o")
    parameter_names: ClassVar[tuple[str, ...]] = ("weight",)

    @classmethod
    def takes(cls, x: Any, weight: Any = None, **call: Any) -> bool:
        return constant_of(weight) is not None and not call

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.sloped(x, weight)

    def operand_bits(self, bits: Sequence[int]) -> int:
        return self.data_bits

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        return self.nodes(operands[0], out, call["weight"])


class NormalizePReLU(Normalized, nn.PReLU):
    """``torch.nn.PReLU`` whose slopes and output stay within bounds."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bound_output(F.prelu(x, bound_parameter(self.weight, self.normalize_weight)))


def run(
    x: np.ndarray, w: np.ndarray, *, scale_x: float, scale_w: float, scale_o: float, o_bits: int = 8,
    rounding: str = HALF_UP, **_: Any,
) -> np.ndarray:  # fmt: skip
    """x (N, C, *) or any shape, w (C) or (1); equations (1), (2)."""
    slope = w.astype(np.int64).reshape((1, -1) + (1,) * (x.ndim - 2)) if len(w) > 1 else w.astype(np.int64)
    q, n = x.astype(np.int64), exponent(scale_w)
    acc = np.where(q < 0, q * slope, q << n)
    return saturate(shift_round(acc, exponent(scale_x) + n - exponent(scale_o), rounding), o_bits)


def _slopes(form: str, source: str) -> str:
    """The slopes with the rank of the input: one per channel, or one in all."""
    rank = int(output_bits(form)[0][1:])
    shape = ", ".join(["1", "-1"][:rank] + ["1"] * (rank - 2))
    return f"s = Constant <value = int64[{rank}] {{{shape}}}> ()\nWr = Reshape ({source}, s)\n"


def body(form: str, opset: int, rounding: str = HALF_UP) -> tuple[str, str]:
    text = "Xd = Cast <to: int = 11> (X)\nWd = Cast <to: int = 11> (W)\n" + _slopes(form, "Wd")
    text += "z = Constant <value = double {0.0}> ()\nu = Constant <value_float: float = @scale_w> ()\n"
    text += "ud = Cast <to: int = 11> (u)\nN = Min (Xd, z)\nP = Max (Xd, z)\nNw = Mul (N, Wr)\nPw = Mul (P, ud)\n"
    return "X, W", text + result_text("Add (Nw, Pw)", True, output_bits(form)[1], rounding=rounding)


def real(form: str, opset: int) -> str:
    return _slopes(form, "W") + "Y = PRelu (X, Wr)\n"


def _slopes_of(count: int) -> nn.PReLU:
    layer = nn.PReLU(count)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-0.5, 1.4, count))
    return layer


_CALLS = (F.prelu, torch.prelu, Tensor.prelu)

CASES = (
    Case(name="prelu", make=lambda: nn.PReLU(), shapes=((2, 60),)),
    Case(name="prelu-channels", make=lambda: _slopes_of(4), shapes=((2, 4, 5, 3),)),
    Case(name="prelu-features", make=lambda: _slopes_of(30), shapes=((4, 30),)),
    Case(name="call-prelu", make=lambda: Holder(lambda x, w: F.prelu(x, w), (4,)), shapes=((2, 4, 5, 3),)),
)

OPS = (
    Op(name="PReLUInt", run=run, body=body, real=real, integer=PReLUInt, floats=(nn.PReLU,), normalized=NormalizePReLU),
    Op(name="prelu", run=run, body=body, real=real, integer=PReLUSite, site="iqprelu", calls=_CALLS,
       names=dict.fromkeys(_CALLS, ("weight",))),
)  # fmt: skip
