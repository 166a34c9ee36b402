"""The chips' sigmoid and tanh inside a recurrent layer: arguments and values are integers held in floats, on any device.

A 16-bit argument z indexes a table of all values. A 32-bit one is cut into j, its upper 20 bits, and the lower 12: no function
rises by more than 1 (a value of 15 fraction bits) while j stays, so that one number per j says where it does,

    y = floor(e[j] + (z mod 2^12) / 2^12),   e[j] = y(j 2^12) + 1 - t / 2^12                           (1)

with t the first of the lower bits at which the value is y(j 2^12) + 1; e[j] = y(j 2^12) where there is none.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from linger.ops._cells import Arithmetic, applied
from linger.targets._pwl import Pwl

LOWER = 12  # bits of a 32-bit argument that do not index
SMALLEST = 2**12  # rows of the smallest table on each side of argument 0


class Functions:
    """Sigmoid and tanh of one chip on one device. Values have ``fraction`` fraction bits and the type of the cell.

    ``unit``: rows per argument, ``reach``: the largest sum of arguments that finds a row, in arguments; ``exact``: below it the
    type of the cell holds every integer.
    """

    def __init__(self, how: Arithmetic, device: torch.device) -> None:
        self.how, self.device = how, device
        self.dtype = torch.float32 if how.narrow else torch.float64
        self.exact = 2.0**24 if how.narrow else 2.0**53
        self.short = how.width == 16
        self.unit = 1.0 if self.short else 2.0**-LOWER
        self.reach = 2.0 ** (how.width if self.short else how.width - 1)
        make = all_values if self.short else rises
        tables = [make(f, how.fraction) for f in (how.sigmoid, how.tanh)]
        self.half = len(tables[0]) // 2
        self.table = torch.tensor(np.stack(tables), dtype=self.dtype, device=device)
        self.crops: dict[tuple[int, bool], tuple[Tensor, Tensor | None]] = {}
        self.looks: dict[tuple[int, int, int], Look] = {}
        if self.short:
            arguments = torch.arange(-self.half, self.half, device=device)[:, None]
            made = (derivatives(arguments, n, how, torch.empty_like(arguments, dtype=torch.float32)) for n in (1, 0))
            self.slopes = torch.stack([m.view(-1) for m in made])

    def look(self, sigmoids: int, columns: int, reach: float) -> Look:
        """The first ``sigmoids`` columns through sigmoid, the rest through tanh, for arguments within ``reach``."""
        half = self.half if not self.short else max(2 ** math.ceil(math.log2(reach)), SMALLEST)
        key = sigmoids, columns, half
        if key not in self.looks:
            self.looks[key] = Look(self, *key)
        return self.looks[key]

    def cropped(self, half: int, both: bool) -> tuple[Tensor, Tensor | None]:
        """Values at rows from -``half`` to ``half`` - 1, of sigmoid and tanh or of tanh, and their slopes; flat beyond the chip's."""
        key = half, both
        if key not in self.crops:
            at = torch.arange(-half, half, device=self.device).clamp_(-self.half, self.half - 1).add_(self.half)
            of = slice(0 if both else 1, None)
            slopes = self.slopes[of, at].view(-1) if self.short else None
            self.crops[key] = self.table[of, at].view(-1), slopes
        return self.crops[key]


class Look:
    """One function or two, from rows of a table to values, for steps of some columns.

    A row is ``first`` + z * ``unit`` with z an argument, as a float; what is beyond its integer is the lower bits of a 32-bit
    argument, and else nothing. ``origin``: the row of argument 0 of tanh, ``rows``: of the table.
    """

    def __init__(self, f: Functions, sigmoids: int, columns: int, half: int) -> None:
        self.f, self.sigmoids, self.unit = f, sigmoids, f.unit
        self.table, self.slope_table = f.cropped(half, sigmoids > 0)
        self.rows, self.origin = len(self.table), len(self.table) - float(half)
        first = [float(half)] * sigmoids + [self.origin] * (columns - sigmoids)
        self.first = torch.tensor(first, dtype=f.dtype, device=f.device)
        self.columns: dict[tuple[int, bool], tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, u: Tensor, row: Tensor, out: Tensor, flat: Tensor, flat_out: Tensor) -> None:
        """Values at rows ``u`` into ``out`` (n, columns), their integers into ``row`` (int32); ``flat``: ``row`` in 1-d, ``flat_out`` too."""
        row.copy_(u)
        torch.index_select(self.table, 0, flat, out=flat_out)
        if not self.f.short:
            out.add_(torch.frac(u)).floor_()

    def rows_of(self, columns: int, plain: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The row of argument 0, the rows per argument, and these or 0 for columns that are not looked up, of every column.

        Columns behind those of the table, or all with ``plain``, are arguments in place of rows.
        """
        if (columns, plain) not in self.columns:
            ready, like = len(self.first), self.table
            first, unit, looked = like.new_zeros(columns), like.new_ones(columns), like.new_zeros(columns)
            if not plain:
                first[:ready], unit[:ready] = self.first, self.unit
            looked[:ready] = unit[:ready]
            self.columns[columns, plain] = first, unit, looked
        return self.columns[columns, plain]

    def slopes(self, u: Tensor, row: Tensor, out: Tensor) -> None:
        """``out`` (n, columns; float32): derivatives of the real functions, times 2^-G, at what ``__call__`` took (n, columns)."""
        if self.slope_table is not None:
            torch.index_select(self.slope_table, 0, row.view(-1), out=out.view(-1))
        else:
            derivatives(torch.sub(u, self.first).mul_(1 / self.unit).floor_(), self.sigmoids, self.f.how, out)


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
