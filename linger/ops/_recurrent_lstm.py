"""Equations (3) to (5) of ``_cells``, the LSTM, over a whole sequence (``_recurrent_step``).

Gates are in the order o, i, f, g: first those with a sigmoid; in backward the last three share a factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import torch
from torch import Tensor

from linger.eager import at_hand, widest
from linger.ops._recurrent_rows import Carried, Chunk, Product, Rows, Views
from linger.ops._recurrent_step import Reach, Rounded, Setting, Sums, chunk_rows, same

MOST_UNCLAMPED = 2.0**17  # arguments of tanh that a table has beyond those of the chip, where that is enough for all


class Projection:
    """W_hr p in units of the hidden state, p of G fraction bits; ``w`` (P, H) real values on their grid."""

    def __init__(self, w: Tensor, s: Setting, like: Tensor) -> None:
        g, kind = s.how.fraction, torch.float64 if s.wide or not s.how.narrow else torch.float32
        self.weight = (w.to(kind) * (s.scale.to(kind) * 2.0**-g)).t().contiguous()
        self.top, self.full, self.half = 2.0**g, Rounded(2.0**-g, like), like.new_full((), 0.5)

    def __call__(self, ok: Tensor, p: Tensor, out: Tensor) -> None:
        """``out``: of o tanh(k) the next state before its saturation; ``p``: what is projected."""
        self.full(ok, p).clamp_(-self.top, self.top - 1)
        torch.floor(torch.mm(p.to(self.weight.dtype), self.weight).to(p.dtype).add_(self.half), out=out)


class Buffers:
    """What a chunk of steps writes into (rows, columns): see ``LSTM.run``."""

    def __init__(self, rows: int, size: int, out: int, like: Tensor) -> None:
        self.sums, self.gates = (like.new_empty(rows, 4 * size) for _ in range(2))
        self.k, self.tanh, self.c = (like.new_empty(rows, size) for _ in range(3))
        self.raw = like.new_empty(rows, out)
        self.row, self.k_row = (like.new_empty(rows, n * size, dtype=torch.int32) for n in (4, 1))
        parts = self.gates.view(rows, 4, size).unbind(1)
        rest = self.k, self.k_row, self.tanh, self.raw, self.c
        self.views = Views(
            (self.sums, self.row, self.gates, *parts, *rest), (self.row, self.gates, self.k_row, self.tanh)
        )


class LSTM:
    """One direction: states (rows, P or H) and (rows, H) of all steps, and what backward multiplies with.

    k is made as a row of tanh's table with its fraction, k_first + per_total (c f + i g), where k_first is the row of argument 0 and
    the half of the rounding; c' is floor(c_first + per_c k) of the same number.
    """

    def __init__(
        self, a: Tensor, w: Tensor, b: Tensor | None, w_hr: Tensor | None, h: Tensor, c: Tensor, rows: Rows, s: Setting,
        factors: Tensor,
    ) -> None:  # fmt: skip
        size, g, f = c.shape[1], s.how.fraction, s.tables
        self.a, self.rows, self.s, self.size, like = a, rows, s, size, f.table
        self.hs, self.p = h.new_empty(len(a), h.shape[1]), h.new_empty(0 if w_hr is None else len(a), size)
        self.project = None if w_hr is None else Projection(w_hr, s, like)
        self.sums = Sums(a, w, b, s, Reach.of(a, w, b, s), 4 * size, 3 * size)
        bound, unit = self.bound(c), f.unit
        self.clamps = s.how.narrow and not bound <= MOST_UNCLAMPED  # or NaN
        self.look = f.look(0, size, s.limit if self.clamps else bound)
        self.to_h = Rounded(s.scale.double() * 2.0 ** (-2 * g), like)
        k_first, k_unit = self.look.origin + 0.5 * unit, 2.0 ** (g - s.how.argument)
        self.per_total = unit * 2.0 ** (s.how.argument - 2 * g)
        self.k_first = like.new_full((), k_first)
        self.k_limits = self.look.origin - s.limit * unit, self.look.origin + (s.limit - 1) * unit
        self.kept_limits = k_first - 2.0**31 * self.per_total, k_first + (2.0**31 - 1) * self.per_total
        self.per_c = k_unit / unit  # of rows; a c of 32 bits is rounded from the rounded k
        of_c = self.look.origin if s.how.width == 32 else k_first
        self.c_first = like.new_full((), 0.5 - of_c * self.per_c)
        wanted = len(a) * s.train
        self.on = a.new_empty(wanted if w_hr is not None else 0, h.shape[1], dtype=torch.float32)
        self.factors = factors.view(wanted, 4, size)
        self.cell, self.keep = (a.new_empty(wanted, size, dtype=torch.float32) for _ in range(2))

    def bound(self, c: Tensor) -> float:
        """How large an argument of tanh(k) can be."""
        how = self.s.how
        if not how.narrow:  # both products have 32 bits
            return 2.0 ** (33 + how.argument - 2 * how.fraction)
        most = widest(c) + 127 * len(self.rows.sizes) if at_hand(c) and c.numel() else self.s.limit
        return 127 * (most + 128) / 8 + 1  # gates are at most 127 / 128, so that c grows by no more than 127 in a step

    def all(self, h: Tensor, c: Tensor) -> Tensor:
        """Every step, from the first states; the last cell states."""
        chunks = self.rows.chunks(chunk_rows(4 * self.size))
        buffers = Buffers(max(c.total for c in chunks), self.size, h.shape[1], self.sums.look.table)
        first, ended = (h, c), list[Tensor]()
        for chunk in chunks:
            h, c, begun = self.run(chunk, buffers, (h, c), first, ended)
            if self.s.train:
                self.keep_factors(chunk, buffers, chunk.joined(begun))
            c = c.clone()  # the next chunk writes there
        return torch.cat([c, *ended[::-1]])

    def run(
        self,
        chunk: Chunk,
        buffers: Buffers,
        at: tuple[Tensor, Tensor],
        first: tuple[Tensor, Tensor],
        ended: list[Tensor],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The steps of a chunk: the states behind them, and the cell states that they start from."""
        (h, c), even, begun = at, self.rows.even, list[Tensor]()
        narrow, top, add, look, look_k = self.s.how.narrow, self.s.top, self.sums.add, self.sums.look, self.look
        clamps, k_first, per_total, to_h = self.clamps, self.k_first, self.per_total, self.to_h.product
        self.sums.fill(self.a[chunk.rows], buffers.sums[: chunk.total])
        projected = [None] * len(chunk.sizes) if self.project is None else chunk.split(self.p)
        for views, h_new, p in zip(buffers.views.of(chunk), chunk.split(self.hs), projected, strict=True):
            a, row, gates, o, i, keep, new, k, k_row, tanh, raw, c_new, row1, gates1, k_row1, tanh1 = views
            if not even:
                h, c = self.before(h, c, first, len(a), ended)
            begun.append(c)
            add(a, h)
            look(a, row, gates, row1, gates1)
            torch.addcmul(k_first, keep, c, value=per_total, out=k)
            if not narrow:
                k.clamp_(*self.kept_limits)
            k.addcmul_(i, new, value=per_total)
            torch.add(self.c_first, k, alpha=self.per_c, out=c_new).floor_()
            if clamps:
                k.clamp_(*self.k_limits)
            look_k(k, k_row, tanh, k_row1, tanh1)
            if p is None:
                to_h(o, tanh, raw)
            else:
                self.project(torch.mul(o, tanh), p, raw)
            h, c = torch.clamp(raw, -top, top - 1, out=h_new), c_new
        return h, c, begun

    def before(
        self, h: Tensor, c: Tensor, first: tuple[Tensor, Tensor], n: int, ended: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The states that a step of ``n`` sequences starts from; ``ended``: the cell states of those that have no more steps."""
        if len(c) > n and not self.rows.reverse:
            ended.append(c[n:].clone())
        return self.rows.before(h, first[0], n), self.rows.before(c, first[1], n)

    def keep_factors(self, chunk: Chunk, buffers: Buffers, c: Tensor) -> None:
        """What backward multiplies with, of all steps of a chunk; slopes bring 2^-G along. ``c``: before each step."""
        n, at, unit = chunk.total, chunk.rows, 2.0**-self.s.how.fraction
        made, cell, keep, size = self.factors[at], self.cell[at], self.keep[at], self.size
        gates = buffers.gates[:n].view(n, 4, size)
        self.sums.look.slopes(buffers.sums[:n], buffers.row[:n], made.view(n, 4 * size))
        self.look.slopes(buffers.k[:n], buffers.k_row[:n], cell)
        torch.mul(gates[:, 2], unit, out=keep)
        if not self.s.how.narrow:
            inside = torch.mul(gates[:, 2], c).abs_() <= 2.0**31
            keep.mul_(inside)
            c = c.mul_(inside)
        for k, value in enumerate((buffers.tanh[:n], gates[:, 3], c, gates[:, 1])):
            made[:, k].mul_(value.float())
        cell.mul_(gates[:, 0].float())
        if self.project is not None:
            torch.eq(buffers.raw[:n], self.hs[at], out=self.on[at])
        elif not same(buffers.raw[:n], self.hs[at]):
            on = torch.eq(buffers.raw[:n], self.hs[at], out=torch.empty_like(cell))
            made[:, 0].mul_(on)
            cell.mul_(on)


def lstm_forward(
    a: Tensor, w: Tensor, b: Tensor | None, w_hr: Tensor | None, h: Tensor, c: Tensor, rows: Rows, s: Setting,
    factors: Tensor,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """All steps of one direction.

    Args:
        a: accumulators of the input (rows, 4 H), real values, gates o, i, f, g.
        w: (4 H, P or H).
        b: (4 H,).
        w_hr: (P, H) or None.
        h: first hidden state (N, P or H), integers.
        c: first cell state (N, H), integers.
        rows: where the steps are.
        s: the arithmetic.
        factors: to be written (rows, 4 H), 0 rows where no gradient is wanted; it may be ``a``.

    Returns:
        The last c (N, H); and h (rows, P or H), p (rows, H; empty without w_hr), then, empty where no gradient is wanted, where h did
        not saturate (rows, P; empty without w_hr), and the factors of the gates (rows, 4 H), of tanh(k) and of the previous
        cell state (rows, H), which without w_hr are 0 where h saturates.
    """
    made = LSTM(a, w, b, w_hr, h, c, rows, s, factors)
    return made.all(h, c), [made.hs, made.p, made.on, factors, made.cell, made.keep]


def lstm_backward(
    grads: Sequence[Tensor], saved: Sequence[Tensor], w: Tensor, w_hr: Tensor | None, rows: Rows, unit: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of the arguments (rows, 4 H), of h0, c0 and w_hr, from those of h (rows, P or H), the last h and the last c.

    ``unit``: 2^-G, of p.
    """
    _, p, on, whole, cell, keep = saved
    factors = whole.unflatten(1, (4, -1))
    made, d_s, d_s3 = torch.empty_like(factors), None, grads[2]
    dh, dc = Product(grads[1], rows, w), Carried(grads[2].clone(), rows)
    d_out = torch.empty_like(on)
    outs = rows.back(on, d_out) if w_hr is not None else repeat((on, d_out))
    parts = grads[0], factors[:, 0], factors[:, 1:], cell, keep, made.flatten(1), made[:, 0], made[:, 1:]
    for n, views, (on_t, out_t) in zip(rows.sizes[:: 1 if rows.reverse else -1], rows.back(*parts), outs, strict=False):
        g_t, o_t, f_t, cell_t, keep_t, d_t, do_t, df_t = views
        d_h = dh.arrive(g_t, n)
        if w_hr is not None:
            d_h = torch.mm(torch.mul(d_h, on_t, out=out_t), w_hr)
        now = dc.arrive(n)
        if now is not d_s:
            d_s, d_s3 = now, now.unsqueeze(1)
        d_s.addcmul_(d_h, cell_t)
        torch.mul(o_t, d_h, out=do_t)
        torch.mul(f_t, d_s3, out=df_t)
        d_s.mul_(keep_t)
        dh.leave(d_t)
    d_hr = None if w_hr is None else (d_out.t() @ p.to(d_out.dtype)).mul_(unit)
    return made.flatten(1), dh.first(), dc.first(), d_hr
