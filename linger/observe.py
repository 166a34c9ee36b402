"""How a range becomes a grid: the running maximum of |x|, started from the first batch and used in both modes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from linger.errors import LingerError
from linger.numerics import NOTHING

MOMENTUM = 0.1


def peak(x: Tensor, ahead_relu: bool = False, bound: float | None = None) -> Tensor:
    """max|x| (max of relu(x) with ``ahead_relu``), at most ``bound``, as a 0-d float32; the maximum over all ranks."""
    if x.numel() == 0:
        return x.new_zeros((), dtype=torch.float32)
    low, high = torch.aminmax(x.detach())
    value = (high.clamp_min(0) if ahead_relu else torch.maximum(-low, high)).float()
    if bound is not None:
        value = value.clamp_max(bound)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def update(running: Tensor, value: Tensor, name: str) -> None:
    """running <- value on the first batch that is not all zeros, then 0.9 running + 0.1 value, in place and without host synchronisation.

    Raises:
        LingerError: ``value`` is NaN or infinite. Checked at once on the CPU, elsewhere at the next eval or export.
    """
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.isfinite(value):
        raise LingerError(
            f"the range of {name} is {value.item()}, allowed are finite values; "
            "lower the learning rate or look for NaN in the data"
        )
    value = value.clamp_min(NOTHING)
    running.copy_(torch.where(running <= NOTHING, value, torch.lerp(running, value, MOMENTUM)))
