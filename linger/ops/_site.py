"""A site: the named child module that one functional call (``a + b``, ``torch.cat``) is routed to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from linger.numerics import grid_of, scalar_scale
from linger.ops._base import IntModule
from linger.ops._lowered import Lowered, Operand


class Site(IntModule):
    """State of one functional call. Operands may be gridded tensors, plain float tensors and Python numbers."""

    observed: ClassVar[tuple[str, ...]] = ("o",)
    op_type: ClassVar[str]
    used = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.used and not torch.compiler.is_compiling():
            self.used = True
        return super().__call__(*args, **kwargs)

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.start(device=device)

    @classmethod
    def takes(cls, *args: Any, **kwargs: Any) -> bool:
        """Whether this call has a fixed-point form; a call that has none is a float island."""
        return True

    def width(self, *operands: Any) -> int:
        """The widest grid among the operands: the narrower ones are brought up to it."""
        return max([8, *(g.bits for g in map(grid_of, operands) if g is not None)])

    def operand_bits(self, bits: Sequence[int]) -> int:
        return max([8, *(b for b in bits if b)])

    def operand(self, x: Any, name: str, bits: int) -> tuple[Tensor, Tensor]:
        """One operand on a grid: a number becomes a constant on the finest grid that holds it."""
        if isinstance(x, Tensor):
            grid = grid_of(x)
            if (grid is None or grid.bits > bits) and f"running_{name}" not in self._buffers:
                self.register_buffer(f"running_{name}", torch.zeros((), device=x.device))
            return self.enter(x, name, bits)
        scale = scalar_scale(float(x))
        value = int(np.clip(np.floor(x * scale + 0.5), -128, 127)) / scale
        reference = self.running("o")
        return reference.new_full((), value), reference.new_full((), scale)


def constant_operand(value: float) -> tuple[np.ndarray, float]:
    """A Python number as the exporter writes it: the int8 and its scale."""
    scale = scalar_scale(value)
    return np.clip(np.floor(value * scale + 0.5), -128, 127).astype(np.int8), scale


def binary_nodes(
    op_type: str, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any], form: str = ""
) -> tuple[Lowered, ...]:
    """The node of a two-operand op whose operands may be a number on either side (``call``: position -> number)."""
    inputs: list[int | str] = []
    scales, params, taken = [], {}, 0
    for position in range(2):
        number = call.get(position)
        if number is None:
            inputs.append(taken)
            scales.append(operands[taken].scale)
            taken += 1
        else:
            params["value"], scale = constant_operand(float(number))
            inputs.append("value")
            scales.append(scale)
    attrs = {"scale_x": scales[0], "scale_y": scales[1], "scale_o": out.scale, "data_bits": 8, "o_bits": out.bits}
    form += "" if out.bits == 8 else f"_o{out.bits}"
    return (Lowered(op_type=op_type, inputs=tuple(inputs), attrs=attrs, params=params, bits=out.bits, form=form),)
