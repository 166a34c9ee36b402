"""While a module's own forward runs: which plain tensors depend on parameters and buffers alone.

``ops/_constant`` holds the tag; this decides who gets it. A product with such a tensor has a weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linger.calls import ALPHA_DROPOUTS, DROPOUTS, PASS, RANDOM, dropout_rate, is_inplace
from linger.numerics import grid_of
from linger.ops import IntModule
from linger.ops._constant import Constant, constant_of, set_constant
from linger.trace import running_tape


class Constants:
    """Of one module: its own parameters and buffers, those of the modules below it, and what is computed from them."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.buffers: list[Tensor] | None = None

    def of(self, x: Tensor) -> Constant | None:
        """What a plain tensor was computed from, if from parameters and buffers alone."""
        found = constant_of(x)
        if found is not None or grid_of(x) is not None:
            return found
        if self.buffers is None:
            inside = [m for m in self.owner.modules() if not isinstance(m, IntModule)]
            self.buffers = [b for m in inside for b in m._buffers.values() if b is not None]
        return Constant((x,)) if any(x is b for b in self.buffers) else None

    def tagged(self, tree: Any) -> Any:
        """The tree with every buffer in it as a tagged alias."""
        if isinstance(tree, (list, tuple)) and not isinstance(tree, torch.Size):
            return type(tree)(self.tagged(v) for v in tree)
        found = self.of(tree) if isinstance(tree, Tensor) and constant_of(tree) is None else None
        if found is None:
            return tree
        alias, tape = tree.detach(), running_tape()
        if tape is not None:
            tape.stands_for(alias, tree)
        return set_constant(alias, found)

    def mark(self, out: Any, func: Any, args: Any, kwargs: Any) -> None:
        """Tag the result of a call on parameters and buffers alone with what it was computed from."""
        given = tensors((*args, *kwargs.values()))
        if not given or func in RANDOM or is_inplace(func, kwargs) or _drops(func, args, kwargs):
            return
        behind: tuple[Tensor, ...] = ()
        for t in given:
            found = self.of(t)
            if found is None:
                return
            behind += tuple(leaf for leaf in found.leaves if not any(leaf is b for b in behind))
        first = self.of(given[0])
        name = first.name if first and PASS.get(func) not in (None, "relu", "max_pool") else None
        for t in tensors(out):
            if not any(t is leaf for leaf in behind):
                set_constant(t, Constant(behind, name if t.numel() == given[0].numel() else None))


def tensors(tree: Any) -> list[Tensor]:
    """Every tensor of nested lists and tuples."""
    if isinstance(tree, Tensor):
        return [tree]
    return [t for v in tree for t in tensors(v)] if isinstance(tree, (list, tuple)) else []


def _drops(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether this is an active dropout."""
    return (func in DROPOUTS or func in ALPHA_DROPOUTS) and dropout_rate(args, kwargs) > 0
