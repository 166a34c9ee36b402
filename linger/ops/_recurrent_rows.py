"""The rows of a sequence in the order of a PackedSequence, and who is whose predecessor.

Row ``offset[t] + b`` is step t of sequence b; ``sizes[t]`` sequences have a step t, the longest first. A batch without lengths
has the same size at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


class Rows:
    """Where the steps of a batch of sequences are, in the order in which a direction visits them."""

    def __init__(self, sizes: Sequence[int], reverse: bool) -> None:
        self.sizes = list(sizes)
        self.reverse = reverse
        self.order = range(len(self.sizes))[:: -1 if reverse else 1]
        self.even = self.sizes[0] == self.sizes[-1]

    def split(self, x: Tensor) -> list[Tensor]:
        """One view per step, in the order of the direction."""
        parts = list(x.split(self.sizes))
        return parts[::-1] if self.reverse else parts

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
        self.now = last[: rows.sizes[rows.order[-1]]]

    def arrive(self, n: int) -> Tensor:
        """The gradient at a step of ``n`` sequences: those that end there bring that of their last state."""
        m = len(self.now)
        if m < n:
            self.now = torch.cat([self.now, self.last[m:n]])
        elif m > n:
            self.left.append(self.now[n:])
            self.now = self.now[:n]
        return self.now

    def first(self) -> Tensor:
        """The gradient of the first states."""
        return torch.cat([self.now, *self.left[::-1]]) if self.left else self.now
