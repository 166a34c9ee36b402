"""The arithmetic of the chips' piecewise-linear functions (``targets/_pwl``), in PyTorch and, independently, in NumPy."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from linger.numerics import exponent, saturate, shift_round
from linger.targets._pwl import Pwl


def argument(q: np.ndarray, scale_x: float, table: Pwl) -> np.ndarray:
    """Integers at ``scale_x`` as the function's argument, saturated to its width: int64."""
    return saturate(shift_round(q, exponent(scale_x) - table.x_fraction), table.width).astype(np.int64)


def evaluate(z: np.ndarray, table: Pwl) -> np.ndarray:
    """Equations (1), (2) of ``targets/_pwl`` on arguments of any shape, saturated to int32; int64. Of 16 bits, all are known."""
    return _of_every_argument(table)[z + 2**15] if table.width == 16 else _evaluated(z, table)


@cache
def _of_every_argument(table: Pwl) -> np.ndarray:
    """The function of -2^15 .. 2^15 - 1, int64 (65536,)."""
    return _evaluated(np.arange(-(2**15), 2**15), table)


def _evaluated(z: np.ndarray, table: Pwl) -> np.ndarray:
    z = np.maximum(z, -(2 ** (table.width - 1)) + 1) if table.symmetric else z
    ends, slopes, biases, shifts = _segments(table)
    k = np.searchsorted(ends, z)
    y = slopes[k] * z
    if not table.rounded:
        y >>= shifts[k]
        y += biases[k]
    else:
        shift = shifts[k]
        y += biases[k] << table.bias_shift
        y += 1 << (shift - 1)
        y >>= shift
    return np.clip(y, -(2**31), 2**31 - 1)


@cache
def _segments(table: Pwl) -> tuple[np.ndarray, ...]:
    """The last argument of every segment but the highest, and slope, bias and shift of all 32, from the lowest argument up; int64."""
    ends = [-band - 1 for band in reversed(table.bands)] + [-1, *table.bands]
    lines = [(*reversed(n), *p) for n, p in zip(table.negative, table.positive, strict=True)]
    return tuple(np.array(v, np.int64) for v in (ends, *lines, (*reversed(table.shifts), *table.shifts)))


def torch_values(levels: Tensor, scale: Tensor, table: Pwl) -> Tensor:
    """The function on a vector of integers (float64) at ``scale``, as float64 multiples of 2^-y_fraction.

    Runs on the tensors' device without a host synchronisation; meant for the levels of a grid, not for activations.
    """
    top = 2.0 ** (table.width - 1)
    z = torch.floor(levels * (2.0**table.x_fraction / scale.double()) + 0.5)
    z = z.clamp(-top + int(table.symmetric), top - 1).long()
    bands = (*table.bands, 2**table.width)
    rows = torch.tensor((bands, *table.negative, *table.positive, table.shifts)).to(z.device, non_blocking=True)
    below_slope, below_bias, above_slope, above_bias, shift = rows[1:, torch.searchsorted(rows[0], z.abs())].unbind()
    slope = torch.where(z < 0, below_slope, above_slope)
    bias = torch.where(z < 0, below_bias, above_bias)
    if table.rounded:
        half = torch.ones_like(shift) << (shift - 1)
        y = (slope * z + (bias << table.bias_shift) + half) >> shift
    else:
        y = (slope * z >> shift) + bias
    return y.clamp(-(2**31), 2**31 - 1).double()
