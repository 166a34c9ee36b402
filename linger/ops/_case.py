"""Ways to use an op, as data: the generic tests run every property on every case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """``make()`` returns a float layer, or a function of tensors; ``shapes`` are those of its inputs with the batch axis.

    ``bits``: the widths of activations it is tested at. ``divisor``: the last input must not be near zero.
    ``targets``: the chips whose arithmetic differs, each of which is tested.
    """

    name: str
    make: Callable[[], Callable[..., Any]]
    shapes: tuple[tuple[int, ...], ...]
    bits: tuple[int, ...] = (8, 16)
    divisor: bool = False
    targets: tuple[str, ...] = ("venus",)
