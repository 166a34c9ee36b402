"""The recurrent cells of ``_cells`` over a whole sequence in PyTorch: integers in floats, and the straight-through gradient.

Forward computes in LSB: every tensor holds integers, in float32 where gates have 8 bits, else in float64. Backward works on real
values: the derivative of a rounding is 1, of a saturation 0 beyond its limits, of sigmoid and tanh that of the real function at
the quantized argument; products take the quantized factors. The saturation of an argument of sigmoid or tanh needs
no 0 of its own, for there the derivative vanishes.

Gates are in the order o, i, f, g (LSTM) and r, z, n (GRU): first those with a sigmoid; in LSTM's backward the last three share
a factor. All products over the whole sequence are outside of the loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linger.ops._cells import Arithmetic
from linger.ops._recurrent_rows import Carried, Rows
from linger.ops._recurrent_tables import Functions, functions

Saved = list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a cell computes with. ``scale``: of the hidden state (0-d), ``bits`` its width, ``wide``: products need float64,
    ``relu``: an RNN's function, ``train``: a gradient is wanted.
    """

    how: Arithmetic
    scale: Tensor
    bits: int
    wide: bool
    relu: bool = False
    train: bool = False

    @property
    def tables(self) -> Functions:
        return functions(self.how, self.scale.device)

    @property
    def top(self) -> float:
        """One more than the largest integer of the hidden state."""
        return 2.0 ** (self.bits - 1)

    @property
    def limit(self) -> float:
        """One more than the largest argument."""
        return 2.0 ** (self.how.width - 1)


class Argument:
    """Accumulators of the input (real values) as arguments with F fraction bits: equation (1) of ``_cells``.

    Rounded in float64 where they are float64: float32 does not hold them.
    """

    def __init__(self, acc: Tensor, s: Setting) -> None:
        self.dtype, self.top = s.tables.dtype, s.limit
        self.kind = torch.float64 if acc.dtype == torch.float64 else self.dtype
        self.half, self.factor = (acc.new_full((), v, dtype=self.kind) for v in (0.5, 2.0**s.how.argument))

    def __call__(self, acc: Tensor) -> Tensor:
        out = torch.addcmul(self.half, acc.to(self.kind), self.factor).floor_().clamp_(-self.top, self.top - 1)
        return out.to(self.dtype)


class Recurrent:
    """W_hh h + b_hh of one step as arguments; ``w`` (gates, H) and ``b`` real values on their grids."""

    def __init__(self, w: Tensor, b: Tensor | None, s: Setting) -> None:
        kind = torch.float64 if s.wide else torch.float32
        self.weight = (w.to(kind) * (2.0**s.how.argument / s.scale.to(kind))).t().contiguous()
        self.bias = None if b is None else b.to(kind) * 2.0**s.how.argument
        self.kind, self.top = kind, s.limit
        self.same = kind == s.tables.dtype
        self.dtype = s.tables.dtype
        self.half = w.new_full((), 0.5, dtype=self.dtype)

    def __call__(self, h: Tensor) -> Tensor:
        h = h if self.same else h.to(self.kind)
        out = torch.mm(h, self.weight) if self.bias is None else torch.addmm(self.bias, h, self.weight)
        out = (
            out if self.same else out.to(self.dtype)
        )  # before the half is added: beyond 2^23 float32 has no room for it
        return out.add_(self.half).floor_().clamp_(-self.top, self.top - 1)


class Rounded:
    """floor(v * factor + 1/2) with constants of the cell's own type on its device."""

    def __init__(self, factor: float | Tensor, like: Tensor) -> None:
        self.half = like.new_full((), 0.5)
        self.factor = factor.to(like.dtype) if isinstance(factor, Tensor) else like.new_full((), factor)

    def __call__(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.addcmul(self.half, v, self.factor, out=out).floor_()


# --- LSTM


class Projection:
    """W_hr p in units of the hidden state, p of G fraction bits; ``w`` (P, H) real values on their grid."""

    def __init__(self, w: Tensor, s: Setting, like: Tensor) -> None:
        g, kind = s.how.fraction, torch.float64 if s.wide or not s.how.narrow else torch.float32
        self.weight = (w.to(kind) * (s.scale.to(kind) * 2.0**-g)).t().contiguous()
        self.top, self.full = 2.0**g, Rounded(2.0**-g, like)

    def __call__(self, ok: Tensor, p: Tensor) -> Tensor:
        self.full(ok, p).clamp_(-self.top, self.top - 1)
        return torch.mm(p.to(self.weight.dtype), self.weight).to(p.dtype)


class LSTMStep:
    """Equations (3) to (5) of ``_cells`` for one step, in buffers that all steps share."""

    def __init__(
        self, w: Tensor, b: Tensor | None, w_hr: Tensor | None, a: Tensor, count: int, size: int, s: Setting
    ) -> None:
        self.s, self.f, self.size, g = s, s.tables, size, s.how.fraction
        self.enter, self.recur, like = Argument(a, s), Recurrent(w, b, s), self.f.table
        self.project = None if w_hr is None else Projection(w_hr, s, like)
        self.to_h = Rounded(s.scale.double() * 2.0 ** (-2 * g), like)
        self.to_k = Rounded(2.0 ** (s.how.argument - 2 * g), like)
        self.to_c = Rounded(2.0 ** (g - s.how.argument) if s.how.width == 32 else 2.0**-g, like)
        self.unit32 = a.new_full((), 2.0**-g, dtype=torch.float32)
        self.gates, self.k, self.tanh = (like.new_empty(count, n * size) for n in (4, 1, 1))
        self.slopes, self.slope = (a.new_empty(count, n * size, dtype=torch.float32) for n in (4, 1))

    def __call__(self, acc: Tensor, h: Tensor, c: Tensor, h_new: Tensor, c_new: Tensor, p: Tensor, made: Saved) -> None:
        """From the input's accumulators and the states to the new ones; ``made`` as in ``lstm_forward``."""
        s, n = self.s, len(acc)
        gates, k, tanh, slopes, slope = (x[:n] for x in (self.gates, self.k, self.tanh, self.slopes, self.slope))
        a = self.enter(acc).add_(self.recur(h)).clamp_(-s.limit, s.limit - 1)
        self.f.gates(a, 3 * self.size, gates, slopes if made else None)
        o, i, keep, new = gates.view(n, 4, self.size).unbind(1)
        kept = torch.mul(keep, c)
        inside = None
        if not s.how.narrow:
            inside = kept.abs() <= 2.0**31 if made else None
            kept.clamp_(-(2.0**31), 2.0**31 - 1)
        total = kept.addcmul_(i, new)
        self.to_k(total, k).clamp_(-s.limit, s.limit - 1)
        self.to_c(k if s.how.width == 32 else total, c_new)
        self.f.gates(k, 0, tanh, slope if made else None)
        raw = self.to_h(torch.mul(o, tanh)) if self.project is None else self.projected(torch.mul(o, tanh), p)
        torch.clamp(raw, -s.top, s.top - 1, out=h_new)
        if made:
            o, i, keep, new = gates.float().view(n, 4, self.size).unbind(1)
            self.factors((o, i, keep, new, tanh.float(), c.float()), slopes.view(n, 4, self.size), slope, inside, made)
            torch.eq(raw, h_new, out=made[0])

    def projected(self, ok: Tensor, p: Tensor) -> Tensor:
        assert self.project is not None
        return self.project(ok, p).add_(self.to_h.half).floor_()

    def factors(
        self, values: Sequence[Tensor], slopes: Tensor, slope: Tensor, inside: Tensor | None, made: Saved
    ) -> None:
        """What backward multiplies with; ``slopes`` and ``slope`` bring 2^-G along."""
        o, i, keep, new, tanh, c = values
        _, to_gates, to_cell, kept = made
        torch.mul(keep, self.unit32, out=kept)
        if inside is not None:
            kept.mul_(inside)
            c = torch.mul(c, inside)
        for k, value in enumerate((tanh, new, c, i)):
            torch.mul(slopes[:, k], value, out=to_gates[:, k])
        torch.mul(o, slope, out=to_cell)


def lstm_forward(
    a: Tensor, w: Tensor, b: Tensor | None, w_hr: Tensor | None, h: Tensor, c: Tensor, rows: Rows, s: Setting
) -> Saved:
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

    Returns:
        h (rows, P or H), c (rows, H), p (rows, H; empty without w_hr); then, empty where no gradient is wanted: where h did
        not saturate, and the factors of the gates (rows, 4, H), of tanh(k) and of the previous cell state (rows, H).
    """
    count, size, out, wanted = len(a), c.shape[1], h.shape[1], len(a) * s.train
    hs, cs = h.new_empty(count, out), h.new_empty(count, size)
    p = h.new_empty(0 if w_hr is None else count, size)
    on, made = a.new_empty(wanted, out, dtype=torch.bool), a.new_empty(wanted, 4, size, dtype=torch.float32)
    cell, keep = (a.new_empty(wanted, size, dtype=torch.float32) for _ in range(2))
    step = LSTMStep(w, b, w_hr, a, rows.sizes[0], size, s)
    ps = rows.split(p) if w_hr is not None else [p] * len(rows.sizes)
    factors = zip(*map(rows.split, (on, made, cell, keep)), strict=True) if s.train else [()] * len(rows.sizes)
    h0, c0 = h, c
    for a_t, h_t, c_t, p_t, made_t in zip(*map(rows.split, (a, hs, cs)), ps, factors, strict=True):
        step(a_t, rows.before(h, h0, len(a_t)), rows.before(c, c0, len(a_t)), h_t, c_t, p_t, list(made_t))
        h, c = h_t, c_t
    return [hs, cs, p, on, made, cell, keep]


def lstm_backward(
    grads: Sequence[Tensor], saved: Sequence[Tensor], w: Tensor, w_hr: Tensor | None, rows: Rows, unit: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of the arguments (rows, 4 H), of h0, c0 and w_hr, from those of h (rows, P or H), the last h and the last c.

    ``unit``: 2^-G, of p.
    """
    _, _, p, on, factors, cell, keep = saved
    made = torch.empty_like(factors)
    d_out = torch.empty_like(grads[0])
    dh, dc = Carried(grads[1], rows), Carried(grads[2], rows)
    lists = (x[::-1] for x in map(rows.split, (grads[0], on, factors, cell, keep, made, d_out)))
    for g_t, on_t, f_t, cell_t, keep_t, d_t, out_t in zip(*lists, strict=True):
        n = len(g_t)
        d_h = torch.add(g_t, dh.arrive(n), out=out_t).mul_(on_t)
        if w_hr is not None:
            d_h = torch.mm(d_h, w_hr)
        d_s = torch.addcmul(dc.arrive(n), d_h, cell_t)
        torch.mul(f_t[:, 0], d_h, out=d_t[:, 0])
        torch.mul(f_t[:, 1:], d_s.unsqueeze(1), out=d_t[:, 1:])
        dc.now = torch.mul(d_s, keep_t)
        dh.now = torch.mm(d_t.flatten(1), w)
    d_hr = None if w_hr is None else d_out.t() @ p.to(d_out.dtype).mul_(unit)
    return made.flatten(1), dh.first(), dc.first(), d_hr


# --- GRU


class GRUStep:
    """Equations (6), (7) of ``_cells`` with S = q_h - G for one step, in buffers that all steps share."""

    def __init__(self, w: Tensor, b: Tensor | None, a: Tensor, count: int, size: int, s: Setting) -> None:
        self.s, self.f, self.size, g = s, s.tables, size, s.how.fraction
        self.enter, self.recur, like = Argument(a, s), Recurrent(w, b, s), self.f.table
        self.one, self.product = like.new_full((), 2.0**g), 2.0 ** (2 * g + 1)
        self.to_h, self.to_g = (
            Rounded(s.scale.double() * 2.0 ** (-2 * g), like),
            Rounded(2.0**g / s.scale.double(), like),
        )
        self.reset, self.unit32 = Rounded(2.0**-g, like), a.new_full((), 2.0**-g, dtype=torch.float32)
        self.gates, self.n, self.aligned = (like.new_empty(count, k * size) for k in (2, 1, 1))
        self.slopes, self.slope = (a.new_empty(count, k * size, dtype=torch.float32) for k in (2, 1))

    def __call__(self, acc: Tensor, h: Tensor, h_new: Tensor, made: Saved) -> None:
        """From the input's accumulators and the state to the new one; ``made`` as in ``gru_forward``."""
        s, count, size = self.s, len(acc), self.size
        gates, n, aligned, slopes, slope = (
            x[:count] for x in (self.gates, self.n, self.aligned, self.slopes, self.slope)
        )
        a, b = self.enter(acc), self.recur(h)
        z = torch.add(a[:, : 2 * size], b[:, : 2 * size]).clamp_(-s.limit, s.limit - 1)
        self.f.gates(z, 2 * size, gates, slopes if made else None)
        r, keep, b_n = gates[:, :size], gates[:, size:], b[:, 2 * size :]
        z_n = self.reset(torch.mul(r, b_n)).add_(a[:, 2 * size :]).clamp_(-s.limit, s.limit - 1)
        self.f.gates(z_n, 0, n, slope if made else None)
        kept = torch.mul(keep, self.to_g(h, aligned))
        inside = kept.abs() <= self.product if made else None
        drop = torch.sub(self.one, keep)
        raw = self.to_h(kept.clamp_(-self.product, self.product - 1).addcmul_(drop, n))
        torch.clamp(raw, -s.top, s.top - 1, out=h_new)
        if inside is not None:
            self.factors((r, keep, drop, b_n, n, aligned), slopes, slope, inside, made)
            torch.eq(raw, h_new, out=made[0])

    def factors(self, values: Sequence[Tensor], slopes: Tensor, slope: Tensor, inside: Tensor, made: Saved) -> None:
        """What backward multiplies with; ``slopes`` and ``slope`` bring 2^-G along."""
        r, keep, drop, b_n, n, aligned = (v.float() for v in values)
        _, factors, kept, to_n = made
        size, how = self.size, self.s.how
        torch.mul(drop, slope, out=to_n)
        torch.mul(torch.mul(aligned, inside).sub_(n), slopes[:, size:], out=factors[:, 1])
        torch.mul(torch.mul(b_n, 2.0 ** (how.fraction - how.argument)).mul_(to_n), slopes[:, :size], out=factors[:, 0])
        torch.mul(torch.mul(r, self.unit32), to_n, out=factors[:, 2])
        torch.mul(keep, self.unit32, out=kept).mul_(inside)


def gru_forward(a: Tensor, w: Tensor, b: Tensor | None, h: Tensor, rows: Rows, s: Setting) -> Saved:
    """All steps of one direction; arguments as in ``lstm_forward``, gates r, z, n.

    Returns:
        h (rows, H); then, empty where no gradient is wanted: where h did not saturate, and the factors of the gates (rows, 3,
        H), of the previous state and of n (rows, H).
    """
    count, size, wanted = len(a), h.shape[1], len(a) * s.train
    hs, on = h.new_empty(count, size), a.new_empty(wanted, size, dtype=torch.bool)
    made, kept, to_n = (a.new_empty(wanted, *k, size, dtype=torch.float32) for k in ((3,), (), ()))
    step = GRUStep(w, b, a, rows.sizes[0], size, s)
    factors = zip(*map(rows.split, (on, made, kept, to_n)), strict=True) if s.train else [()] * len(rows.sizes)
    h0 = h
    for a_t, h_t, made_t in zip(*map(rows.split, (a, hs)), factors, strict=True):
        step(a_t, rows.before(h, h0, len(a_t)), h_t, list(made_t))
        h = h_t
    return [hs, on, made, kept, to_n]


def gru_backward(
    grads: Sequence[Tensor], saved: Sequence[Tensor], w: Tensor, rows: Rows
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input's arguments and of the state's (rows, 3 H), which differ in n by r, and of h0."""
    _, on, factors, kept, to_n = saved
    made, whole = torch.empty_like(factors), torch.empty_like(grads[0])
    dh = Carried(grads[1], rows)
    lists = (x[::-1] for x in map(rows.split, (grads[0], on, factors, kept, made, whole)))
    for g_t, on_t, f_t, kept_t, d_t, all_t in zip(*lists, strict=True):
        d_h = torch.add(g_t, dh.arrive(len(g_t)), out=all_t).mul_(on_t)
        torch.mul(f_t, d_h.unsqueeze(1), out=d_t)
        dh.now = torch.addmm(torch.mul(d_h, kept_t), d_t.flatten(1), w)
    of_state = made.flatten(1)
    of_input = torch.cat([of_state[:, : -whole.shape[1]], whole.mul_(to_n)], 1)
    return of_input, of_state, dh.first()


# --- RNN


def rnn_forward(a: Tensor, w: Tensor, b: Tensor | None, h: Tensor, rows: Rows, s: Setting) -> Saved:
    """Equation (8) of ``_cells`` for all steps of one direction; arguments as in ``lstm_forward``.

    Returns:
        h (rows, H), and the factor of the argument, empty where no gradient is wanted.
    """
    f, enter, recur = s.tables, Argument(a, s), Recurrent(w, b, s)
    to_h = Rounded(s.scale.double() * 2.0 ** -(s.how.argument if s.relu else s.how.fraction), h)
    hs = torch.empty_like(a, dtype=h.dtype)
    made = a.new_empty(len(a) * s.train, a.shape[1], dtype=torch.float32)
    factors: Sequence[Tensor | None] = rows.split(made) if s.train else [None] * len(rows.sizes)
    h0 = h
    for acc_t, h_t, made_t in zip(*map(rows.split, (a, hs)), factors, strict=True):
        a_t = enter(acc_t).add_(recur(rows.before(h, h0, len(acc_t)))).clamp_(-s.limit, s.limit - 1)
        value = torch.relu(a_t) if s.relu else torch.empty_like(a_t)
        if not s.relu:
            f.gates(a_t, 0, value, made_t)
        elif made_t is not None:
            made_t.copy_((a_t > 0) & (a_t < s.limit - 1))
        raw = to_h(value)
        torch.clamp(raw, -s.top, s.top - 1, out=h_t)
        if made_t is not None:
            made_t.mul_(raw == h_t)
        h = h_t
    return [hs, made if s.relu else made.mul_(2.0**s.how.fraction)]


def rnn_backward(grads: Sequence[Tensor], saved: Sequence[Tensor], w: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Gradients of the arguments (rows, H) and of h0."""
    made, dh = torch.empty_like(grads[0]), Carried(grads[1], rows)
    for g_t, s_t, d_t in zip(*(x[::-1] for x in map(rows.split, (grads[0], saved[1], made))), strict=True):
        torch.add(g_t, dh.arrive(len(g_t)), out=d_t).mul_(s_t)
        dh.now = torch.mm(d_t, w)
    return made, dh.first()
