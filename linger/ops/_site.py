"""A site: the named child module that one functional call (``a + b``, ``torch.cat``) is routed to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from linger.errors import LingerError
from linger.numerics import COARSEST, FINEST, WIDEST, grid_of, int_dtype, levels, quantize_number
from linger.observe import recomputing
from linger.ops._base import IntModule
from linger.ops._lowered import Lowered, Operand


class Site(IntModule):
    """State of one functional call. Operands may be gridded tensors, plain float tensors and Python numbers."""

    observed: ClassVar[tuple[str, ...]] = ("o",)
    op_type: ClassVar[str]
    wide_numbers: ClassVar[bool] = False  # a Python number is as wide as the other operand, else it has 8 bits
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
        given = [b for b in bits if b]
        return max(given) if given else 8

    def operand(self, x: Any, name: str, bits: int) -> tuple[Tensor, Tensor]:
        """One operand on a grid: a number becomes a constant on the finest grid that holds it."""
        if isinstance(x, Tensor):
            grid = grid_of(x)
            if (grid is None or grid.bits > bits) and f"running_{name}" not in self._buffers:
                if torch.compiler.is_compiling():
                    raise LingerError(
                        "an operand lost its grid, for torch.compile does not see what made it: iterating over a tensor, .data, "
                        ".mT, F.pad, F.hardsigmoid, F.hardswish, in-place functions; use unbind, detach, transpose, the layer"
                    )
                if recomputing():
                    raise LingerError(
                        "an operand lost its grid, for gradient checkpointing with use_reentrant=True hands on bare "
                        "tensors; pass use_reentrant=False to torch.utils.checkpoint.checkpoint"
                    )
                self.register_buffer(f"running_{name}", torch.zeros((), device=x.device))
            return self.enter(x, name, bits)
        width = number_width(bits) if self.wide_numbers else 8
        scale = scalar_scale(float(x), width)
        value = quantize_number(x, scale, width) / scale
        reference = self.running("o")
        return reference.new_full((), value), reference.new_full((), scale)


def scalar_scale(value: float, bits: int = 8) -> float:
    """``scale_from_weight`` of one Python number.

    Raises:
        LingerError: it is NaN or infinite.
    """
    if not math.isfinite(value):
        raise LingerError(
            f"found the number {value}, allowed are finite ones; use torch.where or a mask outside fixed point"
        )
    if value == 0:
        return 2.0**bits
    ratio = min(max(levels(bits) / abs(value), COARSEST), FINEST)
    return math.ldexp(0.5, math.frexp(ratio)[1])


def number_width(bits: int) -> int:
    """Bits of a Python number beside an operand of ``bits`` bits: what float32 holds of it."""
    return min(bits, WIDEST - 1)


def constant_operand(value: float, bits: int) -> tuple[np.ndarray, float]:
    """A Python number as the exporter writes it: the integer of ``bits`` bits and its scale."""
    width = number_width(bits)
    scale = scalar_scale(value, width)
    return np.array(quantize_number(value, scale, width), int_dtype(bits)), scale


def binary_nodes(
    op_type: str, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any], wide_numbers: bool = False
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
            params["value"], scale = constant_operand(float(number), out.bits if wide_numbers else 8)
            inputs.append("value")
            scales.append(scale)
    attrs = {"scale_x": scales[0], "scale_y": scales[1], "scale_o": out.scale, "data_bits": 8, "o_bits": out.bits}
    form = "" if out.bits == 8 else f"_o{out.bits}"
    return (Lowered(op_type=op_type, inputs=tuple(inputs), attrs=attrs, params=params, bits=out.bits, form=form),)
