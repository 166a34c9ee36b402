"""What the fixed-point twins of recurrent layers share: grids, layers, directions, states, packed sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from linger import observe
from linger.errors import LingerError
from linger.numerics import (
    FLOAT32_EXACT, WIDEST, Grid, bound_parameter, fake_quant, levels, reach, scale_from_weight, set_grid,
)  # fmt: skip
from linger.ops._base import IntModule
from linger.ops._cells import Arithmetic, arithmetic
from linger.ops._lowered import Lowered, Operand
from linger.ops._recurrent_lower import sequence
from linger.ops._recurrent_ops import ideal, recurrent
from linger.ops._weighted import NARROW_BIAS, WIDE_BIAS, on_grids

HIDDEN_BITS = (8, 16)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The parameters of one direction of one layer on their grids, and their scales."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None
    s_ih: Tensor
    s_hh: Tensor
    s_hr: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch of sequences as rows (``_recurrent_rows``). ``sizes``: sequences per step, on the CPU; ``scale``: of x."""

    x: Tensor
    scale: Tensor
    bits: int
    sizes: Tensor


def products(terms: int, data_bits: int, parameter_bits: int) -> int:
    """An upper bound of |sum of products| in LSB."""
    return terms * reach(data_bits) * reach(parameter_bits)


def is_wide(terms: int, data_bits: int, parameter_bits: int) -> bool:
    """Whether such a sum and a bias need float64."""
    return (
        max(data_bits, parameter_bits) > 8 or products(terms, data_bits, parameter_bits) + NARROW_BIAS >= FLOAT32_EXACT
    )


def bias_limit(terms: int, data_bits: int, parameter_bits: int) -> int:
    """How large |q_b| may get, in LSB."""
    return WIDE_BIAS if is_wide(terms, data_bits, parameter_bits) else NARROW_BIAS


class RecurrentInt(IntModule):
    """Fixed-point twin of nn.LSTM, nn.GRU or nn.RNN. Mixed in before the torch class.

    ``running_i`` is the range of the input; ``running_h`` that of the hidden state of the first layer, ``running_h_l1`` ... of
    the others, which both directions share. Each is learned from what the layer gives on real values. The cell state has
    the chip's own grid.
    """

    observed: ClassVar[tuple[str, ...]] = ("i",)
    weighted: ClassVar[bool] = True
    raw: ClassVar[frozenset[int]] = frozenset(range(1, 6))
    kind: ClassVar[str]
    op_type: ClassVar[str]
    several: ClassVar[bool] = True
    hidden_bits: int
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int

    def start(self, *, hidden_bits: int | None = None, device: torch.device | None = None, **settings: Any) -> None:
        """``hidden_bits``: width of the hidden state and the output, 8 or 16; None for that of the output."""
        super().start(device=device, **settings)
        self.hidden_bits = min(self.out_bits, 16) if hidden_bits is None else hidden_bits
        if self.hidden_bits not in HIDDEN_BITS:
            raise LingerError(f"hidden_bits is {hidden_bits!r}, allowed are 8 and 16; choose one of them")
        self.out_bits = self.hidden_bits
        for layer in range(self.num_layers):
            self.register_buffer(f"running_{self.hidden(layer)}", torch.zeros((), device=device))

    # --- names and sizes

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def out_size(self) -> int:
        """Size of the hidden state."""
        return self.proj_size or self.hidden_size

    @property
    def how(self) -> Arithmetic:
        return arithmetic(self.chip, self.hidden_bits)

    @property
    def relu(self) -> bool:
        return self.kind == "rnn" and self.nonlinearity == "relu"  # type: ignore[attr-defined]

    def hidden(self, layer: int) -> str:
        """Name of the range of a layer's hidden state."""
        return f"h_l{layer}" if layer else "h"

    def hidden_scale(self, layer: int) -> Tensor:
        return self.scale(self.hidden(layer), self.hidden_bits)

    def operand_name(self, position: int) -> str:
        return "i"

    def require_ranges(self) -> None:
        for layer in range(self.num_layers):
            self.require_range(self.hidden(layer))

    @torch.no_grad()
    def accumulator_peak(self, s_x: Tensor) -> float:
        """The largest sum over all layers and directions, of input or hidden state."""
        peaks = [torch.zeros(())]
        scale = s_x.to(self.running("h").device)
        for layer in range(self.num_layers):
            s_h = self.hidden_scale(layer)
            for d in range(self.directions):
                u = self.unit(layer, d, scale, s_h)
                for w, b, s, s_in, bits in (
                    (u.w_ih, u.b_ih, u.s_ih, scale, self.input_bits(layer)), (u.w_hh, u.b_hh, u.s_hh, s_h, self.hidden_bits)
                ):  # fmt: skip
                    peak = w.double().abs().sum(1) * s * reach(bits)
                    peaks.append((peak if b is None else peak + b.double().abs() * (s * s_in)).amax())
            scale = s_h
        return max(float(p) for p in peaks)

    def input_bits(self, layer: int) -> int:
        return self.hidden_bits if layer else self.data_bits

    # --- parameters

    def unit(self, layer: int, direction: int, s_x: Tensor, s_h: Tensor) -> Unit:
        """The parameters of a direction on their grids, for an input of scale ``s_x`` and a hidden state of ``s_h``."""
        suffix = f"_l{layer}" + ("_reverse" if direction else "")
        w_ih, b_ih, s_ih = self._pair("ih", suffix, s_x, self.input_bits(layer))
        w_hh, b_hh, s_hh = self._pair("hh", suffix, s_h, self.hidden_bits)
        w_hr = s_hr = None
        if self.proj_size:
            given = bound_parameter(getattr(self, f"weight_hr{suffix}").float(), self.normalize_weight)
            s_hr = scale_from_weight(given, self.parameter_bits)
            w_hr = fake_quant(given, s_hr, self.parameter_bits)
        return Unit(w_ih=w_ih, w_hh=w_hh, b_ih=b_ih, b_hh=b_hh, w_hr=w_hr, s_ih=s_ih, s_hh=s_hh, s_hr=s_hr)

    def _pair(self, name: str, suffix: str, scale: Tensor, bits: int) -> tuple[Tensor, Tensor | None, Tensor]:
        weight = bound_parameter(getattr(self, f"weight_{name}{suffix}").float(), self.normalize_weight)
        bias = None
        if self.bias:
            bias = bound_parameter(getattr(self, f"bias_{name}{suffix}").float(), self.normalize_bias)
        limit = bias_limit(weight.shape[1], bits, self.parameter_bits)
        return on_grids(weight, bias, scale, self.parameter_bits, limit)

    def is_wide(self) -> bool:
        """Whether the products of the hidden state need float64."""
        terms = max(self.out_size, self.hidden_size if self.proj_size else 0)
        return is_wide(terms, self.hidden_bits, self.parameter_bits)

    # --- forward

    def run_layers(self, batch: Batch, h0: Tensor | None, c0: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Output rows of the last layer, and the last h and c of every layer and direction (layers * directions, N, size)."""
        hs: list[Tensor] = []
        cs: list[Tensor] = []
        for layer in range(self.num_layers):
            at = slice(layer * self.directions, (layer + 1) * self.directions)
            first = self.first_states(batch, None if h0 is None else h0[at], None if c0 is None else c0[at])
            s_h = self.learned_scale(layer, batch, first, h0 is not None)
            out, h, c = self.run_layer(layer, batch, first, s_h)
            hs += h
            cs += c
            batch = Batch(x=out, scale=s_h, bits=self.hidden_bits, sizes=batch.sizes)
            if layer < self.num_layers - 1 and self.training and self.dropout:
                batch = self.dropped(batch)
        return out, torch.stack(hs), torch.stack(cs)

    def first_states(self, batch: Batch, h0: Tensor | None, c0: Tensor | None) -> tuple[Tensor, Tensor]:
        """States of every direction (directions, N, size), zeros where none are given."""
        n = int(batch.sizes[0]) if not torch.compiler.is_compiling() else batch.sizes[0].item()
        shape = (self.directions, n)
        h = batch.x.new_zeros(*shape, self.out_size) if h0 is None else h0.float()
        c = batch.x.new_zeros(*shape, self.hidden_size) if c0 is None else c0.float()
        return h, c

    def learned_scale(self, layer: int, batch: Batch, first: tuple[Tensor, Tensor], given: bool) -> Tensor:
        """The grid of a layer's hidden state. In training it follows what the layer gives on real values."""
        name = self.hidden(layer)
        if not self.training:
            self.require_range(name)
            return self.scale(name, self.hidden_bits)
        with torch.no_grad():
            one = torch.ones_like(batch.scale)
            units = [self.unit(layer, d, batch.scale, one) for d in range(self.directions)]
            parameters = [p for u in units for p in (u.w_ih, u.w_hh, u.b_ih, u.b_hh, u.w_hr) if p is not None]
            out = ideal(self.kind, batch.x, parameters, *first, batch.sizes, self.bias, self.bidirectional, self.relu)
            peak = observe.peak(out, bound=self.normalize_data)
            if given:
                peak = torch.maximum(peak, observe.peak(first[0]))
            self.follow(name, peak)
        return self.scale(name, self.hidden_bits)

    def run_layer(
        self, layer: int, batch: Batch, first: tuple[Tensor, Tensor], s_h: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Output rows, and the last states of every direction."""
        h0 = fake_quant(first[0], s_h, self.hidden_bits)
        c0 = first[1]
        if self.kind == "lstm":
            s_c = torch.full_like(s_h, 2.0**self.how.fraction)
            c0 = fake_quant(c0, s_c, 16 if self.how.narrow else WIDEST)
        made = []
        for d in range(self.directions):
            u = self.unit(layer, d, batch.scale, s_h)
            acc = self.input_product(batch, u)
            w, b = self.ordered(u.w_hh), None if u.b_hh is None else self.ordered(u.b_hh)
            made.append(
                recurrent(
                    self.kind, acc, w, b, u.w_hr, h0[d], c0[d], s_h, batch.sizes, d == 1, self.chip, self.hidden_bits,
                    self.is_wide(), self.relu,
                )
            )  # fmt: skip
        out = made[0][0] if len(made) == 1 else torch.cat([m[0] for m in made], 1)
        return out, [m[1] for m in made], [m[2] for m in made]

    def input_product(self, batch: Batch, u: Unit) -> Tensor:
        """W_ih x + b_ih of all rows, exact; never beyond 32 bits."""
        w, b, terms = self.ordered(u.w_ih), None if u.b_ih is None else self.ordered(u.b_ih), u.w_ih.shape[1]
        if not is_wide(terms, batch.bits, self.parameter_bits):
            return F.linear(batch.x, w, b)
        acc = F.linear(batch.x.double(), w.double(), None if b is None else b.double())
        if products(terms, batch.bits, self.parameter_bits) < 2**30:
            return acc
        lsb = (batch.scale * u.s_ih).double()
        return torch.minimum(torch.maximum(acc, -(2.0**31) / lsb), (2.0**31 - 1) / lsb)

    def ordered(self, parameter: Tensor) -> Tensor:
        """The gates of a parameter in the order of ``_recurrent_step``."""
        return parameter

    def dropped(self, batch: Batch) -> Batch:
        """Dropout between layers: a grid coarse enough for the survivors, which are 1 / (1 - p) as large."""
        factor = 1.0
        while factor * (1 - self.dropout) < 1 and factor < 2**16:
            factor *= 2
        scale = batch.scale / factor
        x = fake_quant(F.dropout(batch.x, self.dropout, True), scale, batch.bits)
        return Batch(x=x, scale=scale, bits=batch.bits, sizes=batch.sizes)

    # --- state dict

    def derived(self) -> dict[str, Tensor]:
        s_i, s_h = self.scale("i", self.data_bits), self.hidden_scale(0)
        found = {"scale_i": s_i}
        for layer in range(self.num_layers):
            found[f"scale_{self.hidden(layer)}"] = self.hidden_scale(layer)
        u = self.unit(0, 0, s_i, s_h)
        top = levels(self.parameter_bits)
        found |= {"scale_iw": u.s_ih, "scale_hw": u.s_hh, "running_iw": top / u.s_ih, "running_hw": top / u.s_hh}
        return found | {"scale_o": s_h, "running_o": self.running("h")}


class SequenceInt(RecurrentInt):
    """A layer over whole sequences: padded, without a batch axis, or packed."""

    def forward(self, input: Any, hx: Any = None) -> Any:  # noqa: A002
        if isinstance(input, PackedSequence):
            return self.forward_packed(input, hx)
        batched = input.dim() == 3
        axis = 0 if self.batch_first else 1
        x, s_x = self.enter(input, "i")
        x = x if batched else x.unsqueeze(axis)
        h0, c0 = self.states(hx, batched)
        steps = x.transpose(0, 1) if self.batch_first else x
        count, n = steps.shape[:2]
        sizes = torch.full((count,), n, dtype=torch.int64)
        rows = Batch(x=steps.reshape(count * n, -1), scale=s_x, bits=self.data_bits, sizes=sizes)
        out, h, c = self.run_layers(rows, h0, c0)
        out = out.view(count, n, -1)
        out = out.transpose(0, 1) if self.batch_first else out
        if not batched:
            out, h, c = out.squeeze(axis), h.squeeze(1), c.squeeze(1)
        return self.tagged(out), self.tagged_states(h, c)

    def forward_packed(self, packed: PackedSequence, hx: Any) -> Any:
        data, sizes, order, back = packed
        x, s_x = self.enter(data, "i")
        h0, c0 = self.states(hx, True)
        h0, c0 = (None if s is None or order is None else s.index_select(1, order) for s in (h0, c0))
        out, h, c = self.run_layers(Batch(x=x, scale=s_x, bits=self.data_bits, sizes=sizes), h0, c0)
        if back is not None:
            h, c = h.index_select(1, back), c.index_select(1, back) if self.kind == "lstm" else c
        return PackedSequence(self.tagged(out), sizes, order, back), self.tagged_states(h, c)

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        return sequence(self, operands, call.get("packed_first"))

    def states(self, hx: Any, batched: bool) -> tuple[Tensor | None, Tensor | None]:
        """h and c that were given (layers * directions, N, size)."""
        given: Sequence[Tensor] = () if hx is None else hx if self.kind == "lstm" else (hx,)
        h, c = (*given, None, None)[:2]
        if not batched:
            h, c = (None if s is None else s.unsqueeze(1) for s in (h, c))
        return h, c

    def tagged(self, out: Tensor) -> Tensor:
        return set_grid(out, Grid(self.hidden_scale(self.num_layers - 1), self.hidden_bits))

    def tagged_states(self, h: Tensor, c: Tensor) -> Any:
        """States as the layer returns them; those of several layers are on several grids, so that they are plain."""
        if self.num_layers == 1:
            h = set_grid(h, Grid(self.hidden_scale(0), self.hidden_bits))
        if self.kind != "lstm":
            return h
        return h, set_grid(c, Grid(torch.full_like(self.running("h"), 2.0**self.how.fraction), 32))
