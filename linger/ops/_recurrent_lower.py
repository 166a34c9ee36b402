"""What a recurrent layer writes into a file: one node per direction of a layer, joined by iqCat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from linger.numerics import quantize
from linger.ops._lowered import Lowered, Operand
from linger.ops._recurrent_body import Form
from linger.ops._recurrent_run import ANY_LENGTH
from linger.targets import known

if TYPE_CHECKING:
    from linger.ops._recurrent import RecurrentInt

Ref = int | str


@dataclass(kw_only=True)
class Plan:
    """The nodes so far; ``add`` returns the reference of the new one's first output."""

    steps: list[Lowered] = field(default_factory=list)

    def add(self, step: Lowered) -> str:
        self.steps.append(step)
        return f"%{len(self.steps) - 1}"

    def cut(self, source: Ref, k: int) -> str:
        """source[k : k + 1] of floats."""
        params = {name: np.array([v], np.int64) for name, v in ((f"from_{k}", k), (f"to_{k}", k + 1), ("axis_0", 0))}
        return self.add(Lowered(op_type="Slice", inputs=(source, *params), attrs={}, params=params, bits=0, domain=""))

    def ordered(self, source: Ref, order: int | None, bits: int) -> Ref:
        """The sequences of a state (layers, N, H) in another order."""
        if order is None:
            return source
        return self.add(Lowered(op_type="Gather", inputs=(source, order), attrs={"axis": 1}, bits=bits, domain=""))

    def squeezed(self, source: Ref, axes: tuple[int, ...], bits: int, op_type: str = "Squeeze") -> str:
        """Without axes of size 1, or with new ones."""
        return self.add(Lowered(op_type=op_type, inputs=(source,), attrs={"axes": axes}, bits=bits))

    def joined(self, sources: list[str], axis: int, scale: float, bits: int) -> str:
        """Tensors of one grid behind each other."""
        if len(sources) == 1:
            return sources[0]
        attrs: dict[str, Any] = {f"scale_x_{i}": scale for i in range(len(sources))}
        attrs |= {"scale_o": scale, "dim": axis, "axis": axis, "o_bits": bits}
        form = f"n{len(sources)}" + ("" if bits == 8 else f"_o{bits}")
        return self.add(Lowered(op_type="iqCat", inputs=tuple(sources), attrs=attrs, bits=bits, form=form))

    def plain(self, sources: list[str], scales: list[float], bits: int) -> str:
        """Tensors of several grids as floats behind each other."""
        made = []
        for source, scale in zip(sources, scales, strict=True):
            attrs = {"scale_o": scale, "data_bits": bits}
            made.append(self.add(Lowered(op_type="Dequant", inputs=(source,), attrs=attrs, bits=0)))
        return self.add(Lowered(op_type="Concat", inputs=tuple(made), attrs={"axis": 0}, bits=0, domain=""))


@dataclass(frozen=True, kw_only=True)
class Given:
    """The operands of a layer's call: where x, the lengths and the states are, and how x lies."""

    x: Ref
    lengths: Ref | None
    states: tuple[Ref, ...]
    time_axis: int


def layers(
    m: RecurrentInt, plan: Plan, given: Given, s_x: float, full: Mapping[str, np.ndarray]
) -> tuple[str, list[str], list[str]]:
    """The nodes of all layers: y, and the last h and c of every layer and direction.

    ``full``: lengths to store where states are given without (a file with states has lengths).
    """
    scale, bits, x = s_x, m.data_bits, given.x
    hs: list[str] = []
    cs: list[str] = []
    for layer in range(m.num_layers):
        s_h = float(m.hidden_scale(layer))
        ys = []
        for d in range(m.directions):
            k = layer * m.directions + d
            states = tuple(plan.cut(s, k) if m.num_layers * m.directions > 1 else s for s in given.states)
            one = Given(x=x, lengths=given.lengths, states=states, time_axis=given.time_axis)
            ys.append(plan.add(unit_node(m, layer, d, one, scale, s_h, bits, full)))
            hs.append(f"{ys[-1]}.1")
            cs.append(f"{ys[-1]}.2")
        x = plan.joined(ys, 2, s_h, m.hidden_bits)
        scale, bits = s_h, m.hidden_bits
    return str(x), hs, cs


@torch.no_grad()
def unit_node(
    m: RecurrentInt, layer: int, direction: int, given: Given, s_x: float, s_h: float, bits: int,
    full: Mapping[str, np.ndarray],
) -> Lowered:  # fmt: skip
    """The node of one direction of one layer."""
    at = m.running("h")
    x_scale, h_scale = at.new_full((), s_x), at.new_full((), s_h)
    u = m.unit(layer, direction, x_scale, h_scale)
    suffix = m.suffix(layer, direction)
    params = {f"weight_ih{suffix}": quantize(u.w_ih, u.s_ih, m.parameter_bits)}
    params[f"weight_hh{suffix}"] = quantize(u.w_hh, u.s_hh, m.parameter_bits)
    params[f"bias_ih{suffix}"] = _bias(u.b_ih, x_scale * u.s_ih, len(u.w_ih))
    params[f"bias_hh{suffix}"] = _bias(u.b_hh, h_scale * u.s_hh, len(u.w_hh))
    if u.w_hr is not None and u.s_hr is not None:
        params[f"weight_hr{suffix}"] = quantize(u.w_hr, u.s_hr, m.parameter_bits)
    lengths: tuple[Ref, ...] = () if given.lengths is None else (given.lengths,)
    if given.states and not lengths:
        lengths, params = tuple(full), params | dict(full)
    stored = tuple(name for name in params if name not in full)
    words = {
        "batch_first": given.time_axis == 1, "reverse": direction == 1, "lengths": bool(lengths), "states": bool(given.states),
        "projected": u.w_hr is not None, "relu": m.relu,
    }  # fmt: skip
    form = Form(kind=m.kind, platform=m.chip, bits=m.hidden_bits, words=frozenset(w for w, on in words.items() if on))
    attrs = {
        **_attributes(m, layer, s_h), "batch_first": int((given.time_axis == 1) != known(m.chip).time_swapped),
        "go_forward": 1 - direction, "data_bits": bits, "scale_i": s_x, "scale_iw": float(u.s_ih), "scale_hw": float(u.s_hh),
    }  # fmt: skip
    if u.s_hr is not None:
        attrs |= {"scale_rw": float(u.s_hr), "proj_size": m.proj_size}
    op_type = m.op_type + ("_Is8_Is64" if lengths and m.kind == "gru" else "")
    op_type += "_If32" if given.states and m.kind == "gru" else ""
    return Lowered(
        op_type=op_type, inputs=(given.x, *lengths, *given.states, *stored), attrs=attrs, params=params, bits=m.hidden_bits,
        form=form.text, more=(m.hidden_bits, 32) if m.kind == "lstm" else (m.hidden_bits,),
    )  # fmt: skip


def _attributes(m: RecurrentInt, layer: int, s_h: float) -> dict[str, Any]:
    inner = m.out_size * m.directions
    attrs: dict[str, Any] = {
        "input_size": inner if layer else m.input_size, "hidden_size": m.hidden_size, "num_layers": 1, "dropout": 0.0,
        "parameter_bits": m.parameter_bits, "o_bits": m.hidden_bits, "scale_h": s_h, "scale_o": s_h,
    }  # fmt: skip
    if m.kind == "gru":
        attrs["state_shift"] = int(np.log2(s_h)) - m.how.fraction
    if m.kind == "rnn":
        attrs["nonlinearity"] = "relu" if m.relu else "tanh"
    return attrs


def _bias(bias: Tensor | None, scale: Tensor, count: int) -> np.ndarray:
    return np.zeros(count, np.int32) if bias is None else quantize(bias, scale, 32)


def full_lengths(x: Operand, time_axis: int) -> dict[str, np.ndarray]:
    """Lengths of a batch that is all there: [T] * N, one for all where a size is dynamic."""
    if x.dynamic:
        return {"lengths": np.array([ANY_LENGTH], np.int64)}
    return {"lengths": np.full(x.shape[1 - time_axis], x.shape[time_axis], np.int64)}


def sequence(m: Any, operands: tuple[Operand, ...], packed_first: bool | None) -> tuple[Lowered, ...]:
    """The nodes of a call of a layer over sequences.

    Args:
        m: the layer.
        operands: x, then for a packed sequence lengths and the two orders (where it has them), then the states.
        packed_first: whether a packed x lies batch first in the file; None where it is not packed.
    """
    packed = packed_first is not None
    orders = packed and len(operands) > 2 and not operands[2].dtype.is_floating_point
    start = 1 + packed + 2 * orders
    states: tuple[Ref, ...] = tuple(range(start, len(operands)))
    batched = packed or len(operands[0].shape) == 3
    axis = int(packed_first if packed_first is not None else m.batch_first)
    plan = Plan()
    x: Ref = 0
    if not batched:
        x = plan.squeezed(0, (1 - axis,), operands[0].bits, "Unsqueeze")
        states = tuple(plan.squeezed(s, (1,), 0, "Unsqueeze") for s in states)
    states = tuple(plan.ordered(s, 2 if orders else None, 0) for s in states)
    given = Given(x=x, lengths=1 if packed else None, states=states, time_axis=axis)
    full = full_lengths(operands[0], axis) if batched and not packed else {"lengths": np.array([ANY_LENGTH], np.int64)}
    y, hs, cs = layers(m, plan, given, operands[0].scale, full)
    results: list[Ref] = [y, *range(1, start)]
    if not batched:
        results[0] = plan.squeezed(y, (1 - axis,), m.hidden_bits)
    for state in last_states(m, plan, hs, cs):
        bits = 32 if state[1] else m.hidden_bits if m.num_layers == 1 else 0
        ref = plan.ordered(state[0], 3 if orders else None, bits)
        results.append(ref if batched else plan.squeezed(ref, (1,), bits))
    return with_results(plan, tuple(results))


def single(m: RecurrentInt, operands: tuple[Operand, ...]) -> tuple[Lowered, ...]:
    """The nodes of a cell: a layer of one step, which lies where the chip looks for it.

    Args:
        m: the cell.
        operands: x (N, D) or (D,), and the states.
    """
    plan, axis = Plan(), int(known(m.chip).time_swapped)
    batched = len(operands[0].shape) == 2
    x = plan.squeezed(0, (axis,) if batched else (0, 1), operands[0].bits, "Unsqueeze")
    front = (0,) if batched else (0, 1)
    states = tuple(plan.squeezed(s, front, 0, "Unsqueeze") for s in range(1, len(operands)))
    given = Given(x=x, lengths=None, states=states, time_axis=axis)
    count = 1 if operands[0].dynamic or not batched else operands[0].shape[0]
    _, hs, cs = layers(m, plan, given, operands[0].scale, {"lengths": np.ones(count, np.int64)})
    found = last_states(m, plan, hs, cs)
    return with_results(plan, tuple(plan.squeezed(ref, front, 32 if cell else m.hidden_bits) for ref, cell in found))


def last_states(m: RecurrentInt, plan: Plan, hs: list[str], cs: list[str]) -> list[tuple[str, bool]]:
    """References of the last h and c of all layers, and whether it is c."""
    if m.num_layers == 1:
        found = [(plan.joined(hs, 0, float(m.hidden_scale(0)), m.hidden_bits), False)]
    else:
        scales = [float(m.hidden_scale(i)) for i in range(m.num_layers) for _ in range(m.directions)]
        found = [(plan.plain(hs, scales, m.hidden_bits), False)]
    if m.kind == "lstm":
        found.append((plan.joined(cs, 0, 2.0**m.how.fraction, 32), True))
    return found


def with_results(plan: Plan, results: tuple[Ref, ...]) -> tuple[Lowered, ...]:
    """The nodes, the last of which knows what the module returns."""
    return (*plan.steps[:-1], replace(plan.steps[-1], results=results))
