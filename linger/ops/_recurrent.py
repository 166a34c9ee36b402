"""What the fixed-point twins of recurrent layers share: grids, layers, directions, states, packed sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from linger import observe
from linger.numerics import (
    FLOAT32_EXACT,
    WIDEST,
    Grid,
    bound_parameter,
    fake_quant,
    levels,
    reach,
    scale_from_weight,
)  # fmt: skip
from linger.ops._base import IntModule
from linger.ops._cells import Arithmetic, arithmetic
from linger.ops._recurrent_ops import ideal
from linger.ops._recurrent_ops import layer as recurrent_layer
from linger.ops._state import Derived
from linger.ops._symbolic import tracing
from linger.ops._weighted import NARROW_BIAS, WIDE_BIAS, on_grids

HIDDEN_BITS = (8, 16)
Placed = tuple[Tensor, Tensor | None, Tensor]


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
    """A batch of sequences as rows (``_recurrent_rows``). ``scale``, ``bits``: of x; ``sizes``: sequences per step, on the CPU;
    ``count``: of the first.
    """

    x: Tensor
    scale: Tensor
    bits: int
    sizes: Tensor
    count: int


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


DEEPEST = 32  # layers whose scales are attributes too; deeper ones are in the state dict alone


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
    running_o = Derived()
    vars().update({f"scale_h_l{layer}": Derived() for layer in range(1, DEEPEST)})

    def start(self, *, hidden_bits: int | None = None, device: torch.device | None = None, **settings: Any) -> None:
        """``hidden_bits``: width of the hidden state and the output, 8 or 16; None for that of the output."""
        super().start(device=device, **settings)
        self.hidden_bits = min(self.out_bits, 16) if hidden_bits is None else hidden_bits
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

    def suffix(self, layer: int, direction: int) -> str:
        """Behind the names of a direction's parameters."""
        return f"_l{layer}" + ("_reverse" if direction else "")

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

    def of_input(self, layer: int, direction: int, s_x: Tensor) -> Placed:
        """Weight and bias of an input of scale ``s_x`` on their grids, and the weight's scale."""
        return self._pair("ih", self.suffix(layer, direction), s_x, self.input_bits(layer))

    def unit(self, layer: int, direction: int, s_x: Tensor, s_h: Tensor, of_input: Placed | None = None) -> Unit:
        """The parameters of a direction on their grids, for an input of scale ``s_x`` and a hidden state of ``s_h``.

        ``of_input``: what that of the same name gave for this input.
        """
        suffix = self.suffix(layer, direction)
        w_ih, b_ih, s_ih = of_input or self.of_input(layer, direction, s_x)
        w_hh, b_hh, s_hh = self._pair("hh", suffix, s_h, self.hidden_bits)
        w_hr = s_hr = None
        if self.proj_size:
            given = bound_parameter(getattr(self, f"weight_hr{suffix}").float(), self.normalize_weight)
            s_hr = scale_from_weight(given, self.parameter_bits)
            w_hr = fake_quant(given, s_hr, self.parameter_bits)
        return Unit(w_ih=w_ih, w_hh=w_hh, b_ih=b_ih, b_hh=b_hh, w_hr=w_hr, s_ih=s_ih, s_hh=s_hh, s_hr=s_hr)

    def _pair(self, name: str, suffix: str, scale: Tensor, bits: int) -> Placed:
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

    def _in_float32(self, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            tracing()  # where torch.onnx.export tries again what was refused, it must not get through
        return super()._in_float32(args, kwargs)

    def run_layers(self, batch: Batch, h0: Tensor | None, c0: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Output rows of the last layer, and the last h and c of every layer and direction (layers * directions, N, size)."""
        hs: list[Tensor] = []
        cs: list[Tensor] = []
        for layer in range(self.num_layers):
            at = slice(layer * self.directions, (layer + 1) * self.directions)
            first = self.first_states(batch, None if h0 is None else h0[at], None if c0 is None else c0[at])
            of_input = [self.of_input(layer, d, batch.scale) for d in range(self.directions)]
            s_h = self.learned_scale(layer, batch, first, h0 is not None, of_input)
            out, h, c = self.run_layer(layer, batch, first, s_h, of_input)
            hs += h
            cs += c
            batch = replace(batch, x=out, scale=s_h, bits=self.hidden_bits)
            if layer < self.num_layers - 1 and self.training and self.dropout:
                batch = self.dropped(batch)
        return out, torch.stack(hs), torch.stack(cs)

    def first_states(self, batch: Batch, h0: Tensor | None, c0: Tensor | None) -> tuple[Tensor, Tensor]:
        """States of every direction (directions, N, size), zeros where none are given."""
        h = batch.x.new_zeros(self.directions, batch.count, self.out_size) if h0 is None else h0.float()
        c = batch.x.new_zeros(self.directions, batch.count, self.hidden_size) if c0 is None else c0.float()
        return h, c

    def learned_scale(
        self, layer: int, batch: Batch, first: tuple[Tensor, Tensor], given_states: bool, of_input: list[Placed]
    ) -> Tensor:
        """The grid of a layer's hidden state. In training it follows what the layer gives on real values."""
        name = self.hidden(layer)
        if not self.training:
            self.require_range(name)
            return self.scale(name, self.hidden_bits)
        with torch.no_grad():
            one = torch.ones_like(batch.scale)
            units = [self.unit(layer, d, batch.scale, one, given) for d, given in enumerate(of_input)]
            parameters = [p for u in units for p in (u.w_ih, u.w_hh, u.b_ih, u.b_hh, u.w_hr) if p is not None]
            out = ideal(self.kind, batch.x, parameters, *first, batch.sizes, self.bias, self.bidirectional, self.relu)
            peak = observe.peak(out, bound=self.normalize_data)
            if given_states:
                peak = torch.maximum(peak, observe.peak(first[0]))
            self.follow(name, peak)
        return self.scale(name, self.hidden_bits)

    def run_layer(
        self, layer: int, batch: Batch, first: tuple[Tensor, Tensor], s_h: Tensor, of_input: list[Placed]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Output rows, and the last states of every direction."""
        h0 = fake_quant(first[0], s_h, self.hidden_bits)
        c0 = first[1]
        if self.kind == "lstm":
            s_c = torch.full_like(s_h, 2.0**self.how.fraction)
            c0 = fake_quant(c0, s_c, 16 if self.how.narrow else WIDEST)
        made = []
        for d, given in enumerate(of_input):
            u = self.unit(layer, d, batch.scale, s_h, given)
            acc = self.input_product(batch, u)
            w, b = self.ordered(u.w_hh), None if u.b_hh is None else self.ordered(u.b_hh)
            made.append(
                recurrent_layer(
                    self.kind, acc, w, b, u.w_hr, h0[d], c0[d], s_h, u.s_hh, batch.sizes, d == 1, self.chip,
                    self.hidden_bits, self.is_wide(), self.relu, torch.is_grad_enabled(),
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
        return replace(batch, x=x, scale=scale)

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

    # --- results

    def grid(self, layer: int) -> Grid:
        """Of a layer's hidden state."""
        return Grid(self.hidden_scale(layer), self.hidden_bits)

    def cell_grid(self) -> Grid:
        """The chip's grid of a cell state."""
        return Grid(torch.full_like(self.running("h"), 2.0**self.how.fraction), 32)
