"""Convolution and batch normalization as one layer: float in training, one convolution in fixed point.

    W' = W * gamma / sqrt(var + eps),   b' = (b - mean) * gamma / sqrt(var + eps) + beta               (1)

with the batch normalization's own eps. Training computes bn(conv(x)); the bounds act on W' and b' (``upstream`` 6.3).
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from linger.errors import LingerError
from linger.numerics import bound_parameter
from linger.ops._base import twin
from linger.ops._case import Case
from linger.ops._normalize import Normalized
from linger.ops.conv import Conv1dInt, Conv2dInt
from linger.ops.conv_transpose import ConvTranspose1dInt, ConvTranspose2dInt, _transposed


class EmptyBatchNorm(nn.Module):
    """What is left where a batch normalization stood. It has no parameter and accepts upstream's dummy one."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        state_dict.pop(f"{prefix}_linger_ignore_parameter", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Pull(torch.autograd.Function):
    """0 in forward; in backward the constant +-0.01 where ``v`` is outside its bound, whatever comes in."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward((v > bound).to(v.dtype) - (v < -bound).to(v.dtype))
        return v.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (outside,) = ctx.saved_tensors
        return outside * 0.01, None


def folded(
    weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor,
    eps: float, transposed: bool = False, groups: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Equation (1): (W', b')."""
    alpha = torch.rsqrt(var + eps) if gamma is None else gamma * torch.rsqrt(var + eps)
    new_bias = (-mean if bias is None else bias - mean) * alpha
    if beta is not None:
        new_bias = new_bias + beta
    ones = [1] * (weight.dim() - 2)
    if transposed:
        per_group = weight.reshape(groups, -1, *weight.shape[1:]) * alpha.reshape(groups, 1, -1, *ones)
        return per_group.reshape(weight.shape), new_bias
    return weight * alpha.reshape(-1, 1, *ones), new_bias


class _ConvBN(Normalized):
    integer: ClassVar[type[nn.Module]]
    conv: Any
    bn: Any

    def __init__(self, conv: nn.Module, bn: nn.Module, **bounds: Any) -> None:
        super().__init__()
        self.conv, self.bn = conv, bn
        self.training = conv.training
        self.start(**bounds)

    def fold(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution that equals conv followed by bn with these statistics."""
        return folded(
            self.conv.weight, self.conv.bias, self.bn.weight, self.bn.bias, mean, var, self.bn.eps,
            self.conv.transposed, self.conv.groups,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if self.training or (self.normalize_weight is None and self.normalize_bias is None):
            y = self.bn(self.conv(x))
            if self.training and self.bn.running_var is not None:
                y = self._pulled(y)
            return self.bound_output(y)
        weight, bias = self.fold(self.bn.running_mean, self.bn.running_var)
        weight, bias = bound_parameter(weight, self.normalize_weight), bound_parameter(bias, self.normalize_bias)
        if self.conv.transposed:
            return self.bound_output(_transposed(self.conv, x, weight, bias))
        return self.bound_output(self.conv._conv_forward(x, weight, bias))

    def _pulled(self, y: Tensor) -> Tensor:
        if self.normalize_weight is None and self.normalize_bias is None:
            return y
        weight, bias = self.fold(self.bn.running_mean.clone(), self.bn.running_var.clone())
        if self.normalize_weight is not None:
            y = y + _Pull.apply(weight, float(self.normalize_weight))
        if self.normalize_bias is not None:
            y = y + _Pull.apply(bias, float(self.normalize_bias))
        return y

    def extra_repr(self) -> str:
        return self.bounds_repr()

    def __repr__(self) -> str:
        """The same tree under every version of PyTorch: newer ones print the batch normalization's ``bias`` too."""
        return re.sub(r"(affine=\w+), bias=\w+", r"\1", super().__repr__())

    @torch.no_grad()
    def to_integer(self, **settings: Any) -> nn.Module:
        """The fixed-point convolution with the folded weights; the parameter objects are those of conv and bn."""
        if self.bn.running_var is None:
            raise LingerError(
                "track_running_stats is False, so there is nothing to fold; keep the layers apart (fuse_bn=False)"
            )
        weight, bias = self.fold(self.bn.running_mean, self.bn.running_var)
        new = twin(self.integer, self.conv)
        new.weight.data = weight
        if new.bias is None:
            new.bias = self.bn.bias if self.bn.bias is not None else nn.Parameter(bias)
        new.bias.data = bias
        new.training = self.training
        new.start(**settings)
        return new  # type: ignore[no-any-return]


class NormalizeConvBN1d(_ConvBN):
    """Conv1d followed by BatchNorm1d."""

    integer = Conv1dInt


class NormalizeConvBN2d(_ConvBN):
    """Conv2d followed by BatchNorm2d."""

    integer = Conv2dInt


class NormalizeConvTransposeBN1d(_ConvBN):
    """ConvTranspose1d followed by BatchNorm1d."""

    integer = ConvTranspose1dInt


class NormalizeConvTransposeBN2d(_ConvBN):
    """ConvTranspose2d followed by BatchNorm2d."""

    integer = ConvTranspose2dInt


FUSED: dict[tuple[type[nn.Module], type[nn.Module]], type[_ConvBN]] = {
    (nn.Conv1d, nn.BatchNorm1d): NormalizeConvBN1d,
    (nn.Conv2d, nn.BatchNorm2d): NormalizeConvBN2d,
    (nn.ConvTranspose1d, nn.BatchNorm1d): NormalizeConvTransposeBN1d,
    (nn.ConvTranspose2d, nn.BatchNorm2d): NormalizeConvTransposeBN2d,
    (nn.Conv1d, nn.SyncBatchNorm): NormalizeConvBN1d,
    (nn.Conv2d, nn.SyncBatchNorm): NormalizeConvBN2d,
    (nn.ConvTranspose1d, nn.SyncBatchNorm): NormalizeConvTransposeBN1d,
    (nn.ConvTranspose2d, nn.SyncBatchNorm): NormalizeConvTransposeBN2d,
}


class _ConvThenNorm(nn.Sequential):
    """A convolution and its batch normalization with statistics that are not those of a new one."""

    def __init__(self, conv: nn.Module, norm: Any, gamma: float = 1.0) -> None:
        super().__init__(conv, norm)
        with torch.no_grad():
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.2, 2.0)
            if norm.weight is not None:
                norm.weight.normal_().mul_(gamma)


def _case(name: str, channels: int, space: tuple[int, ...], make: Any) -> Case:
    return Case(name=name, make=make, shapes=((2, channels, *space),))


CASES = (
    _case("conv-bn1d", 3, (20,), lambda: _ConvThenNorm(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4, eps=1e-3))),
    _case("conv-bn2d", 3, (8, 8), lambda: _ConvThenNorm(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5))),
    _case("conv-bn-gamma-0", 3, (8, 8), lambda: _ConvThenNorm(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), 0.0)),
    _case("conv-bn-plain", 3, (8, 8), lambda: _ConvThenNorm(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False))),
    _case("transposed-bn1d", 4, (9,), lambda: _ConvThenNorm(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6))),
    _case("transposed-bn2d", 3, (6, 6), lambda: _ConvThenNorm(nn.ConvTranspose2d(3, 4, 2, 2), nn.BatchNorm2d(4))),
)

OPS = ()
