"""Roundings by exact name: one row per rule, a chip's table names its own (``Target.rounding``).

    half_up    floor(v + 1/2): -2.5, -1.5, -0.5, 0.5, 1.5, 2.5 -> -2, -1, 0, 1, 2, 3                    (1)
    half_even  the nearest integer, ties to the even one: -2.5, -1.5, -0.5, 0.5, 1.5, 2.5 -> -2, -2, 0, 0, 2, 2    (2)

A row rounds activations where they enter fixed point and where a sum is shifted to its output's grid. Weights, biases and
numbers round half up for every chip: the file holds their integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

HALF_UP, HALF_EVEN = "half_up", "half_even"


class Rounding(NamedTuple):
    """One rule in PyTorch, in NumPy (independently), and as ONNX text.

    Attributes:
        scaled: (x, scale, step = 1 / scale, out or None) -> the integers nearest to x * scale, a new tensor or in ``out``.
        entering: (x * scale in float64, whether the chip adds in float32) -> integers in floating point.
        shifted: (int64, n >= 1) -> v / 2^n.
        divided: (n, d > 0), exact integers -> n / d.
        quotient: the same on float64 tensors of integers; exact while 2n + d and 2d are at most 2^52.
        settled: (the integers half up, whether each was a tie) -> the integers; on tensors and arrays.
        text: (source, result, ONNX's name of the type) -> statements for ``result`` = ``source`` rounded.
    """

    scaled: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    entering: Callable[[np.ndarray, bool], np.ndarray]
    shifted: Callable[[np.ndarray, int], np.ndarray]
    divided: Callable[[Any, Any], Any]
    quotient: Callable[[Tensor, Any], Tensor]
    settled: Callable[[Any, Any], Any]
    text: Callable[[str, str, str], str]


def _up_scaled(x: Tensor, scale: Tensor, step: Tensor, out: Tensor | None) -> Tensor:
    """Half a step is added to x, which rounds alike and saves a pass."""
    return torch.add(x, step, alpha=0.5, out=out).mul_(scale).floor_()


def _up_entering(v: np.ndarray, single: bool) -> np.ndarray:
    """The sum is rounded to float32 where the chip computes it so (``engine`` 3)."""
    v = v + 0.5
    return np.floor(v.astype(np.float32) if single else v)


def _up_shifted(v: np.ndarray, n: int) -> np.ndarray:
    """floor(floor(v / 2^(n-1) + 1) / 2), in place; of 1 bit the floor and the bit below it, for v + 1 may overflow."""
    if n == 1:
        return (v >> 1) + (v & 1)
    up = v >> min(n - 1, 63)
    up += 1
    up >>= 1
    return up


def _up_text(source: str, result: str, kind: str) -> str:
    half = f"{result}_half = Constant <value = {kind} {{0.5}}> ()\n"
    return half + f"{result}_sum = Add ({source}, {result}_half)\n{result} = Floor ({result}_sum)\n"


def divide_half_up(n: Any, d: Any) -> Any:
    """floor(n / d + 1/2) for d > 0 in exact integers, Python's or int64 arrays."""
    return (2 * n + d) // (2 * d)


def divided_half_up(n: Tensor, d: Tensor | int) -> Tensor:
    """floor(n / d + 1/2) for d > 0 on float64 tensors; exact while 2n + d and 2d are integers of at most 2^52."""
    return torch.floor((2 * n + d) / (2 * d))


def _even_scaled(x: Tensor, scale: Tensor, step: Tensor, out: Tensor | None) -> Tensor:
    return torch.mul(x, scale, out=out).round_()


def _even_shifted(v: np.ndarray, n: int) -> np.ndarray:
    """The floor, and one more where the rest is above a half, or a half above an odd floor."""
    if n > 62:  # |v| is at most 2^62, and half of one is rounded to 0
        return np.zeros_like(v)
    floor = v >> n
    rest, half = v - (floor << n), 1 << (n - 1)
    return floor + ((rest > half) | ((rest == half) & (floor & 1 == 1)))


def _even_divided(n: Any, d: Any) -> Any:
    floor = n // d
    twice = 2 * (n - floor * d)
    return floor + ((twice > d) | ((twice == d) & (floor % 2 == 1)))


ROUNDINGS = {
    HALF_UP: Rounding(
        scaled=_up_scaled, entering=_up_entering, shifted=_up_shifted, divided=divide_half_up,
        quotient=divided_half_up, settled=lambda v, tie: v, text=_up_text,
    ),
    HALF_EVEN: Rounding(
        scaled=_even_scaled, entering=lambda v, single: np.rint(v), shifted=_even_shifted, divided=_even_divided,
        quotient=lambda n, d: torch.round(n / d), settled=lambda v, tie: v - tie * (v % 2),
        text=lambda source, result, kind: f"{result} = Round ({source})\n",
    ),
}  # fmt: skip
