"""F.unfold: the windows of an image as columns. A move: the grid stays, padding is 0.

out[n, (c * kh + i) * kw + j, l] = x[n, c, y(l) * sh + i * dh - ph, x(l) * sw + j * dw - pw]       (1)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from linger.numerics import Grid, set_grid
from linger.ops._base import ONNX_INT, Op, output_bits
from linger.ops._case import Case
from linger.ops._lowered import Lowered, Operand
from linger.ops._site import Site

NAMES = ("kernel_size", "dilation", "padding", "stride")
DEFAULTS = {"dilation": 1, "padding": 0, "stride": 1}


def _pair(v: Any) -> tuple[int, int]:
    return (int(v[0]), int(v[-1])) if isinstance(v, (tuple, list)) else (int(v), int(v))


class UnfoldSite(Site):
    """``F.unfold``"""

    observed = ()
    op_type = "iqUnfold"

    @classmethod
    def takes(cls, x: Any = None, *args: Any, **call: Any) -> bool:
        return bool(x.dim() == 4)

    def forward(self, x: Tensor, **call: Any) -> Tensor:
        bits = self.width(x)
        x, scale = self.operand(x, "x", bits)
        return set_grid(F.unfold(x, **call), Grid(scale, bits))

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        k, d, p, s = (_pair(call.get(name, DEFAULTS.get(name))) for name in NAMES)
        channels = int(operands[0].shape[1])
        attrs = {
            "kernel_shape": k, "strides": s, "pads": p * 2, "dilations": d, "scale_x": out.scale, "scale_o": out.scale,
            "data_bits": out.bits, "o_bits": out.bits,
        }  # fmt: skip
        form = f"c{channels}k{k[0]}x{k[1]}" + ("" if out.bits == 8 else f"_o{out.bits}")
        return (Lowered(op_type=self.op_type, inputs=(0,), attrs=attrs, bits=out.bits, form=form),)


def run(
    x: np.ndarray, *, kernel_shape: tuple[int, ...], strides: tuple[int, ...], pads: tuple[int, ...],
    dilations: tuple[int, ...], **_: Any,
) -> np.ndarray:  # fmt: skip
    """x (N, C, H, W) -> (N, C * kh * kw, L); equation (1)."""
    (kh, kw), (sh, sw), (dh, dw) = kernel_shape, strides, dilations
    padded = np.pad(x, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
    rows = (padded.shape[2] - dh * (kh - 1) - 1) // sh + 1
    columns = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
    y = np.arange(kh)[:, None, None, None] * dh + np.arange(rows)[:, None] * sh
    z = np.arange(kw)[:, None, None] * dw + np.arange(columns) * sw
    windows = padded[:, :, y, z]
    n, c = x.shape[:2]
    return windows.reshape(n, c * kh * kw, rows * columns)


def _text(form: str, cast: str) -> str:
    """A convolution whose kernels are the unit vectors of the window, each channel alone: exact on floats that hold integers."""
    c, k = output_bits(form)[0][1:].split("k")
    kh, kw = (int(v) for v in k.split("x"))
    eye = ", ".join("1" if i == j else "0" for _ in range(int(c)) for i in range(kh * kw) for j in range(kh * kw))
    rows = int(c) * kh * kw
    text = f"w = Constant <value = float[{rows}, 1, {kh}, {kw}] {{{eye}}}> ()\nXf = Cast <to: int = 1> (X)\n"
    text += f"F = Conv <group: int = {c}, kernel_shape: ints = @kernel_shape, strides: ints = @strides, "
    text += "pads: ints = @pads, dilations: ints = @dilations> (Xf, w)\n"
    text += "s = Shape (F)\nz = Constant <value = int64[1] {0}> ()\nt = Constant <value = int64[1] {2}> ()\n"
    text += "e = Constant <value = int64[1] {4}> ()\nh = Slice (s, z, t)\nhw = Slice (s, t, e)\n"
    text += "l = ReduceProd <keepdims: int = 1> (hw)\nv = Concat <axis: int = 0> (h, l)\nU = Reshape (F, v)\n"
    return text + cast


def body(form: str, opset: int) -> tuple[str, str]:
    return "X", _text(form, f"Y = Cast <to: int = {ONNX_INT[output_bits(form)[1]]}> (U)\n")


def real(form: str, opset: int) -> str:
    return _text(form, "Y = Identity (U)\n")


CASES = (
    Case(name="unfold", make=lambda: nn.Unfold(3, padding=1), shapes=((2, 3, 5, 6),)),
    Case(
        name="unfold-strided",
        make=lambda: lambda x: F.unfold(x, (2, 3), dilation=(2, 1), padding=(0, 2), stride=(1, 2)),
        shapes=((2, 2, 7, 6),),
    ),
)

OPS = (
    Op(name="iqUnfold", run=run, body=body, real=real, integer=UnfoldSite, site="iqunfold", calls=(F.unfold,),
       names={F.unfold: NAMES}, modules=(nn.Unfold,)),
)  # fmt: skip
