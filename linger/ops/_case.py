"""Ways to use an op, as data: the generic tests run every property on every case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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


class Holder(nn.Sequential):
    """A function of the inputs and of parameters of these shapes. No leaf to the recorder, as a layer of linger would be."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for i, shape in enumerate(shapes):
            self.register_parameter(f"w{i}", nn.Parameter(torch.randn(shape) / 2))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, *(getattr(self, name) for name in self._parameters))
