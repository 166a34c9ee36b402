"""Average pooling: exact window sums divided by the window's area, on the input's own grid (``engine`` 3).

    out = sat( D(sum of window, k) ),  k = kh * kw, padding counts as zeros                            (1)
    D(s, k) = floor(s / k + 1/2)                         k a power of two                              (2)
    D(s, k) = nearest; ties away from zero or towards it, the same for every tie of one k, else        (3)

The direction in (3) is the sign of the error of the chip's 29-bit reciprocal of k.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linger.errors import LingerError
from linger.numerics import Grid, nearest_integer, rounded_mean, saturate, set_grid, straight_through
from linger.ops._base import ONNX_INT, IntModule, Op, constants, real_text
from linger.ops._case import Case
from linger.ops._lowered import Lowered, Operand, require_batch
from linger.ops._site import Site
from linger.ops._weighted_text import split_text
from linger.ops._windows import pooled
from linger.rounding import HALF_UP, ROUNDINGS, divide_half_up, divided_half_up


def ties_away(k: int) -> bool:
    """Whether ties of a division by ``k`` round away from zero: 29-bit Newton reciprocal of ``engine`` 3, D(x, y, s)."""
    n = (k - 1).bit_length()
    r = divide_half_up(2**34, 32 * k >> n)  # r has 29 fraction bits, t has 30
    for _ in range(3):
        t = divide_half_up(2 ** (31 + n) - 2 * k * r, 2**n)
        r = divide_half_up(t * r, 2**30)
    return r * k > 2 ** (29 + n)


def _pair(v: Any, rank: int) -> tuple[int, ...]:
    return tuple(v) if isinstance(v, (tuple, list)) else (int(v),) * rank


class _AvgPoolInt(IntModule):
    observed = ("x",)
    rank = 2

    @classmethod
    def refuses(cls, source: Any) -> str:
        uneven = not source.count_include_pad and any(_pair(source.padding, cls.rank))
        return _refused(source.ceil_mode, uneven, getattr(source, "divisor_override", None))

    def window(self, x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """(kernel, strides, padding) for this input."""
        kernel = _pair(self.kernel_size, self.rank)
        stride = kernel if self.stride is None else _pair(self.stride, self.rank)
        return kernel, stride, _pair(self.padding, self.rank)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride, padding = self.window(x)
        x, scale = self.enter(x)
        bits = self.data_bits
        mean = average(x, scale, bits, kernel, stride, padding, self.rounding)
        return set_grid(mean, Grid(scale, bits))

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        kernel, stride, padding = self.window(torch.empty(operands[0].shape, device="meta"))
        return (pool_node(operands[0], kernel, stride, padding),)


def _refused(ceil_mode: bool, uneven: bool, divisor: int | None) -> str:
    found = [
        n
        for n, v in (("ceil_mode", ceil_mode), ("count_include_pad=False", uneven), ("divisor_override", divisor))
        if v
    ]
    return f"{', '.join(found)} has no integer form" if found else ""


def pool_node(x: Operand, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> Lowered:
    """The AvgPool node on an operand."""
    require_batch(x, len(kernel))
    attrs = {
        "kernel_shape": kernel,
        "strides": stride,
        "pads": padding * 2,
        "ceil_mode": 0,
        "data_bits": x.bits,
        "o_bits": x.bits,
        "scale_x": x.scale,
        "scale_o": x.scale,
    }
    area = math.prod(kernel)
    form = f"r{len(kernel)}k{area}" + ("" if x.bits == 8 else f"_o{x.bits}")
    return Lowered(op_type=f"AvgPool{len(kernel)}dInt", inputs=(0,), attrs=attrs, bits=x.bits, form=form)


def chips_own(k: int, rounding: str) -> bool:
    """Whether a division by ``k`` is that of equation (3)."""
    return rounding == HALF_UP and k & (k - 1) != 0


def divided(total: Tensor, k: int, rounding: str) -> Tensor:
    """Equations (2), (3) on window sums in LSB (float64 holding integers)."""
    if not chips_own(k, rounding):
        return ROUNDINGS[rounding].quotient(total, k)
    return divided_half_up(total.abs() - (0 if ties_away(k) else 0.5), k) * total.sign()


def average(x: Tensor, scale: Tensor, bits: int, kernel: Any, stride: Any, padding: Any, rounding: str) -> Tensor:
    """Equation (1) on a tensor whose grid is ``scale``; the gradient is that of the float average."""
    pool: Any = F.avg_pool2d if len(kernel) == 2 else F.avg_pool1d
    area = math.prod(kernel)
    mean = pool(x.double() if bits > 8 or area > 2**12 else x, kernel, stride, padding)
    total = nearest_integer(mean.detach().double() * (scale.double() * area))
    return straight_through(mean, divided(total, area, rounding), scale, bits).float()


class AvgPool2dInt(_AvgPoolInt, nn.AvgPool2d):
    """``torch.nn.AvgPool2d`` in fixed point."""


class AvgPool1dInt(_AvgPoolInt, nn.AvgPool1d):
    """``torch.nn.AvgPool1d`` in fixed point."""

    rank = 1


class _AdaptiveInt(_AvgPoolInt):
    @classmethod
    def refuses(cls, source: Any) -> str:
        return ""

    def window(self, x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return adaptive_window(x.shape[-self.rank :], self.output_size)


class AdaptiveAvgPool2dInt(_AdaptiveInt, nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d`` in fixed point, for output sizes that divide the input."""


class AdaptiveAvgPool1dInt(_AdaptiveInt, nn.AdaptiveAvgPool1d):
    """``torch.nn.AdaptiveAvgPool1d`` in fixed point, for output sizes that divide the input."""

    rank = 1


class PoolSite(Site):
    """``F.avg_pool1d``, ``F.avg_pool2d``, ``F.adaptive_avg_pool1d``, ``F.adaptive_avg_pool2d`` on a gridded tensor."""

    observed = ()

    @classmethod
    def takes(cls, x: Any = None, *args: Any, **call: Any) -> bool:
        if "output_size" in call:
            return divides(x.shape[2:], call["output_size"])
        uneven = not call.get("count_include_pad", True) and any(_pair(call.get("padding", 0), 1))
        return not _refused(call.get("ceil_mode", False), uneven, call.get("divisor_override"))

    def window(self, x: Any, call: Mapping[Any, Any]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """(kernel, strides, padding) of the functional call, adaptive where it has an ``output_size``."""
        rank = len(x.shape) - 2
        if "output_size" in call:
            return adaptive_window(x.shape[2:], call["output_size"])
        kernel = _pair(call["kernel_size"], rank)
        padding = _pair(call.get("padding", 0), rank)
        stride = call.get("stride")
        return kernel, kernel if stride is None or stride == [] else _pair(stride, rank), padding

    def forward(self, x: Tensor, **call: Any) -> Tensor:
        bits = self.width(x)
        x, scale = self.operand(x, "x", bits)
        return set_grid(average(x, scale, bits, *self.window(x, call), self.rounding), Grid(scale, bits))

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        return (pool_node(operands[0], *self.window(operands[0], call)),)


def divides(sizes: Any, output_size: Any) -> bool:
    """Whether an adaptive pool has equal windows."""
    return not any(o is not None and s % o for s, o in zip(sizes, _pair(output_size, len(sizes)), strict=True))


def adaptive_window(sizes: Any, output_size: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The equal windows of an adaptive pool."""
    wanted = _pair(output_size, len(sizes))
    if not divides(sizes, output_size):
        raise LingerError(
            f"output_size {wanted} does not divide the input {tuple(sizes)}; choose sizes that divide, or keep it in float with disable_quant"
        )
    kernel = tuple(int(s) // (o or int(s)) for s, o in zip(sizes, wanted, strict=True))
    return kernel, kernel, (0,) * len(kernel)


def run(
    x: np.ndarray,
    *,
    kernel_shape: tuple[int, ...],
    strides: tuple[int, ...],
    pads: tuple[int, ...],
    rounding: str = HALF_UP,
    **_: Any,
) -> np.ndarray:
    """x (N, C, *space) -> the same width; equations (1) to (3)."""
    rank = len(kernel_shape)
    padded = np.pad(x, ((0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)))
    sizes = [(n - k) // s + 1 for n, k, s in zip(padded.shape[2:], kernel_shape, strides, strict=True)]
    total = pooled(padded, np.add, kernel_shape, strides, (1,) * rank, sizes, np.int64)
    k = int(np.prod(kernel_shape))
    return saturate(rounded_mean(total, k, ties_away(k), rounding), 8 * x.dtype.itemsize)


def body(form: str, opset: int, rounding: str = HALF_UP) -> tuple[str, str]:
    base, _, bits = form.partition("_o")
    area = int(base.partition("k")[2])
    pieces = int(bits or 8) // 8  # each window sum of 8-bit pieces is exact in float32
    text = "Xd = Cast <to: int = 11> (X)\n" + split_text("Xd", "x", pieces, 8)
    text += "sh = Shape (X)\n" + "a1 = Constant <value = int64[1] {1}> ()\na2 = Constant <value = int64[1] {2}> ()\n"
    text += f"big = Constant <value = int64[1] {{{2**31}}}> ()\nz = Constant <value = int64[1] {{0}}> ()\n"
    text += "sp = Slice (sh, a2, big)\nm1 = Constant <value = int64[1] {-1}> ()\nflat = Concat <axis: int = 0> (m1, a1, sp)\n"
    text += "ks = Constant <value_ints: ints = @kernel_shape> ()\nws = Concat <axis: int = 0> (a1, a1, ks)\n"
    text += "W = ConstantOfShape <value = float[1] {1}> (ws)\n"
    for i in range(pieces):
        text += f"r{i} = Reshape (x{i}, flat)\nc{i} = Conv <strides: ints = @strides, pads: ints = @pads, "
        text += f"kernel_shape: ints = @kernel_shape> (r{i}, W)\n" + constants(**{f"p{i}": f"double {{{256**i}}}"})
        text += f"d{i} = Cast <to: int = 11> (c{i})\ne{i} = Mul (d{i}, p{i})\n"
        text += f"t{i} = Add (t{i - 1}, e{i})\n" if i else f"t{i} = Identity (e{i})\n"
    text += f"so = Shape (t{pieces - 1})\nsos = Slice (so, a2, big)\nnc = Slice (sh, z, a2)\n"
    text += f"back = Concat <axis: int = 0> (nc, sos)\nS = Reshape (t{pieces - 1}, back)\n"
    return "X", text + division_text("S", area, int(bits or 8), rounding)


def division_text(source: str, k: int, bits: int, rounding: str) -> str:
    """Statements for ``Y`` = D(source, k) on a double ``source`` of integers."""
    if not chips_own(k, rounding):
        text = (
            constants(k=f"double {{{k}}}") + f"v = Div ({source}, k)\n" + ROUNDINGS[rounding].text("v", "q", "double")
        )
    else:
        add = k if ties_away(k) else k - 1
        text = constants(two="double {2.0}", k2=f"double {{{2 * k}}}", add=f"double {{{add}}}")
        text += f"a = Abs ({source})\nt = Mul (a, two)\nu = Add (t, add)\nv = Div (u, k2)\nf = Floor (v)\n"
        text += f"s = Sign ({source})\nq = Mul (f, s)\n"
    return text + f"Y = Cast <to: int = {ONNX_INT[bits]}> (q)\n"


real = real_text(
    "Y = AveragePool <kernel_shape: ints = @kernel_shape, strides: ints = @strides, pads: ints = @pads, "
    "count_include_pad: int = 1> (X)"
)
WINDOW = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
CALL_NAMES: dict[Any, tuple[str, ...]] = {
    F.avg_pool1d: WINDOW, F.avg_pool2d: WINDOW, F.adaptive_avg_pool1d: ("output_size",), F.adaptive_avg_pool2d: ("output_size",),
}  # fmt: skip

CASES = (
    Case(name="avg-pool1d", make=lambda: nn.AvgPool1d(3, stride=2, padding=1), shapes=((2, 4, 31),)),
    Case(name="avg-pool2d-4", make=lambda: nn.AvgPool2d(2), shapes=((2, 3, 10, 8),)),
    Case(name="avg-pool2d-6", make=lambda: nn.AvgPool2d((2, 3), padding=(1, 1)), shapes=((2, 3, 12, 12),)),
    Case(name="avg-pool2d-10", make=lambda: nn.AvgPool2d((5, 2), stride=1), shapes=((2, 3, 9, 9),)),
    Case(name="avg-pool2d-9", make=lambda: nn.AvgPool2d(3), shapes=((2, 3, 9, 9),)),
    Case(name="avg-pool2d-49", make=lambda: nn.AvgPool2d(7), shapes=((3, 5, 7, 7),)),
    Case(
        name="avg-pool-function", make=lambda: lambda x: F.avg_pool2d(x, 2, stride=1, padding=1), shapes=((2, 3, 6, 8),)
    ),
    Case(name="adaptive-1", make=lambda: nn.AdaptiveAvgPool2d(1), shapes=((2, 4, 6, 5),)),
    Case(name="adaptive-2x3", make=lambda: nn.AdaptiveAvgPool2d((2, 3)), shapes=((2, 4, 8, 9),)),
    Case(name="adaptive-none", make=lambda: nn.AdaptiveAvgPool2d((None, 2)), shapes=((2, 4, 3, 8),)),
    Case(name="adaptive1d", make=lambda: nn.AdaptiveAvgPool1d(4), shapes=((2, 4, 12),)),
    Case(name="adaptive-function", make=lambda: lambda x: F.adaptive_avg_pool2d(x, (1, 1)), shapes=((2, 4, 7, 7),)),
)

OPS = (
    Op(name="AvgPool2dInt", run=run, body=body, real=real, integer=AvgPool2dInt, floats=(nn.AvgPool2d,), aliases=("QAvgPool2d",)),
    Op(name="AvgPool1dInt", run=run, body=body, real=real, integer=AvgPool1dInt, floats=(nn.AvgPool1d,)),
    Op(name="AdaptiveAvgPool2dInt", run=run, body=body, real=real, integer=AdaptiveAvgPool2dInt, floats=(nn.AdaptiveAvgPool2d,)),
    Op(name="AdaptiveAvgPool1dInt", run=run, body=body, real=real, integer=AdaptiveAvgPool1dInt, floats=(nn.AdaptiveAvgPool1d,)),
    Op(name="avg_pool", run=run, body=body, real=real, integer=PoolSite, site="iqavgpool",
       calls=tuple(CALL_NAMES), names=CALL_NAMES),
)  # fmt: skip
