"""The chips' sigmoid and tanh inside a recurrent layer: arguments and values are integers held in floats, on any device.

A 16-bit argument z indexes a table of all values. A 32-bit one is cut into j, its upper 20 bits, and the lower 12: no function
rises by more than 1 (a value of 15 fraction bits) while j stays, so that one number per j says where it does,

    y = floor(e[j] + (z mod 2^12) / 2^12),   e[j] = y(j 2^12) + 1 - t / 2^12                           (1)

with t the first of the lower bits at which the value is y(j 2^12) + 1; e[j] = y(j 2^12) where there is none.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from linger.ops._cells import Arithmetic, applied
from linger.targets._pwl import Pwl

LOWER = 12  # bits of a 32-bit argument that do not index


class Functions:
    """Sigmoid and tanh of one chip on one device. Values have ``fraction`` fraction bits and the type of the cell."""

    def __init__(self, how: Arithmetic, device: torch.device) -> None:
        self.how, self.device = how, device
        self.dtype = torch.float32 if how.narrow else torch.float64
        self.short = how.width == 16
        self.rows: dict[tuple[int, int], Tensor] = {}
        make = all_values if self.short else rises
        tables = [make(f, how.fraction) for f in (how.sigmoid, how.tanh)]
        self.half = len(tables[0]) // 2
        self.table = torch.tensor(np.concatenate(tables), dtype=self.dtype, device=device)
        self.cut = torch.tensor(2.0**-LOWER, dtype=self.dtype, device=device)
        if self.short:
            arguments = torch.arange(-self.half, self.half, device=device)[:, None]
            made = (derivatives(arguments, n, how, torch.empty_like(arguments, dtype=torch.float32)) for n in (1, 0))
            self.slopes = torch.cat([m.view(-1) for m in made])

    def gates(self, z: Tensor, sigmoids: int, out: Tensor, slope: Tensor | None = None) -> None:
        """The first ``sigmoids`` columns through sigmoid, the rest through tanh; z, out (n, columns), contiguous.

        ``slope`` becomes the derivatives of the real functions, times 2^-G.
        """
        offsets = self.offsets(sigmoids, z.shape[1])
        if self.short:
            row = torch.add(z, offsets).int().view(-1)
            torch.index_select(self.table, 0, row, out=out.view(-1))
        else:
            exact = torch.mul(z, self.cut)
            upper = torch.floor(exact)
            row = torch.add(upper, offsets).int().view(-1)
            torch.index_select(self.table, 0, row, out=out.view(-1))
            out.add_(exact.sub_(upper)).floor_()
        if slope is not None and self.short:
            torch.index_select(self.slopes, 0, row, out=slope.view(-1))
        elif slope is not None:
            derivatives(z, sigmoids, self.how, slope)

    def offsets(self, sigmoids: int, columns: int) -> Tensor:
        """The row of argument 0 for every column, as floats that are integers."""
        found = self.rows.get((sigmoids, columns))
        if found is None:
            rows = [self.half] * sigmoids + [3 * self.half] * (columns - sigmoids)
            found = self.rows[sigmoids, columns] = torch.tensor(rows, dtype=self.dtype, device=self.device)
        return found


def derivatives(z: Tensor, sigmoids: int, how: Arithmetic, out: Tensor) -> Tensor:
    """``out`` (float32): the derivatives of the real sigmoid (of the first columns) and tanh at arguments z, times 2^-G."""
    out.copy_(z).mul_(2.0**-how.argument)
    unit, aten = out.new_full((), 2.0**-how.fraction), torch.ops.aten
    first, rest = out[:, :sigmoids], out[:, sigmoids:]
    if first.shape[1]:
        aten.sigmoid_backward.grad_input(unit, first.sigmoid_(), grad_input=first)
    if rest.shape[1]:
        aten.tanh_backward.grad_input(unit, rest.tanh_(), grad_input=rest)
    return out


def all_values(table: Pwl, fraction: int) -> np.ndarray:
    """The values of all 16-bit arguments, from the lowest on."""
    return applied(np.arange(-(2**15), 2**15), table, fraction)


def rises(table: Pwl, fraction: int) -> np.ndarray:
    """e of equation (1) for all j, from the lowest on: float64."""
    start = np.arange(-(2**19), 2**19) << LOWER
    first = applied(start, table, fraction)
    found = first.astype(np.float64)
    step = np.flatnonzero(applied(start + 2**LOWER - 1, table, fraction) > first)
    low, high = np.zeros(len(step), np.int64), np.full(len(step), 2**LOWER - 1)  # value at low, and one more at high
    for _ in range(LOWER):
        middle = (low + high) >> 1
        risen = applied(start[step] + middle, table, fraction) > first[step]
        low, high = np.where(risen, low, middle), np.where(risen, middle, high)
    found[step] += 1 - high / 2**LOWER
    return found


@functools.cache
def functions(how: Arithmetic, device: torch.device) -> Functions:
    """One set of tables per chip, width and device."""
    return Functions(how, device)
