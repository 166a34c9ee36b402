"""What the loops of the recurrent cells share: integers in floats forwards, and the straight-through gradient backwards.

Forward computes in LSB: every tensor holds integers, in float32 where gates have 8 bits, else in float64. Backward works on real
values: the derivative of a rounding is 1, of a saturation 0 beyond its limits, of sigmoid and tanh that of the real function at
the quantized argument; products take the quantized factors. The saturation of an argument of sigmoid or tanh needs
no 0 of its own, for there the derivative vanishes.

What does not need the state before it is done for a chunk of steps at once; a loop writes into buffers of a chunk, whose views
are made once. All products over the whole sequence are outside of the loops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from linger.eager import BLOCK, at_hand, widest
from linger.ops._cells import Arithmetic
from linger.ops._recurrent_tables import Functions, functions

SLACK = 1 + 2.0**-10  # what rounding in float32 may take off a bound


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a cell computes with. ``scale``: of the hidden state (0-d), ``bits``: its width, ``weight_scale``: of its weights,
    ``wide``: products need float64, ``relu``: an RNN's function, ``train``: a gradient is wanted.
    """

    how: Arithmetic
    scale: Tensor
    weight_scale: Tensor
    bits: int
    wide: bool
    relu: bool = False
    train: bool = False

    @cached_property
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


def chunk_rows(columns: int) -> int:
    """How many rows of that many columns a chunk has, so that its buffers stay in the cache."""
    return max(BLOCK * torch.get_num_threads() // 3 // columns, 1)


def same(raw: Tensor, saturated: Tensor) -> bool:
    """Whether nothing saturated, where that can be looked at."""
    return at_hand(raw) and torch.equal(raw, saturated)


class Rounded:
    """floor(v * factor + 1/2) in the type of ``like``; a factor that can be looked at is a number, with which it takes less time."""

    def __init__(self, factor: float | Tensor, like: Tensor) -> None:
        self.half = like.new_full((), 0.5)
        self.number, self.factor = 0.0, like.new_empty(0)
        if isinstance(factor, Tensor) and not at_hand(factor):
            self.factor = factor.to(like.dtype)
        else:
            self.number = float(factor)

    def __call__(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        if self.number:
            return torch.add(self.half, v, alpha=self.number, out=out).floor_()
        return torch.addcmul(self.half, v, self.factor, out=out).floor_()

    def product(self, v: Tensor, w: Tensor, out: Tensor) -> Tensor:
        """The same of v * w."""
        if self.number:
            return torch.addcmul(self.half, v, w, value=self.number, out=out).floor_()
        return self(torch.mul(v, w, out=out), out)


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Bounds in LSB of an argument, known where values can be looked at.

    ``both``: of the sum of input and state, ``state``: of the state's part, ``fraction``: 1 / the LSB of a product or a half.
    """

    both: float
    state: float
    fraction: float

    @classmethod
    def of(cls, acc: Tensor, w: Tensor, b: Tensor | None, s: Setting) -> Reach | None:
        if not (at_hand(acc) and acc.numel()):
            return None
        rows, one = w.abs().sum(1).mul_(s.top / s.scale), 2.0**s.how.argument
        state = float((rows if b is None else rows.add_(b.abs())).amax()) * one * SLACK + 2
        finest = float(s.scale) * float(s.weight_scale) / one
        return cls(both=min(widest(acc) * one + 1, s.limit) + state, state=state, fraction=max(finest, 2.0))


class Sums:
    """The sums of both parts of equation (1) in ``_cells`` as rows of a table, in a buffer that ``fill`` prepares for a chunk.

    Columns behind the first ``ready`` are the state's part alone, in arguments. ``add`` takes one step (n, gates) and the state:

    1. ``cut`` where no sum saturates and its type holds the row of argument 0 with every fraction: one product, and the fraction
       is for the conversion to integers to cut; ``cut_of_single`` where float32, which takes half the time, holds the product;
    2. ``floored`` where the state's part alone fits with its fraction;
    3. ``saturated`` elsewhere, and where no value can be looked at.
    """

    def __init__(
        self, acc: Tensor, w: Tensor, b: Tensor | None, s: Setting, reach: Reach | None, ready: int, sigmoids: int
    ) -> None:
        """``w`` (gates, H) and ``b`` real values on their grids; sigmoid for the first ``sigmoids`` of ``ready`` columns."""
        f = s.tables
        self.dtype, self.limit, self.one = f.dtype, s.limit, 2.0**s.how.argument
        self.kind = torch.float64 if acc.dtype == torch.float64 else f.dtype
        self.rounded = Rounded(self.one, acc.new_empty(0, dtype=self.kind))
        if reach is not None and not (reach.state <= s.limit and reach.both <= 2 * s.limit):  # or NaN
            reach = None
        self.look = f.look(sigmoids, ready, s.limit if reach is None or s.relu else reach.both)
        self.first, self.unit, self.of_input = self.look.rows_of(len(w), s.relu)
        self.ready = ready
        self.choose(w, b, s, reach)

    def choose(self, w: Tensor, b: Tensor | None, s: Setting, reach: Reach | None) -> None:
        """The first of the three ways that holds."""
        self.way: Callable[[Sums, Tensor, Tensor], None]  # no bound method, a cycle that would keep the weights
        f, per_state = s.tables, self.one / s.scale
        kind = torch.float64 if s.wide else torch.float32
        rows = (2 * reach.both if s.relu else self.look.rows / f.unit) if reach is not None else 0.0
        if reach is not None and reach.both <= (s.limit if s.relu else f.reach) and rows * reach.fraction <= f.exact:
            weight, half = w.to(self.dtype if s.wide else torch.float32) * per_state, self.unit * 0.5
            self.weight = (weight if f.unit == 1 else weight.mul_(self.unit[:, None])).t().contiguous()
            self.front = half.add_(self.first)
            self.way = Sums.cut if weight.dtype == self.dtype else Sums.cut_of_single
            if b is not None:
                self.front.addcmul_(b.to(self.dtype), self.unit, value=self.one)
        elif reach is not None and reach.state * reach.fraction <= f.exact and f.unit == 1:
            self.weight = (w.to(self.dtype) * per_state).t().contiguous()
            self.bias = self.unit * 0.5 if b is None else (b.to(self.dtype) * self.one).add_(0.5)
            self.front, self.way = self.first, Sums.floored
        else:
            self.weight = (w.to(kind) * per_state).t().contiguous()
            self.bias = self.weight.new_zeros(len(w)) if b is None else b.to(kind) * self.one
            self.low, self.high = (self.first + v * self.unit for v in (-self.limit, self.limit - 1))
            self.front, self.way = self.first, Sums.saturated

    def fill(self, acc: Tensor, out: Tensor) -> Tensor:
        """Equation (1) of the input's part (n, gates), and into ``out`` what a step starts from; the arguments behind the ready ones.

        Rounded in float64 where the accumulators are float64: float32 does not hold them.
        """
        same_type = self.kind == self.dtype
        made = self.rounded(acc.to(self.kind), out if same_type else None).clamp_(-self.limit, self.limit - 1)
        apart = made[:, self.ready :].to(self.dtype, copy=True)
        torch.addcmul(self.front, made if same_type else made.to(self.dtype), self.of_input, out=out)
        return apart

    def add(self, a: Tensor, h: Tensor) -> None:
        """The state's part of one step, to what ``fill`` left."""
        self.way(self, a, h)

    def cut(self, a: Tensor, h: Tensor) -> None:
        a.addmm_(h, self.weight)

    def cut_of_single(self, a: Tensor, h: Tensor) -> None:
        a.add_(torch.mm(h.float(), self.weight))

    def floored(self, a: Tensor, h: Tensor) -> None:
        a.add_(torch.addmm(self.bias, h, self.weight).floor_())

    def saturated(self, a: Tensor, h: Tensor) -> None:
        """The half is added last: beyond 2^23 float32 has no room for it."""
        b = torch.addmm(self.bias, h.to(self.weight.dtype), self.weight).to(self.dtype)
        b.add_(0.5).floor_().clamp_(-self.limit, self.limit - 1)
        torch.clamp(a.addcmul_(b, self.unit), self.low, self.high, out=a)
