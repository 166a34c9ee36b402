"""Weight and bias on grids that hold every value of them: one step of autograd, and no mask, for nothing saturates."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from linger.eager import at_hand
from linger.numerics import snapped

BIAS_BITS = 32


class _Placed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, s_w: Tensor, s_b: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        return snapped(weight, s_w, bits), snapped(bias, s_b, BIAS_BITS)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return grads[0], grads[1], None, None, None


def placed(weight: Tensor, bias: Tensor, s_w: Tensor, s_b: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Weight (``bits`` bits at ``s_w``) and bias (32 bits at ``s_b``), both with the gradient of the identity."""
    if not (torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad)):
        return snapped(weight, s_w, bits), snapped(bias, s_b, BIAS_BITS)
    if at_hand(weight):
        return _straight(weight, s_w, bits), _straight(bias, s_b, BIAS_BITS)
    return _Placed.apply(weight, bias, s_w, s_b, bits)  # type: ignore[no-any-return]


def _straight(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    return holding(x, snapped(x.detach(), scale, bits))


@overload
def holding(x: Tensor, values: Tensor) -> Tensor: ...
@overload
def holding(x: Tensor | None, values: Tensor | None) -> Tensor | None: ...
def holding(x: Tensor | None, values: Tensor | None) -> Tensor | None:
    """``values`` with the gradient of ``x``: in a clone of it, whose gradient is the identity without a step in Python."""
    if x is None or values is None or not (x.requires_grad and torch.is_grad_enabled()):
        return values
    out = x.clone()
    out.detach().copy_(values)
    return out
