"""Equations (6), (7) of ``_cells`` with S = q_h - G, the GRU, over a whole sequence (``_recurrent_step``). Gates: r, z, n."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from linger.eager import at_hand
from linger.ops._recurrent_rows import Chunk, Product, Rows, Views
from linger.ops._recurrent_step import Reach, Rounded, Setting, Sums, chunk_rows


class Buffers:
    """What a chunk of steps writes into (rows, columns): see ``GRU.run``."""

    def __init__(self, rows: int, size: int, like: Tensor) -> None:
        self.sums = like.new_empty(rows, 3 * size)
        self.gates = like.new_empty(rows, 2 * size)
        self.input, self.b, self.u, self.n, self.aligned, self.raw = (like.new_empty(rows, size) for _ in range(6))
        self.row, self.n_row = (like.new_empty(rows, n * size, dtype=torch.int32) for n in (2, 1))
        sums = self.sums, self.sums[:, : 2 * size], self.sums[:, 2 * size :], self.input
        gates = self.gates, self.gates[:, :size], self.gates[:, size:]
        rest = self.row, self.b, self.u, self.n_row, self.n, self.aligned, self.raw
        self.views = Views((*sums, *gates, *rest), (self.row, self.gates, self.n_row, self.n))


class GRU:
    """One direction: states (rows, H) of all steps, and what backward multiplies with."""

    def __init__(
        self, a: Tensor, w: Tensor, b: Tensor | None, h: Tensor, rows: Rows, s: Setting, factors: Tensor
    ) -> None:
        size, g, f = h.shape[1], s.how.fraction, s.tables
        self.a, self.rows, self.s, self.size, like = a, rows, s, size, f.table
        self.hs = h.new_empty(len(a), size)
        reach = Reach.of(a, w, b, s)
        self.sums = Sums(a, w, b, s, reach, 2 * size, 2 * size)
        self.n_saturates = reach is None or not reach.both <= s.limit
        self.kept_fits = at_hand(s.scale) and s.top <= float(s.scale)  # a state within 1 saturates with no z
        self.look, unit = f.look(0, size, s.limit), f.unit
        self.to_h = Rounded(s.scale.double() * 2.0 ** (-2 * g), like)
        self.to_g = Rounded(2.0**g / s.scale.double(), like)
        self.one, self.product, self.per_b = like.new_full((), 2.0**g), 2.0 ** (2 * g + 1), unit * 2.0**-g
        self.unit, self.n_first = like.new_full((), unit), like.new_full((), self.look.origin + 0.5 * unit)
        self.n_limits = self.look.origin - s.limit * unit, self.look.origin + (s.limit - 1) * unit
        wanted = len(a) * s.train
        self.factors = factors.view(wanted, 3, size)
        self.kept, self.to_n = (a.new_empty(wanted, size, dtype=torch.float32) for _ in range(2))

    def all(self, h: Tensor) -> None:
        """Every step, from the first state."""
        chunks = self.rows.chunks(chunk_rows(4 * self.size))
        buffers, first = Buffers(max(c.total for c in chunks), self.size, self.sums.look.table), h
        for chunk in chunks:
            h = self.run(chunk, buffers, h, first)
            if self.s.train:
                self.keep_factors(chunk, buffers)

    def fill(self, chunk: Chunk, buffers: Buffers) -> None:
        """What the steps start from: the argument of n becomes a row, with the half of its rounding."""
        n = chunk.total
        arguments = self.sums.fill(self.a[chunk.rows], buffers.sums[:n])
        torch.addcmul(self.n_first, arguments, self.unit, out=buffers.input[:n])

    def run(self, chunk: Chunk, buffers: Buffers, h: Tensor, first: Tensor) -> Tensor:
        """The steps of a chunk; the state behind them."""
        even, top, per_b, look, look_n = self.rows.even, self.s.top, self.per_b, self.sums.look, self.look
        self.fill(chunk, buffers)
        for views, h_new in zip(buffers.views.of(chunk), chunk.split(self.hs), strict=True):
            a, a_rz, b_n, a_n, gates, r, z, row, b, u, n_row, n, aligned, raw, row1, gates1, n_row1, n1 = views
            if not even:
                h = self.rows.before(h, first, len(a))
            self.sums.add(a, h)
            look(a_rz, row, gates, row1, gates1)
            torch.floor(b_n, out=b)
            torch.add(a_n, torch.mul(r, b, out=u), alpha=per_b, out=u)
            if self.n_saturates:
                u.clamp_(*self.n_limits)
            look_n(u, n_row, n, n_row1, n1)
            self.mix(z, aligned.copy_(h) if self.to_g.number == 1 else self.to_g(h, aligned), n, raw)
            h = torch.clamp(raw, -top, top - 1, out=h_new)
        return h

    def mix(self, z: Tensor, h: Tensor, n: Tensor, raw: Tensor) -> None:
        """Equation (7) before its last saturation."""
        if self.kept_fits:
            half, per_h = self.to_h.half, self.to_h.number
            torch.addcmul(half, z, h, value=per_h, out=raw)
            raw.addcmul_(torch.sub(self.one, z), n, value=per_h).floor_()
        else:
            kept = torch.mul(z, h).clamp_(-self.product, self.product - 1)
            self.to_h(kept.addcmul_(torch.sub(self.one, z), n), raw)

    def keep_factors(self, chunk: Chunk, buffers: Buffers) -> None:
        """What backward multiplies with, of all steps of a chunk; slopes bring 2^-G along. All are 0 where h saturates."""
        n, at, size, how = chunk.total, chunk.rows, self.size, self.s.how
        made, kept, to_n = self.factors[at], self.kept[at], self.to_n[at]
        gates = buffers.gates[:n].view(n, 2, size)
        r, z = gates[:, 0].float(), gates[:, 1].float()
        slopes, on = made.new_empty(n, 2 * size), torch.empty_like(kept)
        self.sums.look.slopes(buffers.sums[:n, : 2 * size], buffers.row[:n], slopes)
        self.look.slopes(buffers.u[:n], buffers.n_row[:n], to_n)
        torch.eq(buffers.raw[:n], self.hs[at], out=on)
        to_n.mul_(torch.sub(2.0**how.fraction, z)).mul_(on)
        difference = buffers.aligned[:n].float()
        torch.mul(z, 2.0**-how.fraction, out=kept).mul_(on)
        if not self.kept_fits:
            inside = torch.mul(gates[:, 1], buffers.aligned[:n]).abs_() <= self.product
            kept.mul_(inside)
            difference = torch.mul(difference, inside)
        difference = torch.sub(difference, buffers.n[:n].float()).mul_(on)
        torch.mul(slopes[:, size:], difference, out=made[:, 1])
        torch.mul(slopes[:, :size], buffers.b[:n].float(), out=made[:, 0])
        made[:, 0].mul_(2.0 ** (how.fraction - how.argument)).mul_(to_n)
        torch.mul(r, 2.0**-how.fraction, out=made[:, 2]).mul_(to_n)


def gru_forward(
    a: Tensor, w: Tensor, b: Tensor | None, h: Tensor, rows: Rows, s: Setting, factors: Tensor
) -> list[Tensor]:
    """All steps of one direction; arguments as in ``lstm_forward``, gates r, z, n.

    Returns:
        h (rows, H); then, empty where no gradient is wanted, the factors of the gates (rows, 3 H), of the previous state and of
        n (rows, H), all 0 where h saturates.
    """
    made = GRU(a, w, b, h, rows, s, factors)
    made.all(h)
    return [made.hs, factors, made.kept, made.to_n]


def gru_backward(
    grads: Sequence[Tensor], saved: Sequence[Tensor], w: Tensor, rows: Rows
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the state's arguments (rows, 3 H), of the input's of n, which are others (rows, H), and of h0."""
    _, whole_factors, kept, to_n = saved
    factors = whole_factors.unflatten(1, (3, -1))
    made, whole = torch.empty_like(factors), torch.empty_like(to_n)
    dh = Product(grads[1], rows, w)
    parts = grads[0], factors, kept, to_n, made, made.flatten(1), whole
    for n, views in zip(rows.sizes[:: 1 if rows.reverse else -1], rows.back(*parts), strict=True):
        g_t, f_t, kept_t, n_t, d_t, flat_t, whole_t = views
        d_h = dh.arrive(g_t, n)
        torch.mul(f_t, d_h.unsqueeze(1), out=d_t)
        torch.mul(d_h, n_t, out=whole_t)
        dh.leave(flat_t, (d_h, kept_t))
    return made.flatten(1), whole, dh.first()
