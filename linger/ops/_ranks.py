"""Statistics over all ranks of a process group: averages for running ones, exact joint ones with gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def alone(group: Any = None) -> bool:
    """Whether there is no other rank."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1)


def averaged(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """The averages over all ranks: the grid of alpha depends on them, and every rank has the same grids."""
    if alone():
        return mean, var
    both = torch.stack((mean, var))
    dist.all_reduce(both)
    both /= dist.get_world_size()
    return both[0], both[1]


class _Total(torch.autograd.Function):
    """The sum over all ranks; the gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def joint(mean: Tensor, var: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the elements of all ranks, of which this one has ``count`` per channel.

    m = sum n_i m_i / N,   v = sum n_i (v_i + (m_i - m)^2) / N                                         (1)
    """
    if alone(group):
        return mean, var
    if count == 0:  # its statistics are NaN; it takes part in both sums all the same
        mean, var = torch.zeros_like(mean), torch.zeros_like(var)
    sums = _Total.apply(torch.cat((mean * count, mean.new_full((1,), float(count)))), group)
    m, n = sums[:-1] / sums[-1], sums[-1]
    return m, _Total.apply(count * (var + (mean - m).square()), group) / n
