"""Calls that pick values of one tensor: they keep its grid. Their indices are int64 and have none.

On a grid equal values are common, so which of them is picked is fixed: the first. torch.argmax does that; torch.topk and
torch.sort leave it open, so on a grid they are run as stable sorts, which is what the exported TopK computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from linger.masks import relu, relu_

T: Any = Tensor
Call = Callable[..., Any]

SELECTS: dict[Call, str] = {
    torch.max: "max", T.max: "max", torch.min: "min", T.min: "min", torch.amax: "amax", T.amax: "amax",
    torch.amin: "amin", T.amin: "amin", torch.argmax: "argmax", T.argmax: "argmax", torch.argmin: "argmin",
    T.argmin: "argmin", torch.topk: "topk", T.topk: "topk", torch.sort: "sort", T.sort: "sort", torch.msort: "msort",
    T.msort: "msort", torch.argsort: "argsort", T.argsort: "argsort",
    F.adaptive_max_pool1d: "adaptive_max_pool", F.adaptive_max_pool2d: "adaptive_max_pool",
}  # fmt: skip
PAIRED = {torch.max, T.max, torch.min, T.min}  # of two tensors: see ``where``


def selects(func: Call, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether the call's values lie on the grid of its first operand."""
    second = args[1] if len(args) > 1 else kwargs.get("other")
    return func in SELECTS and not (func in PAIRED and isinstance(second, Tensor))


def stable(func: Call) -> Call:
    """The function to run on gridded operands: of equal values, the first is picked; relu has a gradient for every compiler."""
    return STABLE.get(func, func)


def _extreme(call: Call, pick: Call) -> Call:
    """max or min over one dimension, with the index of the first extreme value."""

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(("dim", "keepdim"), args, strict=False)) | kwargs
        dim = given.get("dim", given.get("axis"))
        if not isinstance(dim, int) or not x.dim():
            return call(x, *args, **kwargs)
        indices = pick(x.detach(), dim=dim, keepdim=True)
        values, keep = x.gather(dim, indices), given.get("keepdim", False)
        pair = (values, indices) if keep else (values.squeeze(dim), indices.squeeze(dim))
        return RETURNS[call](pair)

    return run


def _topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    values, indices = torch.sort(x, dim=dim, descending=largest, stable=True)
    return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))


def _sort(x: Tensor, dim: int = -1, descending: bool = False, stable: bool = True) -> Any:
    return torch.sort(x, dim=dim, descending=descending, stable=True)


def _argsort(x: Tensor, dim: int = -1, descending: bool = False, stable: bool = True) -> Any:
    return _sort(x, dim, descending).indices


RETURNS: dict[Call, Any] = {torch.max: torch.return_types.max, torch.min: torch.return_types.min}
_MAX, _MIN = _extreme(torch.max, torch.argmax), _extreme(torch.min, torch.argmin)
STABLE: dict[Call, Call] = {
    torch.max: _MAX, T.max: _MAX, torch.min: _MIN, T.min: _MIN, torch.topk: _topk, T.topk: _topk, torch.sort: _sort,
    T.sort: _sort, torch.argsort: _argsort, T.argsort: _argsort, F.relu: relu, torch.relu: relu, T.relu: relu,
    F.relu_: relu_, torch.relu_: relu_, T.relu_: relu_,
}  # fmt: skip
