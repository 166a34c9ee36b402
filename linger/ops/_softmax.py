"""The integer arithmetic of softmax on the chips (``targets/_softmax``), in PyTorch and, independently, in NumPy.

e^d of a d <= 0 in Q25, as Q23:

    X = rsh(d * log2(e)/4, 31)                    exponent of two, Q23                                 (1)
    E = (X >> 23) + 1,  f = (X mod 2^23) - 2^23   so that 2^X = 2^E * 2^f, -1 <= f < 0
    Y <- rsh(Y * f, 23) + c                       over the coefficients c but the last                 (2)
    t = Y * f + (c_last << 23)
    e = rsh(t, 23 - E)   or   rsh(t, 23) << E, a floor shift to the right where E < 0                  (3)

Reciprocal r of a sum S in Q23, for p = rsh(e * r, k):

    division   r = 2 * floor(2^52 / S),  k = 38                                                        (4)
    Newton     X = S >> b in [2^22, 2^23), Y = start - X; twice Y += rsh(2Y * (2^22 - rsh(XY, 23)), 23);
               r = Y >> (b - 1),  k = 31                                                               (5)

Logarithms:

    of a sum S in Q23    v = sat32(rsh(S, 8)) of n bits, i the 9 bits below its highest
                         ln S = ((n - 16) * ln 2 + table[i]) >> 1, Q15                                 (6)
    of a p > 0 in Q15    m = p << (31 - n), p of n bits; segment i the 7 bits below the highest of m
                         log2 m = (value[i] >> 6) + rsh(slope[i] * (m - middle[i]), 35)
                         ln p = rsh(((n - 15) << 25 + log2 m) * ln 2, 31), Q25                         (7)
    of p = 0             the lowest int32, which is -64
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from linger.numerics import exponent, shift_round
from linger.steps import piecewise
from linger.targets import Softmax
from linger.targets._softmax import (
    EXPONENTIAL,
    HIGHEST,
    LN2_Q16,
    LN2_Q31,
    LN_TABLE,
    LOG2_SLOPES,
    LOG2_VALUES,
    LOG2E,
    NEWTON_START,
)

ONE = 2**23
FINEST = 25  # fraction bits of the argument
INTEGER = 6  # and bits before the point: it saturates at +-64

# --- NumPy


def argument(x: np.ndarray, scale_x: float) -> np.ndarray:
    """Integers at ``scale_x`` as Q25, saturated to int32; int64 of the same shape."""
    return np.clip(shift_round(x, max(exponent(scale_x) - FINEST, -40)), -HIGHEST - 1, HIGHEST)


def exp(d: np.ndarray, chip: Softmax) -> np.ndarray:
    """Equations (1) to (3) on int64 of any shape."""
    x = shift_round(np.maximum(d, -HIGHEST - 1) * LOG2E, 31)
    e, f = (x >> 23) + 1, (x & (ONE - 1)) - ONE
    y = np.full_like(x, EXPONENTIAL[0])
    for c in EXPONENTIAL[1:-1]:
        y = shift_round(y * f, 23) + c
    t = y * f + (EXPONENTIAL[-1] << 23)
    if chip.exp_rounds:
        shift = np.minimum(23 - e, 62)
        return (t + (np.int64(1) << (shift - 1))) >> shift
    y = shift_round(t, 23)
    return np.where(e > 0, y << np.maximum(e, 0), y >> np.clip(-e, 0, 62))


def bit_length(v: np.ndarray) -> np.ndarray:
    """Bits of positive int64 below 2^53."""
    return np.frexp(v.astype(np.float64))[1].astype(np.int64)


def probability(z: np.ndarray, axis: int, chip: Softmax) -> np.ndarray:
    """Softmax of Q25 as Q15: equations (4) and (5) on the saturated sum."""
    e = piecewise(exp)(z - z.max(axis, keepdims=True), chip=chip)
    s = np.minimum(e.sum(axis, keepdims=True), HIGHEST)
    if not chip.newton:
        return _product(e, 2 * (2**52 // s), n=38)
    b = bit_length(s) - 23
    x = s >> b
    y = NEWTON_START - x
    for _ in range(2):
        y += shift_round(2 * y * (ONE // 2 - shift_round(x * y, 23)), 23)
    return _product(e, y >> (b - 1), n=31)


@piecewise
def _product(e: np.ndarray, r: np.ndarray, *, n: int) -> np.ndarray:
    return shift_round(e * r, n)


def ln_sum(s: np.ndarray) -> np.ndarray:
    """Equation (6): ln of Q23 as Q15. S is at least e^0, so v has 16 bits or more."""
    v = np.minimum(shift_round(s, 8), HIGHEST)
    n = bit_length(v)
    return ((n - 16) * LN2_Q16 + np.array(LN_TABLE)[(v >> (n - 10)) & 511]) >> 1


def ln_probability(p: np.ndarray) -> np.ndarray:
    """Equation (7): ln of Q15 as Q25."""
    n = bit_length(np.maximum(p, 1))
    m = np.maximum(p, 1) << (31 - n)
    i = (m >> 23) - 128
    log2 = (np.array(LOG2_VALUES)[i] >> 6) + shift_round(np.array(LOG2_SLOPES)[i] * (m - ((257 + 2 * i) << 22)), 35)
    return np.where(p > 0, shift_round((((n - 15) << 25) + log2) * LN2_Q31, 31), -HIGHEST - 1)


def log_probability(z: np.ndarray, axis: int, chip: Softmax) -> np.ndarray:
    """Log-softmax of Q25, with ``chip.log_fraction`` fraction bits."""
    if not chip.log_of_sum:
        return ln_probability(probability(z, axis, chip))
    d = np.maximum(z - z.max(axis, keepdims=True), -HIGHEST - 1)
    return shift_round(d, 10) - ln_sum(piecewise(exp)(d, chip=chip).sum(axis, keepdims=True))


# --- PyTorch, without a host synchronisation: a row's exponentials are looked up by the distance to its maximum


def distances(x: Tensor, scale: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """How many levels each element lies below its row's maximum, as an index into ``arguments``; and the level's scale.

    Args:
        x: float32 of any shape on a grid.
        scale: its scale. A level is a step of that grid, but never finer than Q25 nor coarser than the saturation limit.
        dim: the rows' dimension.
        bits: width of the grid, at most 16.
    """
    scale = scale.clamp(2.0**-INTEGER, 2.0**FINEST)
    top = scale * 2.0**INTEGER
    v = torch.mul(x, scale).add_(0.5).floor_().clamp_(-top, top)
    peak = v.amax(dim, keepdim=True)
    peak = peak + 2.0**bits * (peak == top)
    return v.neg_().add_(peak).to(torch.int32), scale


def arguments(scale: Tensor, bits: int) -> Tensor:
    """d of 0, 1, ... levels below the maximum, int64; then once more for rows whose maximum saturated to 2^31 - 1."""
    d = torch.arange(2**bits, dtype=torch.float64, device=scale.device) * (-(2.0**FINEST) / scale.double())
    return torch.cat([d, (d + 1).clamp(max=0)]).clamp(min=-(2.0**31)).long()


def rounded_shift(v: Tensor, n: int) -> Tensor:
    """floor(v / 2^n + 1/2) of int64."""
    return (v + (1 << (n - 1))) >> n


def torch_exp(d: Tensor, chip: Softmax) -> Tensor:
    """Equations (1) to (3) on int64; meant for a table, not for activations."""
    x = rounded_shift(d * LOG2E, 31)
    e, f = (x >> 23) + 1, (x & (ONE - 1)) - ONE
    y = torch.full_like(x, EXPONENTIAL[0])
    for c in EXPONENTIAL[1:-1]:
        y = (y * f + (c << 23) + (1 << 22)) >> 23
    y = y * f + (EXPONENTIAL[-1] << 23)
    if chip.exp_rounds:
        shift = (22 - e).clamp(max=61)
        return ((y >> shift) + 1) >> 1
    return torch.where(e > 0, rounded_shift(y, 23) * 2, rounded_shift(y, 23) >> (-e).clamp(0, 62))


def torch_bit_length(v: Tensor) -> Tensor:
    """Bits of positive int64 below 2^53: the exponent of an IEEE float64."""
    return (v.double().view(torch.int64) >> 52) - 1022


def torch_reciprocal(s: Tensor, chip: Softmax) -> Tensor:
    """Equations (4), (5) on the saturated sums, int64; r * 2^-k as float64, which holds e * r * 2^-k exactly."""
    if not chip.newton:
        return (2**52 // s).double() * 2.0**-37
    b = torch_bit_length(s) - 23
    x = s >> b
    y = NEWTON_START - x
    for _ in range(2):
        y = y + rounded_shift(y * 2 * ((1 << 22) - rounded_shift(x * y, 23)), 23)
    return (y >> (b - 1)).double() * 2.0**-31


def torch_ln_sum(s: Tensor) -> Tensor:
    """Equation (6) on int64."""
    v = rounded_shift(s, 8).clamp(max=HIGHEST)
    n = torch_bit_length(v)
    table = torch.tensor(LN_TABLE, dtype=torch.int64, device=s.device)
    return ((n - 16) * LN2_Q16 + table[(v >> (n - 10)) & 511]) >> 1


def torch_ln_probability(p: Tensor) -> Tensor:
    """Equation (7) on int64."""
    value, slope = (torch.tensor(t, dtype=torch.int64, device=p.device) for t in (LOG2_VALUES, LOG2_SLOPES))
    n = torch_bit_length(p.clamp(min=1))
    m = p.clamp(min=1) << (31 - n)
    i = (m >> 23) - 128
    log2 = (value[i] >> 6) + rounded_shift(slope[i] * (m - ((257 + 2 * i) << 22)), 35)
    ln = rounded_shift((((n - 15) << 25) + log2) * LN2_Q31, 31)
    return torch.where(p > 0, ln, -HIGHEST - 1)
