"""ConvTranspose1d, ConvTranspose2d: each input element adds its weighted kernel to the output.

full[n, o, i * stride + k * dilation] += x[n, c, i] * w[c, o, k], then crop the pads, add b        (1)
out = saturate(shift_round(acc, log2(s_x * s_w / s_o)))                                            (2)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from linger.numerics import exact_matmul
from linger.ops._base import Op
from linger.ops._case import Case, Holder
from linger.ops._composed import Composed
from linger.ops._lowered import Operand, require_batch
from linger.ops._normalize import Normalized
from linger.ops._weighted import WeightedInt, WeightedSite, requantize
from linger.ops._weighted_text import split_form
from linger.ops.conv import body, composed, each, real
from linger.rounding import HALF_UP


@dataclass(frozen=True, kw_only=True)
class Transposed:
    """``Product`` of a transposed convolution with these arguments, one number per axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    dilation: tuple[int, ...]
    transposed: bool = True

    def accumulate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        function: Any = F.conv_transpose1d if weight.dim() == 3 else F.conv_transpose2d
        return function(  # type: ignore[no-any-return]
            x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )

    def absolute_sum(self, weight: Tensor) -> Tensor:
        per_group = weight.abs().reshape(self.groups, weight.shape[0] // self.groups, weight.shape[1], -1)
        return per_group.sum((1, 3)).flatten()

    def attrs(self, weight: tuple[int, ...], x: Operand) -> dict[str, Any]:
        require_batch(x, len(weight) - 2)
        return {
            "dilations": self.dilation,
            "group": self.groups,
            "kernel_shape": weight[2:],
            "pads": self.padding * 2,
            "strides": self.stride,
            "output_padding": self.output_padding,
        }

    def wide_form(self, weight: tuple[int, ...], data_bits: int, parameter_bits: int) -> str:
        return split_form(math.prod(weight) // weight[1] // self.groups, data_bits, parameter_bits)


def _of(m: Any) -> Transposed:
    """The arguments of a layer."""
    return Transposed(
        stride=tuple(m.stride), padding=tuple(m.padding), output_padding=tuple(m.output_padding), groups=m.groups,
        dilation=tuple(m.dilation),
    )  # fmt: skip


def _transposed(m: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _of(m).accumulate(x, weight, bias)


class _ConvTransposeInt(WeightedInt):
    def product(self) -> Transposed:
        return _of(self)


class ConvTranspose1dInt(_ConvTransposeInt, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` in fixed point."""

    op_type = "ConvTranspose1dInt"


class ConvTranspose2dInt(_ConvTransposeInt, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` in fixed point."""

    op_type = "ConvTranspose2dInt"


class _ConvTransposeSite(WeightedSite):
    @staticmethod
    def product(weight: tuple[int, ...], call: Mapping[Any, Any]) -> Transposed:
        rank = len(weight) - 2
        return Transposed(
            stride=each(call.get("stride", 1), rank),
            padding=each(call.get("padding", 0), rank),
            output_padding=each(call.get("output_padding", 0), rank),
            groups=int(call.get("groups", 1)),
            dilation=each(call.get("dilation", 1), rank),
        )


class ConvTranspose1dSite(_ConvTransposeSite):
    """``F.conv_transpose1d`` with a weight of the net."""

    op_type = "ConvTranspose1dInt"


class ConvTranspose2dSite(_ConvTransposeSite):
    """``F.conv_transpose2d`` with a weight of the net."""

    op_type = "ConvTranspose2dInt"


class _NormalizeConvTranspose(Normalized):
    def forward(self, x: Tensor) -> Tensor:
        return self.bound_output(_transposed(self, x, *self.bounded()))


class NormalizeConvTranspose1d(_NormalizeConvTranspose, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` whose weight, bias and output stay within bounds."""


class NormalizeConvTranspose2d(_NormalizeConvTranspose, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` whose weight, bias and output stay within bounds."""


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
    output_padding: tuple[int, ...] | None = None,
    dilations: tuple[int, ...] | None = None,
    group: int = 1,
    o_bits: int = 8,
    rounding: str = HALF_UP,
    **_: Any,
) -> np.ndarray:
    """x (N, C, *space), w (C, O/group, *kernel), b (O) int32 -> (N, O, *space); equations (1), (2)."""
    rank = x.ndim - 2
    dilations, extra = dilations or (1,) * rank, output_padding or (0,) * rank
    kernel, space = w.shape[2:], x.shape[2:]
    outputs, inputs = w.shape[1], w.shape[0] // group
    size = [
        (n - 1) * s + d * (k - 1) + 1 + e
        for n, s, d, k, e in zip(space, strides, dilations, kernel, extra, strict=True)
    ]
    full = np.zeros((group * outputs, *size, len(x)), np.int64)  # the batch is last: rows are long
    columns = np.moveaxis(x, 0, -1).reshape(group, inputs, math.prod(space) * len(x)).swapaxes(1, 2)
    for offset in np.ndindex(*kernel):
        where = tuple(
            slice(k * d, k * d + (n - 1) * s + 1, s)
            for k, d, n, s in zip(offset, dilations, space, strides, strict=True)
        )
        part = exact_matmul(columns, w[(slice(None), slice(None), *offset)].reshape(group, inputs, outputs))
        full[(slice(None), *where)] += part.swapaxes(1, 2).reshape(group * outputs, *space, len(x))
    crop = tuple(slice(pads[i], size[i] - pads[rank + i]) for i in range(rank))
    acc = np.moveaxis(full[(slice(None), *crop)], -1, 0)
    if b is not None:
        acc = acc + b.astype(np.int64).reshape(-1, *(1,) * rank)
    return requantize(acc, scale_x, scale_w, scale_o, o_bits, rounding)


_EXTRA = ", output_padding: ints = @output_padding"


def _case(name: str, rank: int, space: tuple[int, ...], *args: Any, **options: Any) -> Case:
    layer = nn.ConvTranspose2d if rank == 2 else nn.ConvTranspose1d
    return Case(name=name, make=lambda: layer(*args, **options), shapes=((2, args[0], *space),))


CASES = (
    _case("transposed1d", 1, (20,), 3, 4, 4, stride=2, padding=1),
    _case("transposed1d-groups", 1, (15,), 4, 6, 3, stride=3, groups=2, output_padding=2, bias=False),
    _case("transposed2d", 2, (6, 7), 4, 3, 2, stride=2),
    _case(
        "transposed2d-groups", 2, (5, 6), 4, 8, (3, 2), stride=(2, 1), groups=2, padding=(1, 0), output_padding=(1, 0)
    ),
    _case("transposed2d-dilated", 2, (5, 5), 3, 2, 3, dilation=2, padding=1),
    _case("transposed2d-depthwise", 2, (5, 5), 4, 4, 3, groups=4, stride=2, bias=False),
    Case(
        name="call-transposed1d",
        make=lambda: Holder(lambda x, w, b: F.conv_transpose1d(x, w, b, 2, 1, 1, groups=2), (4, 3, 3), (6,)),
        shapes=((2, 4, 15),),
    ),
    Case(
        name="call-transposed2d",
        make=lambda: Holder(lambda x, w: F.conv_transpose2d(x, w, None, (2, 1), (1, 0), (1, 0), 1, 2), (3, 4, 3, 2)),
        shapes=((2, 3, 5, 6),),
    ),
)

NAMES = ("weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")

OPS = (
    Op(name="ConvTranspose1dInt", run=run, body=body(1, "ConvTranspose", _EXTRA), real=real("ConvTranspose", _EXTRA),
       integer=ConvTranspose1dInt,
       floats=(nn.ConvTranspose1d,), normalized=NormalizeConvTranspose1d, aliases=("QConvTranspose1d",)),
    Op(name="ConvTranspose2dInt", run=run, body=body(2, "ConvTranspose", _EXTRA), real=real("ConvTranspose", _EXTRA),
       integer=ConvTranspose2dInt,
       floats=(nn.ConvTranspose2d,), normalized=NormalizeConvTranspose2d, aliases=("QConvTranspose2d",)),
    Op(name="conv_transpose1d", run=run, body=body(1, "ConvTranspose", _EXTRA), real=real("ConvTranspose", _EXTRA),
       integer=ConvTranspose1dSite, site="conv_transpose1d", calls=(F.conv_transpose1d,), names={F.conv_transpose1d: NAMES}),
    Op(name="conv_transpose2d", run=run, body=body(2, "ConvTranspose", _EXTRA), real=real("ConvTranspose", _EXTRA),
       integer=ConvTranspose2dSite, site="conv_transpose2d", calls=(F.conv_transpose2d,), names={F.conv_transpose2d: NAMES}),
)  # fmt: skip

COMPOSED = {
    F.conv_transpose1d: Composed(function=composed(F.conv_transpose1d), tag="conv_transpose1d", layer=True),
    F.conv_transpose2d: Composed(function=composed(F.conv_transpose2d), tag="conv_transpose2d", layer=True),
}
