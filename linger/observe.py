"""How a range becomes a grid: the running maximum of |x|, started from the first batch and used in both modes."""

from __future__ import annotations

import math
from contextvars import ContextVar
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from linger.eager import at_hand, extremes, saved_elsewhere
from linger.errors import LingerError
from linger.numerics import NOTHING, SEEN, WIDEST, levels

Spread = tuple[float, float]  # the lowest and the highest value of a tensor on this rank

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


def spread_of(x: Tensor) -> Spread | None:
    """From where to where a tensor reaches; None where a look at it would wait for a device, and for one without elements."""
    return extremes(x) if at_hand(x) and x.numel() else None


def fits(spread: Spread | None, scale: Tensor, bits: int, bound: float | None = None) -> bool:
    """Whether values from ``spread``, where it is known, certainly neither saturate nor leave ``bound``."""
    if spread is None or saved_elsewhere():
        return False
    (low, high), value = spread, scale.item()
    inside = low * value >= -levels(bits) - 1 and high * value <= levels(bits)
    return inside and (bound is None or max(-low, high) <= bound)


def peak(x: Tensor, ahead_relu: bool = False, bound: float | None = None, spread: Spread | None = None) -> Tensor:
    """How far a tensor reaches, the same on every rank.

    Args:
        x: any shape, empty included.
        ahead_relu: only the positive half counts.
        bound: the most that is returned (``normalize_data``).
        spread: ``spread_of(x)``, which saves another look at it.

    Returns:
        max|x| (max of relu(x) with ``ahead_relu``), at most ``bound``, as a 0-d float32; NaN or infinity where ``x``
        holds one, whatever the options; ``EMPTY`` where no rank has an element.
    """
    if spread is not None:
        value = torch.full((), _reach(*spread, ahead_relu, bound), dtype=torch.float32)
    else:
        value = _peak(x.detach(), ahead_relu, bound) if x.numel() else x.new_full((), EMPTY, dtype=torch.float32)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        value = value.nan_to_num(nan=torch.inf, posinf=torch.inf)  # a maximum over ranks may drop a NaN
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def _reach(low: float, high: float, ahead_relu: bool, bound: float | None) -> float:
    """``_peak`` of numbers."""
    reach = max(-low, high) if low == low else low
    if not math.isfinite(reach):
        return reach
    value = max(high, 0.0) if ahead_relu else reach
    return value if bound is None else min(value, bound)


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
    reached = value.item() if at_hand(value) else 0.0
    if not math.isfinite(reached):
        raise LingerError(
            f"the range of {name} is {reached}, allowed are finite values; "
            "lower the learning rate or look for NaN in the data"
        )
    watching = watcher()
    if watching is not None:
        watching.follow(running, value)
    elif at_hand(value) and at_hand(running):
        _follow(running, value, reached)
    else:
        seen = value.clamp_min(NOTHING)
        followed = torch.where(running <= NOTHING, seen, torch.lerp(running, seen, MOMENTUM))
        running.copy_(torch.where(value < 0, running, followed))


def _follow(running: Tensor, value: Tensor, reached: float) -> None:
    """``update`` where both are at hand."""
    if reached < 0:
        return
    seen = value if reached > SEEN else torch.full_like(running, NOTHING)
    if running.item() <= SEEN:
        running.copy_(seen)
    else:
        running.lerp_(seen, MOMENTUM)


def hold_at(running: Tensor, scale: Tensor, bits: int) -> None:
    """Let a running maximum stand for a scale: B / scale, exact."""
    top = levels(min(bits, WIDEST - 1))
    if not (at_hand(scale) and at_hand(running)):
        running.copy_(top / scale)
    elif running.item() != (value := top / scale.item()):
        running.fill_(value)


def stands_for_scale(value: float) -> bool:
    """Whether a running maximum may be one of ``hold_at``, or has seen nothing."""
    return value <= SEEN or any(math.frexp(levels(bits) / value)[0] == 0.5 for bits in (8, 16, WIDEST - 1))


def recomputing() -> bool:
    """Whether gradient checkpointing repeats a forward inside of backward: ranges and statistics have seen the batch."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def wider(given: int, wanted: int) -> float:
    """The factor of the scale where ``given`` bits become ``wanted`` more: the same values, and room below the point."""
    return 2.0 ** max(min(wanted, WIDEST - 1) - min(given, WIDEST - 1), 0)
