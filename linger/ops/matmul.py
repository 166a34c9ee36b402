"""Every spelling of a matrix product, in calls that have a fixed-point form.

A 2-d right factor that is a parameter makes ``F.linear`` of it; equal leading axes are merged into one, so that the chip's
3-d product (``bmm``) serves; a vector gets an axis of size 1. ``outer`` is a product of elements.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from linger.ops._composed import Composed, Router
from linger.ops._constant import constant_of
from linger.ops.bmm import product

SECOND = ("other", "mat2", "vec", "tensor", "vec2")  # what torch calls the second operand


def matmul(route: Router, x: Tensor, y: Tensor) -> Tensor:
    """x (..., M, K) @ y (..., K, N), either also a vector."""
    if x.dim() == 1:
        return torch.matmul(x.unsqueeze(0), y).squeeze(-1 if y.dim() == 1 else -2)
    if y.dim() == 1:
        return torch.matmul(x, y.unsqueeze(1)).squeeze(-1)
    held = [constant_of(t) is not None for t in (x, y)]
    if held == [False, True] and y.dim() == 2:
        return F.linear(x, y.transpose(-2, -1))
    if held.count(True) == 1:
        return route(product, y, left=x) if held[0] else route(product, x, right=y)  # type: ignore[no-any-return]
    if x.dim() > 3 and x.shape[:-2] == y.shape[:-2]:
        merged: Tensor = route(product, x.flatten(0, -3), y.flatten(0, -3))
        return merged.reshape(*x.shape[:-1], y.shape[-1])
    if x.dim() > 2 and y.dim() == 2:
        rows: Tensor = route(product, x.flatten(0, -2), y)
        return rows.reshape(*x.shape[:-1], y.shape[-1])
    return route(product, x, y)  # type: ignore[no-any-return]


def spelled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function(route, x, y)`` called as torch's functions of two operands are."""

    def call(route: Router, x: Tensor, *args: Any, **named: Any) -> Tensor:
        rest = [named.pop(k) for k in SECOND if k in named]
        return function(route, x, *args, *rest, **named)

    return call


def swapped(route: Router, x: Tensor, y: Tensor) -> Tensor:
    """``y @ x``"""
    return matmul(route, y, x)


def added(route: Router, bias: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``beta * bias + alpha * x @ y``: one linear layer where bias and y are parameters of that shape."""
    if constant_of(bias) is not None and constant_of(y) is not None and y.dim() == 2 and bias.shape == y.shape[1:]:
        return F.linear(x, (y if alpha == 1 else y * alpha).transpose(-2, -1), bias if beta == 1 else bias * beta)
    z = torch.matmul(x, y)
    z = z if alpha == 1 else z * alpha
    return z if beta == 0 else (bias if beta == 1 else bias * beta) + z


def outer(route: Router, x: Tensor, y: Tensor) -> Tensor:
    """x (M), y (N) -> (M, N)"""
    return x.unsqueeze(1) * y.unsqueeze(0)


def inner(route: Router, x: Tensor, y: Tensor) -> Tensor:
    """Sum over the last axis of both: x (*A, K), y (*B, K) -> (*A, *B)."""
    if x.dim() == 0 or y.dim() == 0:
        return x * y
    if y.dim() <= 2:
        return torch.matmul(x, y.transpose(-2, -1) if y.dim() == 2 else y)
    size = y.shape[-1]
    return torch.matmul(x.reshape(-1, size), y.reshape(-1, size).transpose(-2, -1)).reshape(
        *x.shape[:-1], *y.shape[:-1]
    )


def vecdot(route: Router, x: Tensor, y: Tensor, *, dim: int = -1) -> Tensor:
    """Sum of x * y over one axis."""
    x, y = x.movedim(dim, -1), y.movedim(dim, -1)
    return torch.matmul(x.unsqueeze(-2), y.unsqueeze(-1)).squeeze(-1).squeeze(-1)


def chained(route: Router, first: Any, *more: Tensor) -> Tensor:
    """The product of several matrices, from the left."""
    return functools.reduce(torch.matmul, (first, *more) if isinstance(first, Tensor) else first)


_TWO: dict[Callable[..., Any], tuple[Callable[..., Any], ...]] = {
    matmul: (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm, torch.mv,
             Tensor.mv, torch.dot, Tensor.dot, torch.vdot, Tensor.vdot, torch.linalg.matmul),
    swapped: (Tensor.__rmatmul__,),
    outer: (torch.outer, Tensor.outer, torch.ger, Tensor.ger),
    inner: (torch.inner, Tensor.inner),
    vecdot: (torch.linalg.vecdot,),
}  # fmt: skip
_MORE: dict[Callable[..., Any], tuple[Callable[..., Any], ...]] = {
    added: (torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm, torch.addmv, Tensor.addmv),
    chained: (torch.linalg.multi_dot, torch.chain_matmul),
}

OPS = ()
COMPOSED = {
    **{c: Composed(function=spelled(f), tag="function_bmm") for f, calls in _TWO.items() for c in calls},
    **{c: Composed(function=f, tag="function_bmm") for f, calls in _MORE.items() for c in calls},
}
