"""How a range becomes a grid: the running maximum of |x|, started from the first batch and used in both modes."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from linger.errors import LingerError
from linger.numerics import NOTHING

MOMENTUM = 0.1


class Watcher(Protocol):
    """What calibration puts in the place of the running maximum while batches go through the net."""

    def follow(self, running: Tensor, value: Tensor) -> None:
        """Let a range take notice of a peak, in place."""

    def see(self, module: Any, name: str, x: Tensor, ahead_relu: bool, bound: float | None) -> None:
        """Look at a tensor that is to be quantized to the range ``name`` of ``module``."""


WATCHER: ContextVar[Watcher | None] = ContextVar("WATCHER", default=None)


def watcher() -> Watcher | None:
    """The calibration that runs, if one does; none inside of a compiled net."""
    return None if torch.compiler.is_compiling() else WATCHER.get()


EMPTY = -1.0  # the peak of a tensor without elements: below every other, and never followed


def peak(x: Tensor, ahead_relu: bool = False, bound: float | None = None) -> Tensor:
    """How far a tensor reaches, the same on every rank.

    Args:
        x: any shape, empty included.
        ahead_relu: only the positive half counts.
        bound: the most that is returned (``normalize_data``).

    Returns:
        max|x| (max of relu(x) with ``ahead_relu``), at most ``bound``, as a 0-d float32; NaN or infinity where ``x``
        holds one, whatever the options; ``EMPTY`` where no rank has an element.
    """
    value = _peak(x.detach(), ahead_relu, bound) if x.numel() else x.new_full((), EMPTY, dtype=torch.float32)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        value = value.nan_to_num(nan=torch.inf, posinf=torch.inf)  # a maximum over ranks may drop a NaN
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def _peak(x: Tensor, ahead_relu: bool, bound: float | None) -> Tensor:
    low, high = torch.aminmax(x)
    widest = torch.maximum(-low, high).float()
    value = high.float().clamp_min(0) if ahead_relu else widest
    if bound is not None:
        value = value.clamp_max(bound)
    return torch.where(torch.isfinite(widest), value, widest) if ahead_relu or bound is not None else value


def update(running: Tensor, value: Tensor, name: str) -> None:
    """Let a running maximum follow a peak, in place and without host synchronisation.

    running <- value on the first batch that is not all zeros, then 0.9 running + 0.1 value; unchanged by ``EMPTY``.

    Raises:
        LingerError: ``value`` is NaN or infinite. Checked at once on the CPU, elsewhere at the next eval or export.
    """
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.isfinite(value):
        raise LingerError(
            f"the range of {name} is {value.item()}, allowed are finite values; "
            "lower the learning rate or look for NaN in the data"
        )
    watching = watcher()
    if watching is not None:
        watching.follow(running, value)
        return
    seen = value.clamp_min(NOTHING)
    followed = torch.where(running <= NOTHING, seen, torch.lerp(running, seen, MOMENTUM))
    running.copy_(torch.where(value < 0, running, followed))
