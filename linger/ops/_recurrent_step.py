"""The recurrent cells of ``_cells`` over a whole sequence in PyTorch: integers in floats, and the straight-through gradient.

Forward computes in LSB: every tensor holds integers, in float32 where gates have 8 bits, else in float64. Backward works on real
values: the derivative of a rounding is 1, of a saturation 0 beyond its limits, of sigmoid and tanh that of the real function at
the quantized argument; products take the quantized factors. An argument's saturation needs no 0 of its own, for there the
derivative vanishes.

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
    """What a cell computes with. ``scale``: of the hidden state (0-d), ``bits`` its width, ``wide``: products need float64."""

    how: Arithmetic
    scale: Tensor
    bits: int
    wide: bool
    relu: bool = False

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


def argument(acc: Tensor, how: Arithmetic) -> Tensor:
    """Accumulators (real values) as arguments with F fraction bits: equation (1) of ``_cells``."""
    dtype, top = torch.float32 if how.narrow else torch.float64, 2.0 ** (how.width - 1)
    return acc.to(dtype).mul(2.0**how.argument).add_(0.5).floor_().clamp_(-top, top - 1)


class Recurrent:
    """W_hh h + b_hh of one step as arguments; ``w`` (gates, H) and ``b`` real values on their grids."""

    def __init__(self, w: Tensor, b: Tensor | None, s: Setting) -> None:
        kind = torch.float64 if s.wide else torch.float32
        self.weight = (w.to(kind) * (2.0**s.how.argument / s.scale.to(kind))).t().contiguous()
        self.bias = None if b is None else b.to(kind) * 2.0**s.how.argument
        self.kind, self.top = kind, s.limit
        self.same = kind == s.tables.dtype
        self.dtype = s.tables.dtype

    def __call__(self, h: Tensor) -> Tensor:
        h = h if self.same else h.to(self.kind)
        out = torch.mm(h, self.weight) if self.bias is None else torch.addmm(self.bias, h, self.weight)
        out = (
            out if self.same else out.to(self.dtype)
        )  # before the half is added: beyond 2^23 float32 has no room for it
        return out.add_(0.5).floor_().clamp_(-self.top, self.top - 1)


def rounded(v: Tensor, factor: float) -> Tensor:
    """floor(v * factor + 1/2)."""
    return torch.mul(v, factor).add_(0.5).floor_()


# --- LSTM


@dataclass(frozen=True, kw_only=True)
class Projection:
    """W_hr p: the weight (P, H) as it multiplies integers of G fraction bits into units of the hidden state."""

    weight: Tensor
    fraction: int

    def __call__(self, ok: Tensor) -> tuple[Tensor, Tensor]:
        """p (integers of G fraction bits) and W_hr p in units of h."""
        g = self.fraction
        p = rounded(ok, 2.0**-g).clamp_(-(2.0**g), 2.0**g - 1)
        return p, torch.mm(p.to(self.weight.dtype), self.weight).to(p.dtype)


def lstm_forward(
    a: Tensor, w: Tensor, b: Tensor | None, w_hr: Tensor | None, h: Tensor, c: Tensor, rows: Rows, s: Setting
) -> Saved:
    """Equations (3) to (5) of ``_cells``.

    Args:
        a: arguments of the input (rows, 4 H), gates o, i, f, g.
        w: (4 H, P or H).
        b: (4 H,).
        w_hr: (P, H) or None.
        h: first hidden state (N, P or H), integers.
        c: first cell state (N, H), integers.
        rows: where the steps are.
        s: the arithmetic.

    Returns:
        z (rows, 4 H), gates (rows, 4 H), k, tanh(k), c (rows, H), h before its saturation, h (rows, P or H), p (empty, or (rows, H)).
    """
    how, f, size = s.how, s.tables, c.shape[1]
    g, recur = how.fraction, Recurrent(w, b, s)
    project = None if w_hr is None else _projection(w_hr, s)
    to_h = (s.scale.double() * 2.0 ** (-2 * g)).to(f.dtype)
    half = torch.full_like(to_h, 0.5)
    z, gates = torch.empty_like(a), torch.empty_like(a)
    k, tk, cs, p = (a.new_empty(a.shape[0], size) for _ in range(4))
    raw, hs = (a.new_empty(a.shape[0], h.shape[1]) for _ in range(2))
    h0, c0, product = h, c, 2.0**31
    for a_t, z_t, v_t, k_t, tk_t, c_t, p_t, raw_t, h_t in zip(
        *map(rows.split, (a, z, gates, k, tk, cs, p, raw, hs)), strict=True
    ):
        n = len(a_t)
        h, c = rows.before(h, h0, n), rows.before(c, c0, n)
        torch.add(a_t, recur(h), out=z_t).clamp_(-s.limit, s.limit - 1)
        f.gates(z_t, 3 * size, v_t)
        o, i, keep, new = v_t.view(n, 4, size).unbind(1)
        kept = torch.mul(keep, c)
        if not how.narrow:
            kept.clamp_(-product, product - 1)
        total = kept.addcmul_(i, new)
        torch.mul(total, 2.0 ** (how.argument - 2 * g), out=k_t).add_(0.5).floor_().clamp_(-s.limit, s.limit - 1)
        source, factor = (k_t, 2.0 ** (g - how.argument)) if how.width == 32 else (total, 2.0**-g)
        torch.mul(source, factor, out=c_t).add_(0.5).floor_()
        f.gates(k_t, 0, tk_t)
        if project is None:
            torch.addcmul(half, torch.mul(o, tk_t), to_h, out=raw_t).floor_()
        else:
            full, out = project(torch.mul(o, tk_t))
            p_t.copy_(full)
            torch.add(out, 0.5, out=raw_t).floor_()
        torch.clamp(raw_t, -s.top, s.top - 1, out=h_t)
        h, c = h_t, c_t
    return [z, gates, k, tk, cs, raw, hs, p if project is not None else p[:0]]


def _projection(w_hr: Tensor, s: Setting) -> Projection:
    kind = torch.float64 if s.wide or not s.how.narrow else torch.float32
    return Projection(
        weight=(w_hr.to(kind) * (s.scale.to(kind) * 2.0**-s.how.fraction)).t().contiguous(), fraction=s.how.fraction
    )


def lstm_backward(
    grads: Sequence[Tensor],
    saved: Sequence[Tensor],
    w: Tensor,
    w_hr: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    rows: Rows,
    s: Setting,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of the arguments (rows, 4 H), of h0, c0 and w_hr, from those of h (rows, P or H), the last h and the last c."""
    z, gates, k, tk, cs, raw, hs, p = saved
    dtype, size, g = grads[0].dtype, cs.shape[1], s.how.fraction
    o, i, keep, new = gates.to(dtype).mul(2.0**-g).view(-1, 4, size).unbind(1)
    tanh_k = tk.to(dtype).mul_(2.0**-g)
    before = rows.predecessors(cs, c0)
    c = before.to(dtype) * 2.0**-g
    if not s.how.narrow:
        inside = (before * gates.view(-1, 4, size)[:, 2]).abs_() <= 2.0**31
        keep, c = keep * inside, c * inside
    slope = gate_slopes(z, 3 * size, s.how.argument, dtype).view(-1, 4, size)
    factors = torch.stack([tanh_k, new, c, i], 1).mul_(slope)
    slope_k = torch.tanh(k.to(dtype).mul_(2.0**-s.how.argument)).square_().neg_().add_(1).mul_(o)
    unclamped = raw == hs
    if w_hr is None:
        slope_k.mul_(unclamped)
        factors[:, 0].mul_(unclamped)
    made, d_out = torch.empty_like(factors), torch.empty_like(grads[0]) if w_hr is not None else grads[0][:0]
    dh, dc = Carried(grads[1], rows), Carried(grads[2], rows)
    weight = w.to(dtype)
    lists = [x[::-1] for x in map(rows.split, (grads[0], factors, slope_k, keep, made, unclamped))]
    outs = rows.split(d_out)[::-1] if w_hr is not None else [d_out] * len(lists[0])
    for g_t, f_t, sk_t, keep_t, d_t, on_t, out_t in zip(*lists, outs, strict=True):
        n = len(g_t)
        d_h = torch.add(g_t, dh.arrive(n))
        if w_hr is not None:
            d_h = torch.mul(d_h, on_t, out=out_t) @ w_hr.to(dtype)
        d_s = torch.addcmul(dc.arrive(n), d_h, sk_t)
        torch.mul(f_t[:, 0], d_h, out=d_t[:, 0])
        torch.mul(f_t[:, 1:], d_s.unsqueeze(1), out=d_t[:, 1:])
        dc.now = torch.mul(d_s, keep_t)
        dh.now = torch.mm(d_t.view(n, -1), weight)
    d_hr = None if w_hr is None else d_out.t() @ p.to(dtype).mul_(2.0**-g)
    return made.view(-1, 4 * size), dh.first(), dc.first(), d_hr


def gate_slopes(z: Tensor, sigmoids: int, fraction: int, dtype: torch.dtype) -> Tensor:
    """The derivatives of the real sigmoid (of the first columns) and tanh at arguments of ``fraction`` fraction bits."""
    real = z.to(dtype).mul_(2.0**-fraction) if z.dtype != dtype else z.mul(2.0**-fraction)
    first, rest = real[:, :sigmoids], real[:, sigmoids:]
    first.sigmoid_()
    first.sub_(first.square())
    rest.tanh_().square_().neg_().add_(1)
    return real


# --- GRU


def gru_forward(a: Tensor, w: Tensor, b: Tensor | None, h: Tensor, rows: Rows, s: Setting) -> Saved:
    """Equations (6), (7) of ``_cells`` with S = q_h - G.

    Returns:
        z of r and z (rows, 2 H), their gates, b_n, the argument of n, n, h aligned to G, h before its saturation, h (rows, H).
    """
    f, size, g = s.tables, h.shape[1], s.how.fraction
    recur, one, product = Recurrent(w, b, s), 2.0**g, 2.0 ** (2 * g + 1)
    to_g = (one / s.scale.double()).to(f.dtype)
    to_h = (s.scale.double() * 2.0 ** (-2 * g)).to(f.dtype)
    half = torch.full_like(to_h, 0.5)
    z, gates = (a.new_empty(a.shape[0], 2 * size) for _ in range(2))
    bn, zn, vn, ag, raw, hs = (a.new_empty(a.shape[0], size) for _ in range(6))
    h0 = h
    lists = zip(*map(rows.split, (a, z, gates, bn, zn, vn, ag, raw, hs)), strict=True)
    for a_t, z_t, v_t, bn_t, zn_t, vn_t, ag_t, raw_t, h_t in lists:
        h = rows.before(h, h0, len(a_t))
        b_t = recur(h)
        torch.add(a_t[:, : 2 * size], b_t[:, : 2 * size], out=z_t).clamp_(-s.limit, s.limit - 1)
        f.gates(z_t, 2 * size, v_t)
        r, keep = v_t[:, :size], v_t[:, size:]
        bn_t.copy_(b_t[:, 2 * size :])
        reset = torch.mul(r, bn_t).mul_(2.0**-g).add_(0.5).floor_()
        torch.add(a_t[:, 2 * size :], reset, out=zn_t).clamp_(-s.limit, s.limit - 1)
        f.gates(zn_t, 0, vn_t)
        torch.addcmul(half, h, to_g, out=ag_t).floor_()
        kept = torch.mul(keep, ag_t).clamp_(-product, product - 1)
        after = kept.addcmul_(torch.sub(one, keep), vn_t)
        torch.addcmul(half, after, to_h, out=raw_t).floor_()
        torch.clamp(raw_t, -s.top, s.top - 1, out=h_t)
        h = h_t
    return [z, gates, bn, zn, vn, ag, raw, hs]


def gru_backward(
    grads: Sequence[Tensor], saved: Sequence[Tensor], w: Tensor, rows: Rows, s: Setting
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input's arguments and of the state's (rows, 3 H), which differ in n by r, and of h0."""
    z, gates, bn, zn, vn, ag, raw, hs = saved
    dtype, size, g = grads[0].dtype, hs.shape[1], s.how.fraction
    unit = 2.0**-g
    r, keep = gates.to(dtype).mul_(unit).view(-1, 2, size).unbind(1)
    slope_r, slope_z = gate_slopes(z, 2 * size, s.how.argument, dtype).view(-1, 2, size).unbind(1)
    inside = (ag * gates[:, size:]).abs_() <= 2.0 ** (2 * g + 1)
    unclamped = raw == hs
    to_n = gate_slopes(zn, 0, s.how.argument, dtype).mul_(1 - keep).mul_(unclamped)
    kept = keep * (inside & unclamped)
    to_z = torch.where(inside, ag.to(dtype), 0).sub_(vn).mul_(unit).mul_(unclamped).mul_(slope_z)
    to_r = bn.to(dtype).mul_(2.0**-s.how.argument).mul_(to_n).mul_(slope_r)
    factors = torch.stack([to_r, to_z, to_n * r], 1)
    made, whole = torch.empty_like(factors), torch.empty_like(grads[0])
    dh, weight = Carried(grads[1], rows), w.to(dtype)
    lists = [x[::-1] for x in map(rows.split, (grads[0], factors, kept, made, whole))]
    for g_t, f_t, kept_t, d_t, all_t in zip(*lists, strict=True):
        d_h = torch.add(g_t, dh.arrive(len(g_t)), out=all_t)
        torch.mul(f_t, d_h.unsqueeze(1), out=d_t)
        dh.now = torch.addmm(torch.mul(d_h, kept_t), d_t.view(len(g_t), -1), weight)
    of_state = made.view(-1, 3 * size)
    of_input = torch.cat([of_state[:, : 2 * size], whole.mul_(to_n)], 1)
    return of_input, of_state, dh.first()


# --- RNN


def rnn_forward(a: Tensor, w: Tensor, b: Tensor | None, h: Tensor, rows: Rows, s: Setting) -> Saved:
    """Equation (8) of ``_cells``.

    Returns:
        The argument, h before its saturation, and h, each (rows, H).
    """
    f, recur = s.tables, Recurrent(w, b, s)
    fraction = s.how.argument if s.relu else s.how.fraction
    to_h = (s.scale.double() * 2.0**-fraction).to(f.dtype)
    half = torch.full_like(to_h, 0.5)
    z, raw, hs = (torch.empty_like(a) for _ in range(3))
    h0 = h
    for a_t, z_t, raw_t, h_t in zip(*map(rows.split, (a, z, raw, hs)), strict=True):
        h = rows.before(h, h0, len(a_t))
        torch.add(a_t, recur(h), out=z_t).clamp_(-s.limit, s.limit - 1)
        value = torch.relu(z_t) if s.relu else f.gates(z_t, 0, torch.empty_like(z_t))
        torch.addcmul(half, value, to_h, out=raw_t).floor_()
        torch.clamp(raw_t, -s.top, s.top - 1, out=h_t)
        h = h_t
    return [z, raw, hs]


def rnn_backward(
    grads: Sequence[Tensor], saved: Sequence[Tensor], w: Tensor, rows: Rows, s: Setting
) -> tuple[Tensor, Tensor]:
    """Gradients of the arguments (rows, H) and of h0."""
    z, raw, hs = saved
    dtype = grads[0].dtype
    if s.relu:
        slope = ((z > 0) & (z < s.limit - 1)).to(dtype)
    else:
        slope = gate_slopes(z, 0, s.how.argument, dtype)
    slope.mul_(raw == hs)
    made = torch.empty_like(slope)
    dh, weight = Carried(grads[1], rows), w.to(dtype)
    for g_t, s_t, d_t in zip(*(x[::-1] for x in map(rows.split, (grads[0], slope, made))), strict=True):
        torch.add(g_t, dh.arrive(len(g_t)), out=d_t).mul_(s_t)
        dh.now = torch.mm(d_t, weight)
    return made, dh.first()
