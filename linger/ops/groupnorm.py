"""Group and instance normalization: rows of all elements of a group of channels, then a factor and a term per channel.

The equations are those of ``_norm``, with T = (C / groups) * elements per channel; an instance is a group of one channel.
No chip has a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linger.errors import LingerError
from linger.ops._base import Op
from linger.ops._case import Case
from linger.ops._norm import CHIP_EPS, NORMAL, Rows, body, check_rows, real, run_affine, run_rows
from linger.ops._norm_module import Norm, NormalizedNorm, NormInt, NormSite


def group_norm(shape: Sequence[int], groups: int, eps: float, bits: int, axis: int = 1) -> Norm:
    """``F.group_norm`` of a tensor whose channels are on ``axis``, 1 or, without a batch axis, 0.

    Raises:
        LingerError: there are no channels, the groups do not divide them, or rows are too long.
    """
    if len(shape) <= axis or shape[axis] % groups:
        raise LingerError(
            f"found an input of shape {tuple(shape)}, allowed are those whose axis {axis} is a multiple of num_groups {groups}; "
            "change num_groups"
        )
    space = [int(n) for n in shape[axis + 1 :]]
    channels = int(shape[axis])
    length = channels // groups * math.prod(space)
    check_rows(length, bits, eps)
    rows = Rows(
        length=length, eps=float(eps), cut=(*shape[:axis], groups, length), affine=(channels, *[1] * len(space)), keep=axis
    )  # fmt: skip
    attrs = {"num_groups": groups, "axis": axis}
    return Norm(rows=rows, ideal=lambda x, w, b: F.group_norm(x, groups, w, b, eps), attrs=attrs)


def instance_norm(shape: Sequence[int], eps: float, bits: int, axis: int = 1) -> Norm:
    """``F.instance_norm`` with the statistics of the input; as in PyTorch, a channel of one element is an error."""
    if len(shape) < axis + 2 or math.prod([int(n) for n in shape[axis + 1 :]]) == 1:
        raise LingerError(
            f"found an input of shape {tuple(shape)}, allowed are those with more than one element per channel; "
            "keep this layer in float with disable_quant"
        )
    of_groups = group_norm(shape, int(shape[axis]), eps, bits, axis)

    def ideal(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        y = F.instance_norm(x if axis else x.unsqueeze(0), None, None, w, b, True, 0.0, eps)
        return y if axis else y.squeeze(0)

    return replace(of_groups, ideal=ideal)


class _GroupNorm(NormInt):
    op_type = "GroupNormInt"


class GroupNormInt(_GroupNorm, nn.GroupNorm):
    """``torch.nn.GroupNorm`` in fixed point."""

    def norm(self, shape: Sequence[int], bits: int) -> Norm:
        return group_norm(shape, self.num_groups, self.eps, bits)


class NormalizeGroupNorm(NormalizedNorm, nn.GroupNorm):
    """``torch.nn.GroupNorm`` whose weight, bias and output stay within bounds."""

    def norm(self, shape: Sequence[int], bits: int) -> Norm:
        return group_norm(shape, self.num_groups, self.eps, bits)


def _of_layer(layer: Any, shape: Sequence[int], bits: int) -> Norm:
    """An instance normalization layer on an input with or without a batch axis."""
    axis = len(shape) - layer._get_no_batch_dim()
    if axis not in (0, 1) or int(shape[axis]) != layer.num_features:
        raise LingerError(
            f"found an input of shape {tuple(shape)}, allowed are {layer.num_features} channels on axis 1 and "
            f"{layer._get_no_batch_dim() - 1} axes behind them, or the same without a batch axis; change num_features"
        )
    return instance_norm(shape, layer.eps, bits, axis)


class _InstanceNormInt(_GroupNorm):
    @classmethod
    def refuses(cls, source: Any) -> str:
        return "track_running_stats=True normalizes with other statistics in eval" if source.track_running_stats else ""

    def norm(self, shape: Sequence[int], bits: int) -> Norm:
        return _of_layer(self, shape, bits)


class InstanceNorm1dInt(_InstanceNormInt, nn.InstanceNorm1d):
    """``torch.nn.InstanceNorm1d`` in fixed point."""


class InstanceNorm2dInt(_InstanceNormInt, nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d`` in fixed point."""


class InstanceNorm3dInt(_InstanceNormInt, nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d`` in fixed point."""


class _NormalizeInstanceNorm(NormalizedNorm):
    def forward(self, x: Tensor) -> Tensor:
        if self.track_running_stats:
            return self.bound_output(nn.modules.instancenorm._InstanceNorm.forward(self, x))  # type: ignore[arg-type]
        return super().forward(x)

    def norm(self, shape: Sequence[int], bits: int) -> Norm:
        return _of_layer(self, shape, bits)


class NormalizeInstanceNorm1d(_NormalizeInstanceNorm, nn.InstanceNorm1d):
    """``torch.nn.InstanceNorm1d`` whose weight, bias and output stay within bounds."""


class NormalizeInstanceNorm2d(_NormalizeInstanceNorm, nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d`` whose weight, bias and output stay within bounds."""


class NormalizeInstanceNorm3d(_NormalizeInstanceNorm, nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d`` whose weight, bias and output stay within bounds."""


class GroupNormSite(NormSite):
    """``F.group_norm`` with parameters of the net or without."""

    op_type = "GroupNormInt"

    @classmethod
    def norm(cls, shape: Sequence[int], bits: int, **call: Any) -> Norm:
        return group_norm(shape, call["num_groups"], call.get("eps", 1e-5), bits)


class InstanceNormSite(NormSite):
    """``F.instance_norm`` with the statistics of the input."""

    op_type = "GroupNormInt"

    @classmethod
    def takes(cls, x: Any = None, *args: Any, **call: Any) -> bool:
        tracked = call.get("running_mean") is not None or not call.get("use_input_stats", True)
        return not tracked and super().takes(x, *args, **call)

    @classmethod
    def norm(cls, shape: Sequence[int], bits: int, **call: Any) -> Norm:
        return instance_norm(shape, call.get("eps", 1e-5), bits)


def run(
    x: np.ndarray, w: np.ndarray, b: np.ndarray, *, num_groups: int, axis: int = 1, scale_x: float, scale_w: float,
    scale_o: float, epsilon: float = CHIP_EPS, o_bits: int = 8, **_: Any,
) -> np.ndarray:  # fmt: skip
    """x (N, C, *) with ``axis`` 1 or (C, *) with 0; w (C), b (C) int32 at 2^10 * scale_w."""
    channels = x.shape[axis]
    length = channels // num_groups * math.prod(x.shape[axis + 1 :])
    rows = x.reshape(*x.shape[:axis], num_groups, length)
    y = run_rows(rows, scale_x=scale_x, eps=epsilon, centred=True, bits=32).reshape(x.shape)
    shape = (channels, *[1] * (x.ndim - axis - 1))
    return run_affine(y, w.reshape(shape), b.reshape(shape), scale_w, scale_o, o_bits)


NAMES = ("num_groups", "weight", "bias", "eps", "cudnn_enabled")
INSTANCE: dict[Any, tuple[str, ...]] = {
    F.instance_norm: ("running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
    torch.instance_norm: (
        "weight", "bias", "running_mean", "running_var", "use_input_stats", "momentum", "eps", "cudnn_enabled",
    ),
}  # fmt: skip

CASES = (
    Case(name="groupnorm", make=lambda: nn.GroupNorm(2, 6), shapes=((2, 6, 3, 4),)),
    Case(name="groupnorm-1d", make=lambda: nn.GroupNorm(3, 6, eps=0.1, affine=False), shapes=((3, 6, 9),)),
    Case(name="groupnorm-no-space", make=lambda: nn.GroupNorm(2, 8), shapes=((3, 8),)),
    Case(name="groupnorm-function", make=lambda: lambda x: F.group_norm(x, 2), shapes=((2, 4, 2, 3, 2),)),
    Case(name="instancenorm1d", make=lambda: nn.InstanceNorm1d(4, affine=True), shapes=((2, 4, 15),)),
    Case(name="instancenorm2d", make=lambda: nn.InstanceNorm2d(3), shapes=((2, 3, 5, 4),)),
    Case(name="instancenorm-function", make=lambda: lambda x: F.instance_norm(x, eps=1e-3), shapes=((2, 3, 4, 4),)),
)

OPS = (
    Op(name="GroupNormInt", run=run, body=body, real=real, half_up=True, integer=GroupNormInt, floats=(nn.GroupNorm,),
       normalized=NormalizeGroupNorm, bias_at=NORMAL),
    Op(name="group_norm", run=run, body=body, real=real, half_up=True, integer=GroupNormSite, site="iqgroupnorm",
       calls=(F.group_norm, torch.group_norm), names={F.group_norm: NAMES, torch.group_norm: NAMES}),
    Op(name="InstanceNorm1dInt", run=run, body=body, real=real, half_up=True, integer=InstanceNorm1dInt, floats=(nn.InstanceNorm1d,),
       normalized=NormalizeInstanceNorm1d),
    Op(name="InstanceNorm2dInt", run=run, body=body, real=real, half_up=True, integer=InstanceNorm2dInt, floats=(nn.InstanceNorm2d,),
       normalized=NormalizeInstanceNorm2d),
    Op(name="InstanceNorm3dInt", run=run, body=body, real=real, half_up=True, integer=InstanceNorm3dInt, floats=(nn.InstanceNorm3d,),
       normalized=NormalizeInstanceNorm3d),
    Op(name="instance_norm", run=run, body=body, real=real, half_up=True, integer=InstanceNormSite, site="iqinstancenorm",
       calls=tuple(INSTANCE), names=INSTANCE),
)  # fmt: skip
