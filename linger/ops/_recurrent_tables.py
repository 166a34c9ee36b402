"""The chips' sigmoid and tanh inside a recurrent layer: arguments and values are integers held in floats, on any device.

A 16-bit argument indexes a table of all values. A 32-bit one finds its segment, and

    y = floor(slope z + bias)        slope, bias of the segment, in units of a value of Q15           (1)

is computed in float64. It is exact although slope z has up to 58 bits: the rounding is below 2^-37 units, and no argument comes
so near to the next integer without being one (tests enumerate all values of all segments).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from linger.ops._cells import Arithmetic, applied
from linger.targets._pwl import Pwl

INT16 = 2**15


class Functions:
    """Sigmoid and tanh of one chip on one device. Values have ``fraction`` fraction bits and the type of the cell."""

    def __init__(self, how: Arithmetic, device: torch.device) -> None:
        self.how, self.device = how, device
        self.dtype = torch.float32 if how.narrow else torch.float64
        self.short = how.width == 16
        self.rows: dict[tuple[int, int], Tensor] = {}
        if self.short:
            z = np.arange(-INT16, INT16)
            values = [applied(np.maximum(z, -INT16 + 1) if f.symmetric else z, f, how.fraction) for f in self.both]
            self.table = torch.tensor(np.concatenate(values), dtype=self.dtype, device=device)
            self.slopes = slopes_of(torch.tensor(z[:, None], device=device), how)
        else:
            self.lines = [segments(f, device) for f in self.both]

    @property
    def both(self) -> tuple[Pwl, Pwl]:
        return self.how.sigmoid, self.how.tanh

    def gates(self, z: Tensor, sigmoids: int, out: Tensor, slope: Tensor | None = None) -> None:
        """The first ``sigmoids`` columns through sigmoid, the rest through tanh; z, out (n, columns), contiguous.

        ``slope`` becomes the derivatives of the real functions, times 2^-G.
        """
        if self.short:
            row = torch.add(z, self.offsets(sigmoids, z.shape[1])).int().view(-1)
            torch.index_select(self.table, 0, row, out=out.view(-1))
            if slope is not None:
                torch.index_select(self.slopes, 0, row, out=slope.view(-1))
            return
        for part, to, which in ((z[:, :sigmoids], out[:, :sigmoids], 0), (z[:, sigmoids:], out[:, sigmoids:], 1)):
            if part.shape[1]:
                self.line(part, which, to)
        if slope is not None:
            slope.copy_(derivatives(z, sigmoids, self.how))

    def offsets(self, sigmoids: int, columns: int) -> Tensor:
        """The row of argument 0 for every column, as floats that are integers."""
        found = self.rows.get((sigmoids, columns))
        if found is None:
            rows = [INT16] * sigmoids + [3 * INT16] * (columns - sigmoids)
            found = self.rows[sigmoids, columns] = torch.tensor(rows, dtype=self.dtype, device=self.device)
        return found

    def line(self, z: Tensor, which: int, out: Tensor) -> None:
        """Equation (1) on float64 integers."""
        edges, slope, bias = self.lines[which]
        row = torch.bucketize(z.contiguous(), edges, out_int32=True).view(-1)
        s, b = slope.index_select(0, row).view(z.shape), bias.index_select(0, row).view(z.shape)
        torch.addcmul(b, z, s, out=out).floor_()


def derivatives(z: Tensor, sigmoids: int, how: Arithmetic) -> Tensor:
    """The derivatives of the real sigmoid (of the first columns) and tanh at arguments, float32, times 2^-G."""
    real = z.to(torch.float32) * 2.0**-how.argument
    first, rest = real[:, :sigmoids], real[:, sigmoids:]
    first.sigmoid_()
    first.mul_(1 - first)
    rest.tanh_().square_().neg_().add_(1)
    return real.mul_(2.0**-how.fraction)


def slopes_of(z: Tensor, how: Arithmetic) -> Tensor:
    """``derivatives`` of every 16-bit argument, those of sigmoid before those of tanh."""
    return torch.cat([derivatives(z, n, how) for n in (1, 0)]).view(-1)


def segments(table: Pwl, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Last arguments of the segments from the lowest on, and their slopes and biases in units of a value of Q15."""
    edges = [*(-b - 1 for b in table.bands[::-1]), -1, *table.bands]
    slopes = np.array([*table.negative[0][::-1], *table.positive[0]], np.float64)
    biases = [*table.negative[1][::-1], *table.positive[1]]
    shift, half = (table.bias_shift, 2**26) if table.rounded else (27, 0)
    units = np.array([float((b << shift) + half + 2**42) for b in biases])
    made = (np.array(edges, np.float64), slopes * 2.0**-43, units * 2.0**-43)
    edge, slope, bias = (torch.tensor(m, device=device) for m in made)
    return edge, slope, bias


@functools.cache
def functions(how: Arithmetic, device: torch.device) -> Functions:
    """One set of tables per chip, width and device."""
    return Functions(how, device)
