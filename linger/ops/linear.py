"""Linear: integer product with the transposed weight, any number of leading dimensions.

    acc = x @ w.T + b,   out = saturate(shift_round(acc, log2(s_x * s_w / s_o)))                       (1)

``F.linear`` with parameters of the net is the same node. With a weight that the forward computes from its inputs it is a
product of two activations (``bmm``) and a sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from linger.numerics import exact_matmul
from linger.ops._base import Op, output_bits
from linger.ops._case import Case, Holder
from linger.ops._composed import Composed, Router
from linger.ops._constant import constant_of
from linger.ops._lowered import Operand
from linger.ops._normalize import Normalized
from linger.ops._weighted import WeightedInt, WeightedSite, requantize
from linger.ops._weighted_text import result_text
from linger.rounding import HALF_UP


class _Linear:
    """``Product`` of a linear layer."""

    groups = 1
    transposed = False

    def accumulate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def absolute_sum(self, weight: Tensor) -> Tensor:
        return weight.abs().sum(1)

    def attrs(self, weight: tuple[int, ...], x: Operand) -> dict[str, Any]:
        return {}

    def wide_form(self, weight: tuple[int, ...], data_bits: int, parameter_bits: int) -> str:
        return "f64"


LINEAR = _Linear()


class LinearInt(WeightedInt, nn.Linear):
    """``torch.nn.Linear`` in fixed point."""

    op_type = "LinearInt"

    def product(self) -> _Linear:
        return LINEAR


class LinearSite(WeightedSite):
    """``F.linear`` with a weight of the net, shape (out, in), and a bias of the net or none."""

    op_type = "LinearInt"

    @classmethod
    def takes(cls, x: Any, weight: Any = None, bias: Any = None, **call: Any) -> bool:
        return super().takes(x, weight, bias) and weight.dim() == 2

    @staticmethod
    def product(weight: tuple[int, ...], call: Mapping[Any, Any]) -> _Linear:
        return LINEAR


def linear(route: Router, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` in calls that have a fixed-point form."""
    if LinearSite.takes(x, weight):
        if bias is None or constant_of(bias) is not None:
            return route(F.linear, x, weight, bias)
        return route(F.linear, x, weight, None) + bias
    y = torch.matmul(x, weight.transpose(-2, -1) if weight.dim() > 1 else weight)
    return y if bias is None else y + bias


class NormalizeLinear(Normalized, nn.Linear):
    """``torch.nn.Linear`` whose weight, bias and output stay within bounds."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.bounded()
        return self.bound_output(F.linear(x, weight, bias))


def run(
    x: np.ndarray,
    w: np.ndarray,
    b: np.ndarray | None = None,
    *,
    scale_x: float,
    scale_w: float,
    scale_o: float,
    o_bits: int = 8,
    rounding: str = HALF_UP,
    **_: Any,
) -> np.ndarray:
    """x (..., K), w (N, K), b (N) int32 -> (..., N); equation (1)."""
    acc = exact_matmul(x, w.T)
    if b is not None:
        acc += b.astype(np.int64)
    return requantize(acc, scale_x, scale_w, scale_o, o_bits, rounding)


def body(form: str, opset: int, rounding: str = HALF_UP) -> tuple[str, str]:
    base, bits = output_bits(form)
    double = base == "f64"
    to = 11 if double else 1
    text = "".join(f"{name}f = Cast <to: int = {to}> ({name})\n" for name in ("X", "W", "B"))
    text += "Wt = Transpose <perm: ints = [1, 0]> (Wf)\nP = MatMul (Xf, Wt)\n"
    return "X, W, B", text + result_text("Add (P, Bf)", double, bits, rounding=rounding)


def real(form: str, opset: int) -> str:
    return "Wt = Transpose <perm: ints = [1, 0]> (W)\nP = MatMul (X, Wt)\nY = Add (P, B)\n"


CASES = (
    Case(name="linear", make=lambda: nn.Linear(37, 10), shapes=((5, 37),)),
    Case(name="linear-3d", make=lambda: nn.Linear(16, 6, bias=False), shapes=((2, 7, 16),)),
    Case(name="linear-4d", make=lambda: nn.Linear(8, 5), shapes=((2, 3, 4, 8),)),
    Case(name="linear-K4608", make=lambda: nn.Linear(4608, 3), shapes=((4, 4608),)),
    Case(
        name="call-linear",
        make=lambda: Holder(lambda x, w, b: F.linear(x, w, b), (6, 16), (6,)),
        shapes=((2, 7, 16),),
    ),
    Case(
        name="call-linear-K4608",
        make=lambda: Holder(lambda x, w: F.linear(x, weight=w), (3, 4608)),
        shapes=((4, 4608),),
    ),
    Case(
        name="call-linear-two",
        make=lambda: lambda x, y: F.linear(x, y.sum(0), y.sum((0, 2))),
        shapes=((2, 5, 9), (2, 4, 9)),
    ),
    Case(
        name="call-linear-computed",
        make=lambda: Holder(lambda x, w, b: F.linear(x, torch.cat([w, w * 2])[1:], b.exp()), (3, 8), (5,)),
        shapes=((3, 8),),
    ),
)

OPS = (
    Op(name="LinearInt", run=run, body=body, real=real, integer=LinearInt, floats=(nn.Linear,), normalized=NormalizeLinear,
       aliases=("QLinear",)),
    Op(name="out_proj", run=run, body=body, real=real, integer=LinearInt, floats=(NonDynamicallyQuantizableLinear,)),
    Op(name="linear", run=run, body=body, real=real, integer=LinearSite, site="linear", calls=(F.linear,),
       names={F.linear: ("weight", "bias")}),
)  # fmt: skip

COMPOSED = {F.linear: Composed(function=linear, tag="linear", layer=True)}
