"""ReLU6: a clamp on the input's own grid, out = min(max(q, 0), min(round(6 * s_x), B)).            (1)

The file carries a Clip with a body: behind a Relu, ONNX Runtime cannot fuse a standard one on int8. The engine loses a Clip behind a convolution (``engine`` 6.9): ``check`` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linger.numerics import Grid, fake_quant, int_dtype, quantize_number, set_grid
from linger.ops._base import ONNX_INT, IntModule, Op, real_text
from linger.ops._case import Case
from linger.ops._lowered import Lowered, Operand
from linger.ops._site import Site


class _Clip(torch.autograd.Function):
    """min(max(x, 0), top), with ReLU6's gradient: zero at 0 and at 6 too, where values on a grid often are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, top: Tensor) -> Tensor:
        y = torch.minimum(x.clamp_min(0), top)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return torch.where((y > 0) & (y < 6), grads[0], 0), None


def clipped(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Equation (1); the gradient is that of ReLU6."""
    top = fake_quant(scale.new_full((), 6.0), scale, bits)
    return set_grid(_Clip.apply(x, top), Grid(scale, bits))


class _ClipInt(IntModule):
    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        x = operands[0]
        top = quantize_number(6, x.scale, x.bits)
        params = {"min_thresh": np.array(0, int_dtype(x.bits)), "max_thresh": np.array(top, int_dtype(x.bits))}
        return (
            Lowered(
                op_type="Clip",
                inputs=(0, "min_thresh", "max_thresh"),
                attrs={},
                params=params,
                bits=x.bits,
                form=str(x.bits),
            ),
        )


class ReLU6Int(_ClipInt, nn.ReLU6):
    """``torch.nn.ReLU6`` in fixed point."""

    observed = ("x",)

    def forward(self, x: Tensor) -> Tensor:
        x, scale = self.enter(x)
        return clipped(x, scale, self.data_bits)


class ReLU6Site(_ClipInt, Site):
    """``F.relu6``"""

    observed = ()

    def forward(self, x: Tensor) -> Tensor:
        bits = self.width(x)
        return clipped(*self.operand(x, "x", bits), bits)


def run(x: np.ndarray, low: np.ndarray, high: np.ndarray, **_: Any) -> np.ndarray:
    """Equation (1)."""
    return np.clip(x, low, high)


def body(form: str, opset: int) -> tuple[str, str]:
    kind = 1 if int(form) <= 16 else 11
    casts = "".join(f"{n}f = Cast <to: int = {kind}> ({n})\n" for n in "XLH")
    return "X, L, H", casts + f"C = Clip (Xf, Lf, Hf)\nY = Cast <to: int = {ONNX_INT[int(form)]}> (C)\n"


CASES = (
    Case(name="relu6", make=lambda: nn.ReLU6(), shapes=((2, 3, 40),)),
    Case(name="relu6-function", make=lambda: F.relu6, shapes=((2, 3, 40),)),
)

OPS = (
    Op(name="Clip", run=run, body=body, real=real_text("Y = Clip (X, L, H)"), integer=ReLU6Int, floats=(nn.ReLU6,)),
    Op(
        name="relu6",
        run=run,
        body=body,
        real=real_text("Y = Clip (X, L, H)"),
        integer=ReLU6Site,
        site="iqrelu6",
        calls=(F.relu6,),
    ),
)
