"""Clamps on the input's own grid: out = min(max(q, R(low * s_x)), R(high * s_x)), R(v) = sat(floor(v + 1/2)).   (1)

That is the correctly rounded clamp whether the bounds are on the grid or not; a missing or infinite bound is the grid's
own limit. As in PyTorch, the upper bound wins where it is below the lower one.

The engine loses a Clip behind a convolution and has none elsewhere (``engine`` 6.9), so that the file carries the clamp as
saturating sums (``_saturate``). A tensor of 16 or 32 bits, of another rank than 2 to 4 or with a dynamic channel axis has
no such form: its file carries a Clip with a body (behind a Relu, ONNX Runtime cannot fuse a standard one on int8), which
``check`` refuses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linger.eager import at_hand
from linger.errors import LingerError
from linger.masks import between, cleared, in_bytes
from linger.numerics import WIDEST, Grid, int_dtype, levels, set_grid
from linger.ops._base import ONNX_INT, IntModule, Op, real_text
from linger.ops._case import Case
from linger.ops._lowered import Lowered, Operand
from linger.ops._saturate import clamp_nodes, fits
from linger.ops._site import Site

Bounds = tuple[float, float]


class _Clamp(torch.autograd.Function):
    """Equation (1) with the gradient of hardtanh: 1 between the bounds, 0 on them and beyond."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bounds: Bounds, ends: Bounds, bits: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.ends = ends
        if at_hand(x):
            return torch.clamp(x, *(float(integer_bound(v, scale.item(), bits)) / scale.item() for v in bounds))
        low, high = (_rounded(v, scale, bits) for v in bounds)
        return torch.minimum(torch.maximum(x, low), high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        if in_bytes(x):
            return cleared(grads[0], -between(x, *ctx.ends)), None, None, None, None
        return torch.ops.aten.hardtanh_backward(grads[0], x, *ctx.ends), None, None, None, None


def _rounded(bound: float, scale: Tensor, bits: int) -> Tensor:
    """R(bound * s_x) / s_x, 0-d."""
    scale, top = scale.double(), levels(min(bits, WIDEST))
    return (torch.floor(bound * scale + 0.5).clamp(-top - 1, top) / scale).float()


def clamped(x: Tensor, scale: Tensor, bits: int, bounds: Bounds, closed: bool = False) -> Tensor:
    """Equation (1) on a tensor of any shape and its grid; ``closed``: the gradient is 1 on the bounds too."""
    ends = _just_outside(bounds) if closed else bounds
    return set_grid(_Clamp.apply(x, scale, bounds, ends, bits), Grid(scale, bits))


def _just_outside(bounds: Bounds) -> Bounds:
    """The float32 next below the lower bound and next above the upper one."""
    low, high = (
        float(np.nextafter(np.float32(v), np.float32(to))) for v, to in zip(bounds, (-np.inf, np.inf), strict=True)
    )
    return low, high


class _ClipInt(IntModule):
    def bounds(self, call: Mapping[Any, Any]) -> Bounds:
        """(low, high) of a call, infinite where there is none."""
        return 0.0, 6.0

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        x = operands[0]
        thresholds = [integer_bound(v, x.scale, x.bits) for v in self.bounds(call)]
        if fits(x):
            return clamp_nodes(x, *map(int, thresholds))
        params = dict(zip(("min_thresh", "max_thresh"), thresholds, strict=True))
        return (Lowered(op_type="Clip", inputs=(0, *params), attrs={}, params=params, bits=x.bits, form=str(x.bits)),)


def integer_bound(bound: float, scale: float, bits: int) -> np.ndarray:
    """R(bound * s_x), 0-d."""
    top = levels(min(bits, WIDEST))
    return np.array(math.floor(min(max(bound * scale + 0.5, -top - 1), top)), int_dtype(bits))


def number(name: str, value: float | None, missing: float) -> float:
    """A bound as the call gives it, rounded to float32.

    Raises:
        LingerError: it is NaN.
    """
    found = missing if value is None else float(np.float32(value))
    if math.isnan(found):
        raise LingerError(f"{name} is {value}, allowed are numbers; give one")
    return found


class ReLU6Int(_ClipInt, nn.ReLU6):
    """``torch.nn.ReLU6`` in fixed point."""

    observed = ("x",)

    def forward(self, x: Tensor) -> Tensor:
        x, scale = self.enter(x)
        return clamped(x, scale, self.data_bits, self.bounds({}))


class _ClampSite(_ClipInt, Site):
    observed = ()
    closed: ClassVar[bool] = False

    def forward(self, x: Tensor, **call: Any) -> Tensor:
        bits = self.width(x)
        return clamped(*self.operand(x, "x", bits), bits, self.bounds(call), self.closed)


class ReLU6Site(_ClampSite):
    """``F.relu6``"""


class HardtanhSite(_ClampSite):
    """``F.hardtanh``"""

    def bounds(self, call: Mapping[Any, Any]) -> Bounds:
        low, high = number("min_val", call.get("min_val"), -1.0), number("max_val", call.get("max_val"), 1.0)
        if low > high:
            raise LingerError(f"min_val is {low} and max_val {high}, allowed is min_val <= max_val; swap them")
        return low, high


class ClampSite(_ClampSite):
    """``torch.clamp`` with numbers, two or one"""

    closed = True

    @classmethod
    def takes(cls, x: Any = None, *args: Any, min: Any = None, max: Any = None, **call: Any) -> bool:
        given = [v for v in (min, max) if v is not None]
        return bool(given) and all(isinstance(v, (int, float)) for v in given)

    def bounds(self, call: Mapping[Any, Any]) -> Bounds:
        return number("min", call.get("min"), -math.inf), number("max", call.get("max"), math.inf)


def run(x: np.ndarray, low: np.ndarray, high: np.ndarray, **_: Any) -> np.ndarray:
    """Equation (1)."""
    return np.minimum(np.maximum(x, low), high)


def body(form: str, opset: int) -> tuple[str, str]:
    kind = 1 if int(form) <= 16 else 11
    casts = "".join(f"{n}f = Cast <to: int = {kind}> ({n})\n" for n in "XLH")
    return "X, L, H", casts + f"C = Clip (Xf, Lf, Hf)\nY = Cast <to: int = {ONNX_INT[int(form)]}> (C)\n"


CASES = (
    Case(name="relu6", make=lambda: nn.ReLU6(), shapes=((2, 3, 40),)),
    Case(name="relu6-function", make=lambda: F.relu6, shapes=((2, 3, 40),)),
    Case(name="hardtanh", make=lambda: nn.Hardtanh(), shapes=((2, 3, 40),)),
    Case(name="hardtanh-bounds", make=lambda: lambda x: F.hardtanh(x, -0.26, max_val=2), shapes=((2, 3, 40),)),
    Case(name="clamp", make=lambda: lambda x: torch.clamp(x, -1.3, 0.7), shapes=((2, 3, 40),)),
    Case(name="clamp-above", make=lambda: lambda x: x.clamp(max=0.02), shapes=((2, 3, 40),)),
    Case(name="clip-below", make=lambda: lambda x: x.clip(-3), shapes=((2, 3, 40),)),
    Case(name="clamp-crossed", make=lambda: lambda x: x.clamp(min=2, max=1), shapes=((2, 3, 40),)),
    Case(name="clamp-min", make=lambda: lambda x: x.clamp_min(0.5), shapes=((2, 3, 40),)),
    Case(name="clamp-max", make=lambda: lambda x: torch.clamp_max(x, max=-1e9), shapes=((2, 3, 40),)),
)

_BOTH, _MIN, _MAX = ("min", "max"), ("min",), ("max",)
CLAMPS: dict[Any, tuple[str, ...]] = {
    torch.clamp: _BOTH, Tensor.clamp: _BOTH, torch.clamp_: _BOTH, Tensor.clamp_: _BOTH,
    torch.clip: _BOTH, Tensor.clip: _BOTH, torch.clip_: _BOTH, Tensor.clip_: _BOTH,
    torch.clamp_min: _MIN, Tensor.clamp_min: _MIN, torch.clamp_min_: _MIN, Tensor.clamp_min_: _MIN,
    torch.clamp_max: _MAX, Tensor.clamp_max: _MAX, torch.clamp_max_: _MAX, Tensor.clamp_max_: _MAX,
}  # fmt: skip
HARDTANHS = dict.fromkeys((F.hardtanh, F.hardtanh_), ("min_val", "max_val", "inplace"))

real = real_text("Y = Clip (X, L, H)")
OPS = (
    Op(name="Clip", run=run, body=body, real=real, integer=ReLU6Int, floats=(nn.ReLU6,)),
    Op(name="relu6", run=run, body=body, real=real, integer=ReLU6Site, site="iqrelu6", calls=(F.relu6,),
       names={F.relu6: ("inplace",)}),
    Op(name="hardtanh", run=run, body=body, real=real, integer=HardtanhSite, site="iqhardtanh", calls=tuple(HARDTANHS),
       names=HARDTANHS, modules=(nn.Hardtanh,)),
    Op(name="clamp", run=run, body=body, real=real, integer=ClampSite, site="iqclamp", calls=tuple(CLAMPS), names=CLAMPS),
)  # fmt: skip
