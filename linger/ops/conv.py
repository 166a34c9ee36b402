"""Conv1d, Conv2d: integer convolution; groups, dilation, asymmetric and ``"same"`` padding, other padding modes.

    acc[n,o,p] = sum over c,k of x[n, c, p * stride + k * dilation - pad] * w[o, c, k] + b[o]          (1)
    out = saturate(shift_round(acc, log2(s_x * s_w / s_o)))                                            (2)

Padding with zeros contributes 0 (``engine`` 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn

from linger.numerics import exact_matmul
from linger.ops import pad
from linger.ops._base import Op
from linger.ops._case import Case
from linger.ops._lowered import Lowered, Operand, require_batch
from linger.ops._normalize import Normalized
from linger.ops._weighted import WeightedInt, requantize, split_form, sum_body


class _ConvInt(WeightedInt):
    padding_mode: str
    rank: ClassVar[int]

    def accumulate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)  # type: ignore[attr-defined,no-any-return]

    def pads(self) -> tuple[int, ...]:
        """(begin of every axis, end of every axis), ONNX order."""
        reversed_twice = self._reversed_padding_repeated_twice  # type: ignore[attr-defined]
        return tuple(reversed_twice[-2::-2]) + tuple(reversed_twice[::-2])

    def operator_attrs(self, x: Operand, out: Operand) -> dict[str, Any]:
        require_batch(x, self.rank)
        return {
            "dilations": tuple(self.dilation),  # type: ignore[arg-type]
            "group": self.groups,
            "kernel_shape": tuple(self.kernel_size),  # type: ignore[arg-type]
            "pads": self.pads() if self.padding_mode == "zeros" else (0,) * (2 * self.rank),
            "strides": tuple(self.stride),  # type: ignore[arg-type]
        }

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        nodes = super().lower(operands, out, call)
        if self.padding_mode == "zeros":
            return nodes
        first = pad.lowered(self.padding_mode, (0, 0), self.pads(), operands[0].bits)
        (conv,) = nodes
        chained = Lowered(
            op_type=conv.op_type, inputs=("%0", *conv.inputs[1:]), attrs=conv.attrs, params=conv.params,
            bits=conv.bits, form=conv.form,
        )  # fmt: skip
        return (first, chained)

    def wide_form(self, q_w: np.ndarray, data_bits: int) -> str:
        return split_form(int(np.prod(q_w.shape[1:])), data_bits, self.parameter_bits)


class Conv1dInt(_ConvInt, nn.Conv1d):
    """``torch.nn.Conv1d`` in fixed point."""

    op_type = "Conv1dInt"
    rank = 1


class Conv2dInt(_ConvInt, nn.Conv2d):
    """``torch.nn.Conv2d`` in fixed point."""

    op_type = "Conv2dInt"
    rank = 2


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
    **_: Any,
) -> np.ndarray:
    """x (N, C, *space), w (O, C/group, *kernel), b (O) int32 -> (N, O, *space) of ``o_bits`` bits; equations (1), (2)."""
    rank = x.ndim - 2
    dilations = dilations or (1,) * rank
    x = np.pad(x, ((0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)))
    reach = tuple(d * (k - 1) + 1 for k, d in zip(w.shape[2:], dilations, strict=True))
    windows = sliding_window_view(x, reach, axis=tuple(range(2, x.ndim)))
    steps = tuple(slice(None, None, s) for s in strides) + tuple(slice(None, None, d) for d in dilations)
    windows = windows[(slice(None), slice(None), *steps)]
    windows = np.moveaxis(windows, 1, 1 + rank)  # N, *out, C, *kernel
    space = windows.shape[: 1 + rank]
    columns = windows.reshape(*space, group, int(np.prod(w.shape[1:])))
    rows = w.reshape(group, w.shape[0] // group, -1)
    acc = np.concatenate([exact_matmul(columns[..., g, :], rows[g].T) for g in range(group)], axis=-1)
    if b is not None:
        acc = acc + b.astype(np.int64)
    return requantize(np.moveaxis(acc, -1, 1), scale_x, scale_w, scale_o, o_bits)


ATTRS = "strides: ints = @strides, pads: ints = @pads, kernel_shape: ints = @kernel_shape, dilations: ints = @dilations, group: int = @group"


def body(rank: int, op: str = "Conv", extra: str = "") -> Any:
    """Body factory for convolutions of ``rank`` spatial axes."""

    def make(form: str, opset: int) -> tuple[str, str]:
        inputs, text = sum_body(form, f"{op} <{ATTRS}{extra}> ({{x}}, {{w}}{{b}})")
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
)

OPS = (
    Op(name="Conv1dInt", run=run, body=body(1), real=real(), integer=Conv1dInt, floats=(nn.Conv1d,), normalized=NormalizeConv1d,
       aliases=("QConv1d",)),
    Op(name="Conv2dInt", run=run, body=body(2), real=real(), integer=Conv2dInt, floats=(nn.Conv2d,), normalized=NormalizeConv2d,
       aliases=("QConv2d", "QConvBN2d")),
)  # fmt: skip

__all__ = ["OPS", "Conv1dInt", "Conv2dInt", "NormalizeConv1d", "NormalizeConv2d", "run"]
