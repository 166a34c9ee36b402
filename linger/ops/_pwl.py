"""The arithmetic of the chips' piecewise-linear functions (``targets/_pwl``), in PyTorch and, independently, in NumPy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from linger.numerics import exponent, saturate, shift_round
from linger.targets._pwl import Pwl


def argument(q: np.ndarray, scale_x: float, table: Pwl) -> np.ndarray:
    """Integers at ``scale_x`` as the function's argument, saturated to its width: int64."""
    return saturate(shift_round(q, exponent(scale_x) - table.x_fraction), table.width).astype(np.int64)


def evaluate(z: np.ndarray, table: Pwl) -> np.ndarray:
    """Equations (1), (2) of ``targets/_pwl`` on arguments of any shape, saturated to int32; int64."""
    z = np.maximum(z, -(2 ** (table.width - 1)) + 1) if table.symmetric else z
    k = np.searchsorted(np.array(table.bands), np.abs(z))
    slope, bias = (
        np.where(z < 0, np.array(n)[k], np.array(p)[k]) for n, p in zip(table.negative, table.positive, strict=True)
    )
    shift = np.array(table.shifts)[k]
    if table.rounded:
        y = (slope * z + (bias << table.bias_shift) + (1 << (shift - 1))) >> shift
    else:
        y = (slope * z >> shift) + bias
    return np.clip(y, -(2**31), 2**31 - 1)


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
