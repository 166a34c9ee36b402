"""Calls made of other calls, each with a form of its own. ``route.call(func, args, kwargs)`` makes one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _stack(route: Any, tensors: Sequence[Tensor], dim: int = 0) -> Any:
    return route.call(torch.cat, ([route.call(torch.unsqueeze, (t, dim), {}) for t in tensors], dim), {})


def _side_by_side(rank: int, dim: int, last: bool = False) -> Callable[..., Any]:
    """hstack, vstack, dstack, column_stack: torch.cat of tensors brought to ``rank`` axes."""

    def made_of(route: Any, tensors: Sequence[Tensor]) -> Any:
        parts = list(tensors)
        for i, t in enumerate(parts):
            if t.dim() == 1 and rank > 1:
                parts[i] = route.call(torch.unsqueeze, (t, 1 if last else 0), {})
            if t.dim() == 2 and rank == 3:
                parts[i] = route.call(torch.unsqueeze, (t, 2), {})
        return route.call(torch.cat, (parts, dim if parts[0].dim() > 1 else 0), {})

    return made_of


def _broadcast(route: Any, *tensors: Any) -> Any:
    flat = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)) else tensors
    shape = torch.broadcast_shapes(*(t.shape for t in flat))
    return tuple(route.call(Tensor.expand, (t, *shape), {}) for t in flat)


def _spread_and_mean(spread: Callable[..., Any]) -> Callable[..., Any]:
    """var_mean and std_mean: the two calls that they stand for."""

    def made_of(route: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(("dim", "unbiased", "keepdim"), args, strict=False)) | kwargs
        if isinstance(given.get("dim"), bool):
            given["unbiased"] = given.pop("dim")
        of_mean = {k: v for k, v in given.items() if k in ("dim", "keepdim")}
        return route.call(spread, (x,), given), route.call(torch.mean, (x,), of_mean)

    return made_of


MADE_OF: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.stack: _stack,
    torch.hstack: _side_by_side(1, 1),
    torch.vstack: _side_by_side(2, 0),
    torch.row_stack: _side_by_side(2, 0),
    torch.dstack: _side_by_side(3, 2),
    torch.column_stack: _side_by_side(2, 1, last=True),
    torch.broadcast_tensors: _broadcast,
    torch.var_mean: _spread_and_mean(torch.var),
    torch.std_mean: _spread_and_mean(torch.std),
}
