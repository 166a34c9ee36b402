"""ConvTranspose1d, ConvTranspose2d: each input element adds its weighted kernel to the output.

full[n, o, i * stride + k * dilation] += x[n, c, i] * w[c, o, k], then crop the pads, add b        (1)
out = saturate(shift_round(acc, log2(s_x * s_w / s_o)))                                            (2)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from linger.numerics import exact_matmul
from linger.ops._base import Op
from linger.ops._case import Case
from linger.ops._lowered import Operand, require_batch
from linger.ops._normalize import Normalized
from linger.ops._weighted import WeightedInt, requantize, split_form
from linger.ops.conv import body, real


class _ConvTransposeInt(WeightedInt):
    def accumulate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _transposed(self, x, weight, bias)

    def absolute_sum(self, weight: Tensor) -> Tensor:
        groups: int = self.groups  # type: ignore[assignment]
        per_group = weight.abs().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        return per_group.sum((1, 3)).flatten()

    def operator_attrs(self, x: Operand, out: Operand) -> dict[str, Any]:
        require_batch(x, self.weight.dim() - 2)
        return {
            "dilations": tuple(self.dilation),  # type: ignore[arg-type]
            "group": self.groups,
            "kernel_shape": tuple(self.kernel_size),  # type: ignore[arg-type]
            "pads": tuple(self.padding) * 2,  # type: ignore[arg-type]
            "strides": tuple(self.stride),  # type: ignore[arg-type]
            "output_padding": tuple(self.output_padding),  # type: ignore[arg-type]
        }

    def wide_form(self, q_w: np.ndarray, data_bits: int) -> str:
        terms = q_w.size // q_w.shape[1] // self.groups  # type: ignore[operator]
        return split_form(int(terms), data_bits, self.parameter_bits)


def _transposed(m: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    function: Any = F.conv_transpose1d if weight.dim() == 3 else F.conv_transpose2d
    return function(x, weight, bias, m.stride, m.padding, m.output_padding, m.groups, m.dilation)  # type: ignore[no-any-return]


class ConvTranspose1dInt(_ConvTransposeInt, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` in fixed point."""

    op_type = "ConvTranspose1dInt"


class ConvTranspose2dInt(_ConvTransposeInt, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` in fixed point."""

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
    full = np.zeros((x.shape[0], group * outputs, *size), np.int64)
    moved = np.moveaxis(x, 1, -1)
    for offset in np.ndindex(*kernel):
        where = tuple(
            slice(k * d, k * d + (n - 1) * s + 1, s)
            for k, d, n, s in zip(offset, dilations, space, strides, strict=True)
        )
        for g in range(group):
            rows = w[(slice(g * inputs, (g + 1) * inputs), slice(None), *offset)]
            part = exact_matmul(moved[..., g * inputs : (g + 1) * inputs], rows)
            full[(slice(None), slice(g * outputs, (g + 1) * outputs), *where)] += np.moveaxis(part, -1, 1)
    crop = tuple(slice(pads[i], size[i] - pads[rank + i]) for i in range(rank))
    acc = full[(slice(None), slice(None), *crop)]
    if b is not None:
        acc = acc + b.astype(np.int64).reshape(-1, *(1,) * rank)
    return requantize(acc, scale_x, scale_w, scale_o, o_bits)


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
)

OPS = (
    Op(name="ConvTranspose1dInt", run=run, body=body(1, "ConvTranspose", _EXTRA), real=real("ConvTranspose", _EXTRA),
       integer=ConvTranspose1dInt,
       floats=(nn.ConvTranspose1d,), normalized=NormalizeConvTranspose1d, aliases=("QConvTranspose1d",)),
    Op(name="ConvTranspose2dInt", run=run, body=body(2, "ConvTranspose", _EXTRA), real=real("ConvTranspose", _EXTRA),
       integer=ConvTranspose2dInt,
       floats=(nn.ConvTranspose2d,), normalized=NormalizeConvTranspose2d, aliases=("QConvTranspose2d",)),
)  # fmt: skip
