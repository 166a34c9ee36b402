"""How |x| is distributed, and which range follows from it: percentile, least squared error, least relative entropy.

A range T stands for the scale 2^round(log2(B / T)), so only powers of two are tried, and the T of scale s is B / s (1)

    mse      sum over bins of n_i (c_i - q(c_i))^2, in the clipped part and in the rounded part              (2)
    kl       sum p log(p / q); p: the bins with what is clipped added to the last one, q: p averaged per level (3)

Zeros are exact on every grid, so neither (2) nor (3) counts them; the percentile does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from linger.errors import LingerError
from linger.numerics import exponent, levels, pow2_floor, quantize_array, scale_from_running

BINS = 2**13
COARSER, FINER = 1, 5  # scales tried around the one that the maximum gives, as powers of two
ENOUGH = 4  # bins in a step; with fewer, the error of rounding is the step's uniform one
UNSEEN = 1e-4  # of a level's probability, where a bin holds values that the grid has no level for


def summed(values: Tensor) -> Tensor:
    """The sum over all ranks, of a tensor that may be overwritten; itself where there is one process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


class Histogram:
    """Counts of |x| in ``BINS`` equal bins from 0 to a power of two that doubles as larger values come."""

    def __init__(self) -> None:
        self.top = 0.0
        self.zeros = 0.0
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def add(self, x: Tensor, peak: float) -> None:
        """Count the values of a tensor of any shape, none above ``peak``, which is the same on every rank."""
        if peak <= 0:
            self.zeros += x.numel()
            return
        self._grow(2 * float(pow2_floor(torch.tensor(peak))))
        magnitude = x.detach().float().abs()
        seen = torch.histc(magnitude, BINS, 0, self.top).double().cpu()
        zeros = float((magnitude == 0).sum())
        seen[0] -= zeros
        self.zeros += zeros
        self.counts += seen

    def _grow(self, top: float) -> None:
        while 0 < self.top < top:
            self.counts = torch.cat((self.counts.view(-1, 2).sum(1), self.counts.new_zeros(BINS // 2)))
            self.top *= 2
        self.top = max(self.top, top)

    def merge(self, device: torch.device) -> None:
        """The counts of all ranks; every rank calls it for its tensors in the same order."""
        everything = summed(torch.cat((self.counts, self.counts.new_tensor([self.zeros]))).to(device))
        self.counts, self.zeros = everything[:-1].cpu(), float(everything[-1])

    def centers(self) -> np.ndarray:
        return (np.arange(BINS) + 0.5) * (self.top / BINS)

    def scales(self, peak: float, bits: int) -> list[float]:
        """The scales worth trying for values up to ``peak``, the coarsest first."""
        n = exponent(float(scale_from_running(torch.tensor(peak), bits)))
        return [2.0**k for k in range(n - COARSER, n + FINER + 1)]


def by_max(seen: Histogram, peak: float, bits: int, percentile: float) -> float:
    """Nothing is clipped, but for what the rounding of the scale clips."""
    return peak


def by_percentile(seen: Histogram, peak: float, bits: int, percentile: float) -> float:
    """The smallest range that holds ``percentile`` percent of the values, zeros included."""
    held = seen.zeros + np.cumsum(seen.counts.numpy())
    i = int(np.searchsorted(held, percentile / 100 * held[-1]))
    return min(peak, (min(i, BINS - 1) + 1) * seen.top / BINS)


def by_mse(seen: Histogram, peak: float, bits: int, percentile: float) -> float:
    """Equation (2)."""
    counts, centers = seen.counts.numpy(), seen.centers()

    def error(scale: float) -> float:
        rounded = quantize_array(centers.astype(np.float32), scale, bits).astype(np.float64) / scale
        squares = (centers - rounded) ** 2
        if 1 / scale < ENOUGH * seen.top / BINS:
            squares = np.where(centers > levels(bits) / scale, squares, 1 / (12 * scale**2))
        return float((counts * squares).sum())

    return levels(bits) / min(seen.scales(peak, bits), key=error)


def by_kl(seen: Histogram, peak: float, bits: int, percentile: float) -> float:
    """Equation (3); the maximum where a level is finer than the bins, as it is from 16 bits on."""
    counts = seen.counts.numpy()
    grouped = {s: round_levels(seen, s) for s in seen.scales(peak, bits) if seen.top / BINS * s <= 0.5}
    if not grouped or bits > 8 or not counts.any():
        return peak
    return levels(bits) / min(grouped, key=lambda s: _entropy(counts, grouped[s], levels(bits)))


def round_levels(seen: Histogram, scale: float) -> np.ndarray:
    """The level that each bin is rounded to, without saturation."""
    return quantize_array(seen.centers().astype(np.float32), scale, 32)


def _entropy(counts: np.ndarray, level: np.ndarray, highest: int) -> float:
    """Equation (3) for bins on these levels."""
    inside = level <= highest
    p = counts[inside].copy()
    held = np.bincount(level[inside], counts[inside])
    used = np.bincount(level[inside], p > 0)
    p[-1] += counts[~inside].sum()
    q = np.where(counts[inside] > 0, (held / np.maximum(used, 1))[level[inside]], 0.0)
    p, q = p / p.sum(), q / max(q.sum(), 1e-300)
    some = p > 0
    return float((p[some] * np.log(p[some] / np.maximum(q[some], UNSEEN * p[some]))).sum())


Method = Callable[[Histogram, float, int, float], float]
METHODS: dict[str, Method] = {"max": by_max, "percentile": by_percentile, "mse": by_mse, "kl": by_kl}


def method_of(name: str) -> Method:
    """The row of ``METHODS``.

    Raises:
        LingerError: there is none.
    """
    if name not in METHODS:
        raise LingerError(f"method is {name!r}, allowed are {', '.join(METHODS)}; choose one of them")
    return METHODS[name]
