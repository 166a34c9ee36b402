"""What is measured of one tensor: its error against float, what its grid clips, and how its values are spread.

SQNR = 10 log10(sum f^2 / sum (f - q)^2)   in dB over all elements of all batches, at most 200                 (1)
clipped: f s >= B + 1 or f s <= -B - 2,    B = 2^(b-1) - 1: at least one whole step is lost                  (2)

Bins are as wide as 1/128 of the grid, and a quarter of the grid on each side of it is shown; what is further away is counted
in the outermost bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from linger.numerics import WIDEST, Grid, levels
from linger.report._data import Histogram

SPAN, MARGIN = 128, 32  # bins of the grid, and on each side of it
BEST = 200.0  # dB: nothing differs
# A mask of attention hides an entry with a value far below its grid: with HIDDEN or less, and FAR times the grid's lowest or
# less. That is no error (``ops.mask``).
HIDDEN, FAR = -1e4, 10


@dataclass
class Noise:
    """The sums of equation (1)."""

    signal: float = 0.0
    error: float = 0.0
    seen: bool = False

    def add(self, wanted: Tensor, found: Tensor, lowest: float = -math.inf) -> None:
        """Count two tensors of one shape; what is not finite, or hidden below a grid that begins at ``lowest``, is left out."""
        signal, error = squares(wanted, found, lowest)
        self.signal += float(signal.sum())
        self.error += float(error.sum())
        self.seen = True

    @property
    def sqnr(self) -> float | None:
        """Equation (1); None where nothing was counted."""
        return ratio(self.signal, self.error) if self.seen else None


def squares(wanted: Tensor, found: Tensor, lowest: float = -math.inf) -> tuple[Tensor, Tensor]:
    """f^2 and (f - q)^2 of equation (1) in float64, 0 of what ``Noise.add`` leaves out."""
    kept = torch.isfinite(wanted) & ~hidden(wanted, lowest)
    f, q = (torch.where(kept, x, 0.0).double() for x in (wanted, found))
    return f.pow(2), (f - q).pow(2)


def ratio(signal: float, error: float) -> float:
    """Equation (1) of the two sums."""
    return BEST if error <= signal * 10 ** (-BEST / 10) else 10 * math.log10(max(signal, 1e-300) / error)


def hidden(wanted: Tensor, lowest: float) -> Tensor:
    """Which entries a mask hides."""
    return wanted <= min(HIDDEN, FAR * lowest)


def limits(scale: float, bits: int) -> tuple[float, float]:
    """The lowest and the highest value of a grid."""
    top = levels(min(bits, WIDEST))
    return (-top - 1) / scale, top / scale


def spread(x: Tensor, scale: float, bits: int) -> Tensor:
    """Counts of the bins, int64 of shape (SPAN + 2 * MARGIN,)."""
    low, high = edges(scale, bits)
    held = x.detach().float().nan_to_num(nan=0.0).clamp(low, high)
    return torch.histc(held, SPAN + 2 * MARGIN, low, high).long().cpu()


def edges(scale: float, bits: int) -> tuple[float, float]:
    """Where the first bin begins and the last one ends; a level is in the middle of its bins."""
    low, high = limits(scale, bits)
    width = (high - low + 1 / scale) / SPAN
    return low - 0.5 / scale - MARGIN * width, high + 0.5 / scale + MARGIN * width


@dataclass
class Meter:
    """Everything of one tensor. ``own``: the layer alone in fixed point; ``total``: all of the net."""

    grid: Grid | None = None
    own: Noise = field(default_factory=Noise)
    total: Noise = field(default_factory=Noise)
    clipped: int = 0
    counted: int = 0
    low: float = math.inf
    high: float = -math.inf
    fixed: Tensor | None = None
    reference: Tensor | None = None

    def add_fixed(self, x: Tensor) -> None:
        """Values on their grid."""
        if x.numel():
            self.low, self.high = min(self.low, float(x.amin())), max(self.high, float(x.amax()))
        if self.grid is not None:
            counts = spread(x, *self.scale_and_bits)
            self.fixed = counts if self.fixed is None else self.fixed + counts

    def add_float(self, x: Tensor) -> None:
        """The same values in a float net."""
        if self.grid is not None:
            counts = spread(x, *self.scale_and_bits)
            self.reference = counts if self.reference is None else self.reference + counts

    def add_own(self, wanted: Tensor, found: Tensor) -> None:
        """The layer in float on the very inputs it has in fixed point, and its result."""
        self.own.add(wanted, found, self.lowest)
        if self.grid is not None:
            low, high = limits(*self.scale_and_bits)
            step = 1 / self.scale_and_bits[0]
            beyond = (wanted >= high + step) | ((wanted <= low - step) & ~hidden(wanted, low))
            self.clipped += int(beyond.sum())
            self.counted += wanted.numel()

    def add_total(self, wanted: Tensor, found: Tensor) -> None:
        """The result in a float net, and in fixed point."""
        self.total.add(wanted, found, self.lowest)

    @property
    def lowest(self) -> float:
        """Where the grid begins."""
        return -math.inf if self.grid is None else limits(*self.scale_and_bits)[0]

    @property
    def scale_and_bits(self) -> tuple[float, int]:
        assert self.grid is not None
        return float(self.grid.scale), self.grid.bits

    @property
    def share_clipped(self) -> float | None:
        """Equation (2) as a share of all values; None where it is not known."""
        return self.clipped / self.counted if self.counted else None

    def histogram(self) -> Histogram | None:
        """The counts; None of a tensor without a grid."""
        if self.grid is None or self.fixed is None:
            return None
        low, high = edges(*self.scale_and_bits)
        return Histogram(
            low=low, high=high, fixed=tuple(self.fixed.tolist()),
            reference=() if self.reference is None else tuple(self.reference.tolist()),
        )  # fmt: skip
