"""Linear: integer product with the transposed weight, any number of leading dimensions.

acc = x @ w.T + b,   out = saturate(shift_round(acc, log2(s_x * s_w / s_o)))                       (1)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from linger.numerics import exact_matmul
from linger.ops._base import Op, output_bits
from linger.ops._case import Case
from linger.ops._normalize import Normalized
from linger.ops._weighted import WeightedInt, requantize, result_text


class LinearInt(WeightedInt, nn.Linear):
    """``torch.nn.Linear`` in fixed point."""

    op_type = "LinearInt"

    def accumulate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


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
    **_: Any,
) -> np.ndarray:
    """x (..., K), w (N, K), b (N) int32 -> (..., N); equation (1)."""
    acc = exact_matmul(x, w.T)
    if b is not None:
        acc = acc + b.astype(np.int64)
    return requantize(acc, scale_x, scale_w, scale_o, o_bits)


def body(form: str, opset: int) -> tuple[str, str]:
    base, bits = output_bits(form)
    double = base == "f64"
    to = 11 if double else 1
    text = "".join(f"{name}f = Cast <to: int = {to}> ({name})\n" for name in ("X", "W", "B"))
    text += "Wt = Transpose <perm: ints = [1, 0]> (Wf)\nP = MatMul (Xf, Wt)\n"
    return "X, W, B", text + result_text("Add (P, Bf)", double, bits)


def real(form: str, opset: int) -> str:
    return "Wt = Transpose <perm: ints = [1, 0]> (W)\nP = MatMul (X, Wt)\nY = Add (P, B)\n"


CASES = (
    Case(name="linear", make=lambda: nn.Linear(37, 10), shapes=((5, 37),)),
    Case(name="linear-3d", make=lambda: nn.Linear(16, 6, bias=False), shapes=((2, 7, 16),)),
    Case(name="linear-4d", make=lambda: nn.Linear(8, 5), shapes=((2, 3, 4, 8),)),
    Case(name="linear-K4608", make=lambda: nn.Linear(4608, 3), shapes=((4, 4608),)),
)

OPS = (
    Op(name="LinearInt", run=run, body=body, real=real, integer=LinearInt, floats=(nn.Linear,), normalized=NormalizeLinear,
       aliases=("QLinear",)),
)  # fmt: skip
