"""The rows of a sequence in the order of a PackedSequence, and who is whose predecessor.

Row ``offset[t] + b`` is step t of sequence b; ``sizes[t]`` sequences have a step t, the longest first. A batch without lengths
has the same size at every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor


def split(x: Tensor, sizes: Sequence[int], even: bool, reverse: bool) -> list[Tensor]:
    """One view per step of rows, in the order of the direction."""
    parts = list(x.view(len(sizes), sizes[0], *x.shape[1:]).unbind(0) if even else x.split(list(sizes)))
    return parts[::-1] if reverse else parts


class Chunk(NamedTuple):
    """Some steps: ``rows`` of the whole sequence, and how many sequences have each, in the order of the rows."""

    rows: slice
    sizes: tuple[int, ...]
    even: bool
    reverse: bool

    @property
    def total(self) -> int:
        """How many rows."""
        return self.rows.stop - self.rows.start

    def split(self, whole: Tensor) -> list[Tensor]:
        """One view per step of a tensor of all rows, in the order of the direction."""
        return split(whole[self.rows], self.sizes, self.even, self.reverse)

    def joined(self, states: list[Tensor]) -> Tensor:
        """What steps in the order of the direction started from, as rows."""
        return torch.cat(states[::-1] if self.reverse else states)


class Views:
    """One tuple of views per step, of buffers that hold the rows of a chunk: as (n, columns), then those of ``flat`` as (n * columns,).

    They are made once where all steps are alike.
    """

    def __init__(self, buffers: Sequence[Tensor], flat: Sequence[Tensor]) -> None:
        self.buffers, self.flat = buffers, flat
        self.made: list[tuple[Tensor, ...]] = []

    def of(self, chunk: Chunk) -> list[tuple[Tensor, ...]]:
        """The first rows of the buffers; the first chunk of alike steps is the longest."""
        steps = len(chunk.sizes)
        if not (chunk.even and self.made):
            lists = [split(x[: chunk.total], chunk.sizes, chunk.even, chunk.reverse) for x in self.buffers]
            for x in self.flat:
                columns, all_of_it = x.shape[1], x[: chunk.total].view(-1)
                lists.append(split(all_of_it, [n * columns for n in chunk.sizes], chunk.even, chunk.reverse))
            self.made = list(zip(*lists, strict=True))
        return self.made[len(self.made) - steps :] if chunk.reverse else self.made[:steps]


class Rows:
    """Where the steps of a batch of sequences are, in the order in which a direction visits them."""

    def __init__(self, sizes: Sequence[int], reverse: bool) -> None:
        self.sizes = list(sizes)
        self.reverse = reverse
        self.order = range(len(self.sizes))[:: -1 if reverse else 1]
        self.even = self.sizes[0] == self.sizes[-1]

    def split(self, x: Tensor) -> list[Tensor]:
        """One view per step, in the order of the direction."""
        return split(x, self.sizes, self.even, self.reverse)

    def back(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The views of every step, from the last of the direction to the first."""
        return zip(*(split(x, self.sizes, self.even, not self.reverse) for x in tensors), strict=True)

    def chunks(self, most: int) -> list[Chunk]:
        """Steps that follow each other in the direction, together of at most ``most`` rows or of one step."""
        groups, rows = [[self.order[0]]], self.sizes[self.order[0]]
        for t in self.order[1:]:
            rows += self.sizes[t]
            if rows > most:
                groups.append([])
                rows = self.sizes[t]
            groups[-1].append(t)
        start, found = [0, *accumulate(self.sizes)], []
        for group in groups:
            first, last = min(group[0], group[-1]), max(group[0], group[-1])
            at = slice(start[first], start[last + 1])
            found.append(Chunk(at, tuple(self.sizes[first : last + 1]), self.even, self.reverse))
        return found

    def before(self, earlier: Tensor, first: Tensor, n: int) -> Tensor:
        """The state that a step of ``n`` sequences starts from: what is left of ``earlier``, and ``first`` for new ones."""
        m = len(earlier)
        if m == n:
            return earlier
        return earlier[:n] if m > n else torch.cat([earlier, first[m:n]])

    def predecessors(self, states: Tensor, first: Tensor) -> Tensor:
        """For every row the state before it, rows in the order of ``states``."""
        parts = self.split(states)
        found = [first[: len(parts[0])]]
        found += [self.before(p, first, len(q)) for p, q in pairwise(parts)]
        return torch.cat(found[::-1] if self.reverse else found)

    def weight_gradient(self, d: Tensor, states: Tensor, first: Tensor) -> Tensor:
        """Sum over all rows of d (gates,) times the state before (H,): (gates, H)."""
        if not self.even:
            return d.t() @ self.predecessors(states, first).to(d.dtype)
        n, count = len(first), len(states)
        begun, later, before = slice(0, n), slice(n, count), slice(0, count - n)
        if self.reverse:
            begun, later, before = slice(count - n, count), slice(0, count - n), slice(n, count)
        return torch.addmm(d[later].t() @ states[before].to(d.dtype), d[begun].t(), first.to(d.dtype))

    def last(self, states: Tensor) -> Tensor:
        """The state behind the last step of every sequence."""
        parts = states.split(self.sizes)
        if self.reverse:
            return parts[0].clone()
        if self.even:
            return parts[-1].clone()
        ends = [parts[-1]]
        for t in range(len(parts) - 2, -1, -1):
            if self.sizes[t] > self.sizes[t + 1]:
                ends.append(parts[t][self.sizes[t + 1] :])
        return torch.cat(ends)


class Carried:
    """A gradient on its way back through the steps: what arrives at each, and what is left for the first states."""

    def __init__(self, last: Tensor, rows: Rows) -> None:
        self.last, self.rows = last, rows
        self.left: list[Tensor] = []
        self.n = rows.sizes[rows.order[-1]]
        self.now = last[: self.n]

    def arrive(self, n: int) -> Tensor:
        """The gradient at a step of ``n`` sequences: those that end there bring that of their last state."""
        if self.n < n:
            self.now = torch.cat([self.now, self.last[self.n : n]])
        elif self.n > n:
            self.left.append(self.now[n:])
            self.now = self.now[:n]
        self.n = n
        return self.now

    def first(self) -> Tensor:
        """The gradient of the first states."""
        return torch.cat([self.now, *self.left[::-1]]) if self.left else self.now


class Product:
    """A gradient on its way back through products with ``w``, to which every step adds its own."""

    def __init__(self, last: Tensor, rows: Rows, w: Tensor) -> None:
        self.carried, self.w = Carried(last, rows), w
        self.left: Tensor | None = None
        self.kept: tuple[Tensor, Tensor] | None = None

    def leave(self, d: Tensor, kept: tuple[Tensor, Tensor] | None = None) -> None:
        """``d`` is to be multiplied with ``w``; to that comes the product of the two tensors ``kept``."""
        self.left, self.kept = d, kept

    def arrive(self, g: Tensor, n: int) -> Tensor:
        """The gradient at a step of ``n`` sequences that adds ``g``."""
        if self.left is None or self.carried.n != n:
            self.multiply()
            return g + self.carried.arrive(n)
        return torch.addmm(g if self.kept is None else torch.addcmul(g, *self.kept), self.left, self.w)

    def multiply(self) -> None:
        """What was left is carried on."""
        if self.left is not None:
            d = torch.mm(self.left, self.w)
            self.carried.now = d if self.kept is None else d.addcmul_(*self.kept)

    def first(self) -> Tensor:
        """The gradient of the first states."""
        self.multiply()
        return self.carried.first()
