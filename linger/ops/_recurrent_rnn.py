"""Equation (8) of ``_cells``, the plain RNN, over a whole sequence (``_recurrent_step``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from linger.ops._recurrent_rows import Chunk, Product, Rows, Views
from linger.ops._recurrent_step import Reach, Rounded, Setting, Sums, chunk_rows


class RNN:
    """One direction: states (rows, H) of all steps, and what backward multiplies with."""

    def __init__(
        self, a: Tensor, w: Tensor, b: Tensor | None, h: Tensor, rows: Rows, s: Setting, factors: Tensor
    ) -> None:
        self.a, self.rows, self.s, self.size, like = a, rows, s, h.shape[1], s.tables.table
        self.hs = h.new_empty(len(a), self.size)
        self.sums = Sums(a, w, b, s, Reach.of(a, w, b, s), self.size, 0)
        self.to_h = Rounded(s.scale.double() * 2.0 ** -(s.how.argument if s.relu else s.how.fraction), like)
        self.factors = factors
        most = max(c.total for c in rows.chunks(chunk_rows(2 * self.size)))
        self.u, self.value, self.raw = (like.new_empty(most, self.size) for _ in range(3))
        self.row = like.new_empty(most, self.size, dtype=torch.int32)
        self.views = Views((self.u, self.row, self.value, self.raw), (self.row, self.value))

    def all(self, h: Tensor) -> None:
        """Every step, from the first state."""
        first = h
        for chunk in self.rows.chunks(chunk_rows(2 * self.size)):
            h = self.run(chunk, h, first)
            if self.s.train:
                self.keep_factors(chunk)

    def run(self, chunk: Chunk, h: Tensor, first: Tensor) -> Tensor:
        """The steps of a chunk; the state behind them."""
        even, top, relu, look, limit = self.rows.even, self.s.top, self.s.relu, self.sums.look, self.s.limit
        self.sums.fill(self.a[chunk.rows], self.u[: chunk.total])
        for views, h_new in zip(self.views.of(chunk), chunk.split(self.hs), strict=True):
            u, row, value, raw, row1, value1 = views
            if not even:
                h = self.rows.before(h, first, len(u))
            self.sums.add(u, h)
            if relu:
                torch.clamp(u.floor_(), 0, limit - 1, out=value)
            else:
                look(u, row, value, row1, value1)
            h = torch.clamp(self.to_h(value, raw), -top, top - 1, out=h_new)
        return h

    def keep_factors(self, chunk: Chunk) -> None:
        """What backward multiplies with, of all steps of a chunk."""
        n, made = chunk.total, self.factors[chunk.rows]
        if self.s.relu:
            made.copy_((self.u[:n] > 0) & (self.u[:n] < self.s.limit - 1))
        else:
            self.sums.look.slopes(self.u[:n], self.row[:n], made)
            made.mul_(2.0**self.s.how.fraction)
        made.mul_(self.raw[:n] == self.hs[chunk.rows])


def rnn_forward(
    a: Tensor, w: Tensor, b: Tensor | None, h: Tensor, rows: Rows, s: Setting, factors: Tensor
) -> list[Tensor]:
    """All steps of one direction; arguments as in ``lstm_forward``.

    Returns:
        h (rows, H), and the factor of the argument, empty where no gradient is wanted.
    """
    made = RNN(a, w, b, h, rows, s, factors)
    made.all(h)
    return [made.hs, made.factors]


def rnn_backward(grads: Sequence[Tensor], saved: Sequence[Tensor], w: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Gradients of the arguments (rows, H) and of h0."""
    made, dh = torch.empty_like(saved[1]), Product(grads[1], rows, w)
    for n, views in zip(rows.sizes[:: 1 if rows.reverse else -1], rows.back(grads[0], saved[1], made), strict=True):
        g_t, f_t, d_t = views
        dh.leave(torch.mul(dh.arrive(g_t, n), f_t, out=d_t))
    return made, dh.first()
