"""Conv1d, Conv2d: integer convolution; groups, dilation, asymmetric and ``"same"`` padding, other padding modes.

    acc[n,o,p] = sum over c,k of x[n, c, p * stride + k * dilation - pad] * w[o, c, k] + b[o]          (1)
    out = saturate(shift_round(acc, log2(s_x * s_w / s_o)))                                            (2)

Padding with zeros contributes 0 (``engine`` 3). ``F.conv1d`` and ``F.conv2d`` with parameters of the net are the same nodes;
with a weight that the forward computes from its inputs they are float islands, since no chip has such a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn
from torch.nn import functional as F

from linger.numerics import exact_matmul, int_dtype
from linger.ops import pad
from linger.ops._base import Op
from linger.ops._case import Case, Holder
from linger.ops._composed import Composed, Router
from linger.ops._constant import constant_of
from linger.ops._lowered import Lowered, Operand, require_batch
from linger.ops._normalize import Normalized
from linger.ops._weighted import WeightedInt, WeightedSite, requantize
from linger.ops._weighted_text import split_form, sum_body
from linger.rounding import HALF_UP
from linger.steps import pieces


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """``Product`` of a convolution with these arguments. ``padding``: per axis, or "same"; ``mode``: what is padded with."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    mode: str = "zeros"
    transposed: bool = False

    def accumulate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        function: Any = F.conv1d if weight.dim() == 3 else F.conv2d
        padding: Any = self.padding
        if self.mode != "zeros":
            begins, ends = self.pads(tuple(weight.shape))
            x, padding = (
                F.pad(x, [v for pair in zip(begins[::-1], ends[::-1], strict=True) for v in pair], self.mode),
                0,
            )
        return function(x, weight, bias, self.stride, padding, self.dilation, self.groups)  # type: ignore[no-any-return]

    def absolute_sum(self, weight: Tensor) -> Tensor:
        return weight.abs().flatten(1).sum(1)

    def pads(self, weight: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Begin and end of every axis."""
        if self.padding != "same":
            assert isinstance(self.padding, tuple)
            return self.padding, self.padding
        total = [d * (k - 1) for d, k in zip(self.dilation, weight[2:], strict=True)]
        return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)

    def attrs(self, weight: tuple[int, ...], x: Operand) -> dict[str, Any]:
        require_batch(x, len(weight) - 2)
        begins, ends = self.pads(weight)
        return {
            "dilations": self.dilation,
            "group": self.groups,
            "kernel_shape": weight[2:],
            "pads": begins + ends if self.mode == "zeros" else (0,) * (2 * len(begins)),
            "strides": self.stride,
        }

    def wide_form(self, weight: tuple[int, ...], data_bits: int, parameter_bits: int) -> str:
        return split_form(math.prod(weight[1:]), data_bits, parameter_bits)


class _ConvInt(WeightedInt):
    def product(self) -> Convolution:
        m: Any = self
        padding = (0,) * len(m.kernel_size) if m.padding == "valid" else m.padding
        return Convolution(
            stride=tuple(m.stride), padding=padding if padding == "same" else tuple(padding),
            dilation=tuple(m.dilation), groups=m.groups, mode=m.padding_mode,
        )  # fmt: skip

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        nodes, product = super().lower(operands, out, call), self.product()
        if product.mode == "zeros":
            return nodes
        begins, ends = product.pads(tuple(self.weight.shape))
        first = pad.lowered(product.mode, (0, 0), begins + ends, operands[0].bits)
        return (first, replace(nodes[0], inputs=("%0", *nodes[0].inputs[1:])))


class Conv1dInt(_ConvInt, nn.Conv1d):
    """``torch.nn.Conv1d`` in fixed point."""

    op_type = "Conv1dInt"


class Conv2dInt(_ConvInt, nn.Conv2d):
    """``torch.nn.Conv2d`` in fixed point."""

    op_type = "Conv2dInt"


class _ConvSite(WeightedSite):
    @staticmethod
    def product(weight: tuple[int, ...], call: Mapping[Any, Any]) -> Convolution:
        rank = len(weight) - 2
        padding = call.get("padding", 0)
        return Convolution(
            stride=each(call.get("stride", 1), rank),
            padding=padding if padding == "same" else each(0 if padding == "valid" else padding, rank),
            dilation=each(call.get("dilation", 1), rank),
            groups=int(call.get("groups", 1)),
        )


class Conv1dSite(_ConvSite):
    """``F.conv1d`` with a weight of the net."""

    op_type = "Conv1dInt"


class Conv2dSite(_ConvSite):
    """``F.conv2d`` with a weight of the net."""

    op_type = "Conv2dInt"


def each(value: Any, rank: int) -> tuple[int, ...]:
    """One number per axis, as PyTorch reads an argument of a convolution."""
    given = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return tuple(int(v) for v in given * (rank // len(given)))


def composed(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, a convolution, in calls that have a fixed-point form; with a weight that is not the net's, in float."""

    def conv(route: Router, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **call: Any) -> Tensor:
        if x.dim() < weight.dim() and constant_of(weight) is not None:
            batch: Tensor = conv(route, x.unsqueeze(0), weight, bias, *args, **call)
            return batch.squeeze(0)
        if bias is None or constant_of(weight) is None or constant_of(bias) is not None:
            return route(function, x, weight, bias, *args, **call)  # type: ignore[no-any-return]
        y: Tensor = route(function, x, weight, None, *args, **call)
        return y + bias.reshape(-1, *[1] * (weight.dim() - 2))

    return conv


class _NormalizeConv(Normalized):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.bounded()
        return self.bound_output(self._conv_forward(x, weight, bias))  # type: ignore[attr-defined]


class NormalizeConv1d(_NormalizeConv, nn.Conv1d):
    """``torch.nn.Conv1d`` whose weight, bias and output stay within bounds."""


class NormalizeConv2d(_NormalizeConv, nn.Conv2d):
    """``torch.nn.Conv2d`` whose weight, bias and output stay within bounds."""


def run(
    x: np.ndarray,
    w: np.ndarray,
    b: np.ndarray | None = None,
    *,
    scale_x: float,
    scale_w: float,
    scale_o: float,
    strides: tuple[int, ...],
    pads: tuple[int, ...],
    dilations: tuple[int, ...] | None = None,
    group: int = 1,
    o_bits: int = 8,
    rounding: str = HALF_UP,
    **_: Any,
) -> np.ndarray:
    """x (N, C, *space), w (O, C/group, *kernel), b (O) int32 -> (N, O, *space) of ``o_bits`` bits; equations (1), (2)."""
    windows = _windows(x, w.shape[2:], strides, pads, dilations or (1,) * (x.ndim - 2))
    shape = windows.shape[x.ndim - 1 :]
    rows = w.reshape(group, len(w) // group, -1)
    out = np.empty((len(w), *shape), int_dtype(o_bits))
    for part in pieces(shape[0], 4 * windows.size // max(1, shape[0])):
        some = windows[(slice(None),) * (x.ndim - 1) + (part,)]
        columns = some.reshape(group, rows.shape[-1], -1)
        acc = exact_matmul(columns.swapaxes(1, 2), rows.swapaxes(1, 2)).swapaxes(1, 2)
        acc = np.moveaxis(acc.reshape(len(w), *some.shape[x.ndim - 1 :]), -1, 0)
        if b is not None:
            acc = acc + b.astype(np.int64).reshape(-1, *(1,) * (x.ndim - 2))
        out[:, part] = np.moveaxis(requantize(acc, scale_x, scale_w, scale_o, o_bits, rounding), 0, -1)
    return np.moveaxis(out, -1, 0)


def _windows(x: np.ndarray, kernel: tuple[int, ...], strides: Any, pads: Any, dilations: Any) -> np.ndarray:
    """A view of padded x (N, C, *space): what each kernel position sees, (C, *kernel, *out, N). The batch is last: rows are long."""
    rank = len(kernel)
    padded = np.pad(np.moveaxis(x, 0, -1), ((0, 0), *zip(pads[:rank], pads[rank:], strict=True), (0, 0)))
    reach = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True))
    windows = sliding_window_view(padded, reach, axis=tuple(range(1, 1 + rank)))  # C, *space, N, *reach
    steps = (*(slice(None, None, s) for s in strides), slice(None), *(slice(None, None, d) for d in dilations))
    windows = windows[(slice(None), *steps)]
    return windows.transpose(0, *range(2 + rank, 2 + 2 * rank), *range(1, 2 + rank))


ATTRS = "strides: ints = @strides, pads: ints = @pads, kernel_shape: ints = @kernel_shape, dilations: ints = @dilations, group: int = @group"


def body(rank: int, op: str = "Conv", extra: str = "") -> Any:
    """Body factory for convolutions of ``rank`` spatial axes."""

    def make(form: str, opset: int, rounding: str = HALF_UP) -> tuple[str, str]:
        inputs, text = sum_body(form, f"{op} <{ATTRS}{extra}> ({{x}}, {{w}}{{b}})", rounding)
        shape = ", ".join(["1", "-1"] + ["1"] * rank)
        reshape = f"bs = Constant <value = int64[{rank + 2}] {{{shape}}}> ()\nBn = Reshape (Bd, bs)"
        return inputs, text.replace("Bn = BiasShape (Bd)", reshape)

    return make


def real(op: str = "Conv", extra: str = "") -> Any:
    """The same on floats."""
    return lambda form, opset: f"Y = {op} <{ATTRS}{extra}> (X, W, B)\n"


def _case(name: str, rank: int, space: tuple[int, ...], *args: Any, **options: Any) -> Case:
    layer = nn.Conv2d if rank == 2 else nn.Conv1d
    return Case(name=name, make=lambda: layer(*args, **options), shapes=((2, args[0], *space),))


CASES = (
    _case("conv1d", 1, (33,), 3, 5, 3, padding=1),
    _case("conv1d-depthwise", 1, (40,), 6, 6, 5, groups=6, stride=2, bias=False),
    _case("conv1d-same-dilated", 1, (29,), 4, 6, 4, padding="same", dilation=2),
    _case("conv1d-circular", 1, (17,), 2, 3, 5, padding=(2,), padding_mode="circular"),
    _case("conv2d", 2, (11, 9), 3, 8, 3, padding=1),
    _case("conv2d-groups", 2, (8, 10), 8, 12, 3, groups=4, stride=(2, 1)),
    _case("conv2d-depthwise", 2, (9, 9), 6, 12, 3, groups=6, padding=1, bias=False),
    _case("conv2d-asymmetric", 2, (10, 13), 2, 4, (1, 5), padding=(0, 2), dilation=(1, 2)),
    _case("conv2d-same", 2, (7, 8), 3, 4, (4, 3), padding="same"),
    _case("conv2d-valid", 2, (7, 8), 3, 4, (2, 3), padding="valid"),
    _case("conv2d-reflect", 2, (8, 8), 2, 3, 3, padding=1, padding_mode="reflect"),
    _case("conv2d-replicate", 2, (6, 8), 2, 3, (3, 5), padding=(1, 2), padding_mode="replicate"),
    _case("conv2d-K4608", 2, (3, 4), 512, 3, 3, padding=1),
    Case(
        name="call-conv1d",
        make=lambda: Holder(lambda x, w, b: F.conv1d(x, w, b, 2, padding=1, groups=2), (4, 3, 3), (4,)),
        shapes=((2, 6, 17),),
    ),
    Case(
        name="call-conv2d",
        make=lambda: Holder(lambda x, w, b: F.conv2d(x, w, b, (2, 1), (0, 2), (1, 2)), (4, 2, 1, 5), (4,)),
        shapes=((2, 2, 10, 13),),
    ),
    Case(
        name="call-conv2d-same",
        make=lambda: Holder(lambda x, w: F.conv2d(x, weight=w, padding="same", bias=None), (4, 3, 4, 3)),
        shapes=((2, 3, 7, 8),),
    ),
    Case(
        name="call-conv2d-K4608",
        make=lambda: Holder(lambda x, w, b: F.conv2d(x, w, b, padding=[1]), (3, 512, 3, 3), (3,)),
        shapes=((2, 512, 3, 4),),
    ),
)

NAMES = ("weight", "bias", "stride", "padding", "dilation", "groups")

OPS = (
    Op(name="Conv1dInt", run=run, body=body(1), real=real(), integer=Conv1dInt, floats=(nn.Conv1d,), normalized=NormalizeConv1d,
       aliases=("QConv1d",)),
    Op(name="Conv2dInt", run=run, body=body(2), real=real(), integer=Conv2dInt, floats=(nn.Conv2d,), normalized=NormalizeConv2d,
       aliases=("QConv2d", "QConvBN2d")),
    Op(name="conv1d", run=run, body=body(1), real=real(), integer=Conv1dSite, site="conv1d", calls=(F.conv1d,),
       names={F.conv1d: NAMES}),
    Op(name="conv2d", run=run, body=body(2), real=real(), integer=Conv2dSite, site="conv2d", calls=(F.conv2d,),
       names={F.conv2d: NAMES}),
)  # fmt: skip

COMPOSED = {
    F.conv1d: Composed(function=composed(F.conv1d), tag="conv1d", layer=True),
    F.conv2d: Composed(function=composed(F.conv2d), tag="conv2d", layer=True),
}
