"""Sums with a number, and clamps made of them, as nodes that every chip has, on values of 8 bits.

    max(q, low)  = sat8(q - (low + 128)) + (low + 128)                                                 (1)
    min(q, high) = sat8(q + (127 - high)) - (127 - high)                                               (2)

    sat8(rsh(q, n) + c) = sat8(rsh(q + c * 2^n, n))      half up                                       (3)

The sum that ends (1) cannot saturate, so that it is part of the one that begins (2); max(q, 0) is a Relu. A sum of a
tensor and a constant is a BatchNorm2d with weight 1, for the chip's add takes no constant smaller than the tensor. Where
(3) does not hold (another rounding, -q, more than int32) the tensor is brought to the output's grid first.
"""

from __future__ import annotations

import numpy as np

from linger.numerics import exponent
from linger.ops._lowered import Lowered, Operand, requant_node
from linger.rounding import HALF_UP

LOWEST, HIGHEST = -128, 127
FARTHEST = 16  # a number of 8 bits, shifted left by so much, and an operand are one float32 sum
PADDED = {2: (2, 3), 3: (3,), 4: ()}  # rank -> axes that make an image of it


def fits(x: Operand) -> bool:
    """Whether the nodes can be written: 8 bits, an image or less, and a number of channels that never changes."""
    return x.bits == 8 and len(x.shape) in PADDED and 1 not in x.dynamic


def clamp_nodes(x: Operand, low: int, high: int) -> tuple[Lowered, ...]:
    """min(max(q, low), high), equations (1) and (2); as in PyTorch, ``high`` wins."""
    begin = [Lowered(op_type="Relu", inputs=(0,), attrs={}, form="8")] if low == 0 else []
    return _on_image(begin, x, [(1, offset, x, x) for offset in _sums(low, high)])


def offset_nodes(x: Operand, out: Operand, sign: int, number: int, rounding: str) -> tuple[Lowered, ...]:
    """sat8(sign * rsh(q, n) + number), n = log2(s_x / s_o) >= 0, equation (3); ``number`` is on the grid of ``out``."""
    n = exponent(x.scale) - exponent(out.scale)
    if n == 0 or (sign > 0 and n <= FARTHEST and rounding == HALF_UP):
        return _on_image([], x, [(sign, number << n, x, out)])
    return _on_image([requant_node(x, out)], x, [(sign, number, out, out)])


def _on_image(nodes: list[Lowered], x: Operand, sums: list[tuple[int, int, Operand, Operand]]) -> tuple[Lowered, ...]:
    """``nodes`` and then the sums (sign, number, from, to), on ``x`` as an image."""
    axes = PADDED[len(x.shape)] if sums else ()
    if axes:
        nodes.append(Lowered(op_type="Unsqueeze", inputs=(_last(nodes),), attrs={"axes": axes}))
    for sign, offset, given, out in sums:
        nodes.append(_sum(_last(nodes), sign, offset, given, out))
    if axes:
        nodes.append(Lowered(op_type="Squeeze", inputs=(_last(nodes),), attrs={"axes": axes}))
    return tuple(nodes)


def _last(nodes: list[Lowered]) -> int | str:
    """The operand, or the result of the last node."""
    return f"%{len(nodes) - 1}" if nodes else 0


def _sums(low: int, high: int) -> list[int]:
    """What is added, one after the other."""
    below = low + 128 if low not in (0, LOWEST) else 0
    above = HIGHEST - high
    offsets = [-below, below + above, -above] if above else [-below, below]
    return [offset for offset in offsets if offset]


def _sum(source: int | str, sign: int, offset: int, x: Operand, out: Operand) -> Lowered:
    channels = x.shape[1]
    params: dict[str, np.ndarray] = {
        "ones": np.full(channels, sign, np.int8),
        "offset": np.full(channels, offset, np.int32),
    }
    attrs = {
        "data_bits": 8, "parameter_bits": 8, "o_bits": 8, "scale_x": x.scale, "scale_w": 1.0, "scale_o": out.scale,
    }  # fmt: skip
    return Lowered(
        op_type="BatchNorm2dInt", inputs=(source, "ones", "offset"), attrs=attrs, params=params, form="f32r4"
    )
