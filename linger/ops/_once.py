"""Weights are quantized once in a forward of the whole net, however often it calls their module.

What is kept are values: each call has its own step of autograd, so that its gradients are what they would be without.
Beyond one forward nothing is kept, since ``.data`` changes a weight without a trace; nor for modules that are called once.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linger.eager import same
from linger.numerics import version


class Kept(NamedTuple):
    """A weight and a bias as they were, the scale of the input, and what became of them: integers in real units, and their scale."""

    given: tuple[Tensor, Tensor | None, Tensor]
    versions: tuple[int, ...]
    weight: Tensor
    bias: Tensor | None
    scale: Tensor


# Of the converted net whose forward runs, whatever module it began with: what was kept, by id of a module.
FORWARD: ContextVar[dict[int, Kept | None] | None] = ContextVar("FORWARD", default=None)


def recall(module: Any, weight: Tensor, bias: Tensor | None, s_x: Tensor) -> Kept | None:
    """What an earlier call of this module in this forward kept for the same weight, bias and scale of the input."""
    seen = _running()
    if seen is None:
        return None
    if id(module) not in seen:
        seen[id(module)] = None
        return None
    module.repeats = True
    kept = seen[id(module)]
    if kept is None or kept.versions != _versions(weight, bias):
        return None
    w, b, s = kept.given
    return kept if w is weight and b is bias and (s is s_x or same(s, s_x)) else None


def keep(
    module: Any, given: tuple[Tensor, Tensor | None, Tensor], weight: Tensor, bias: Tensor | None, scale: Tensor
) -> None:
    """Keep what became of ``given`` for later calls, if this module has ever had some."""
    seen = _running()
    if seen is not None and module.repeats:
        held = None if bias is None else bias.detach()
        seen[id(module)] = Kept(given, _versions(*given[:2]), weight.detach(), held, scale)


def _running() -> dict[int, Kept | None] | None:
    return None if torch.compiler.is_compiling() else FORWARD.get()


def _versions(weight: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    return tuple(version(t) for t in (weight, bias) if t is not None)
