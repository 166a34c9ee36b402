"""Sums of two tensors of one shape on the CPU: every pass but the first finds its block in the cache (``eager``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from linger.eager import at_hand, blocks, saved_elsewhere
from linger.masks import passed
from linger.numerics import Grid, highest, levels, rounded
from linger.observe import Spread


def takes(x: Any, y: Any, bits: int) -> bool:
    """Whether the sum of these operands may be computed here."""
    alike = isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype
    return alike and bits <= 16 and x.dtype == torch.float32 and at_hand(x) and at_hand(y)


def spreads(x: Tensor, y: Tensor, sign: int) -> tuple[Spread, Spread, Spread]:
    """From where to where x, y and x +- y reach; NaN where one is. The tensors have elements."""
    found = []
    for a, b in blocks(x.detach(), y.detach()):
        total = torch.add(a, b, alpha=sign)
        found.append([v.item() for t in (a, b, total) for v in torch.aminmax(t)])
    return hull([(r[0], r[1]) for r in found]), hull([(r[2], r[3]) for r in found]), hull([(r[4], r[5]) for r in found])


def hull(spreads: Sequence[Spread]) -> Spread:
    """From the lowest to the highest of several; NaN where one is."""
    lows, highs = zip(*spreads, strict=True)
    return (min(lows), max(highs)) if sum(lows) == sum(lows) else (math.nan, math.nan)


class _Sum(torch.autograd.Function):
    """``_total`` with the masks of its gradient, where something may saturate."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, sign: int, grid: Grid, exact: tuple[bool, bool], inside: bool, rounding: str
    ) -> Tensor:
        ctx.sign, ctx.exact = sign, exact
        masks = [] if inside else [torch.empty_like(x, dtype=torch.int8) for kept in (*exact, False) if not kept]
        ctx.save_for_backward(*masks)
        return _total(x, y, sign, grid, exact, masks, rounding)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        masks = list(ctx.saved_tensors)
        g = passed(grads[0], masks.pop()) if masks else grads[0]
        sides = [passed(g, masks.pop(0)) if masks and not kept else g for kept in ctx.exact]
        return sides[0], sides[1] if ctx.sign > 0 else -sides[1], None, None, None, None, None


def _total(
    x: Tensor, y: Tensor, sign: int, grid: Grid, exact: tuple[bool, bool], masks: list[Tensor], rounding: str
) -> Tensor:
    """sat(sat(R(x)) +- sat(R(y))) of operands and a grid that is no finer than theirs; ``masks`` are written, if there are any."""
    out = torch.empty_like(x)
    for a, b, result, *seen in blocks(x, y, out, *masks):
        outside = iter(seen)
        a = a if exact[0] else _snapped(a, grid, next(outside, None), rounding)
        b = b if exact[1] else _snapped(b, grid, next(outside, None), rounding)
        _saturated(torch.add(a, b, alpha=sign), grid, next(outside, None), result)
    return out


def _snapped(x: Tensor, grid: Grid, outside: Tensor | None, rounding: str) -> Tensor:
    """A block on the grid, in real units."""
    step = grid.scale.reciprocal()
    v = rounded(x, grid.scale, step, rounding)
    low, high = -levels(grid.bits) - 1, highest(grid.bits)
    if outside is None:
        return v.clamp_(low, high).mul_(step)
    q = v.clamp(low, high)
    outside.copy_(v.ne_(q))
    return q.mul_(step)


def _saturated(total: Tensor, grid: Grid, outside: Tensor | None, result: Tensor) -> None:
    """A block that is on the grid but for its limits."""
    step = 1 / grid.scale.item()
    torch.clamp(total, (-levels(grid.bits) - 1) * step, highest(grid.bits) * step, out=result)
    if outside is not None:
        outside.copy_(total.ne_(result))


def added(
    x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], sign: int, grid: Grid, seen: tuple[Spread, ...] | None,
    rounding: str,
) -> Tensor:  # fmt: skip
    """x + sign * y on ``grid``. ``x`` and ``y`` come with their scales; ``seen`` is what ``spreads`` found, if it looked."""
    exact = (x[1].item() == grid.scale.item(), y[1].item() == grid.scale.item())
    if not (torch.is_grad_enabled() and (x[0].requires_grad or y[0].requires_grad)):
        return _total(x[0], y[0], sign, grid, exact, [], rounding)
    inside = seen is not None and not saved_elsewhere() and _inside(seen, grid)
    return _Sum.apply(x[0], y[0], sign, grid, exact, inside, rounding)  # type: ignore[no-any-return]


def _inside(seen: tuple[Spread, ...], grid: Grid) -> bool:
    """Whether nothing saturates: each operand is rounded by half a step at most."""
    scale, top = grid.scale.item(), levels(grid.bits)
    return all(low * scale >= -top and high * scale <= top - 1 for low, high in seen)
