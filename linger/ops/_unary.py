"""Functions of one tensor as tables over the levels of its grid: y = table[q].

A function is given as f = line + rest, both float64: ``line`` is exact (piecewise linear with exact coefficients, most
often 0), ``rest`` has a small relative error. So the rounding of f(v) * s_o is right also where f approaches a line.

    table[k] = sat( n + floor(r + rest * s_o) ),  line * s_o + 1/2 = n + r,  0 <= r < 1                (1)
    chip's own function (``Pwl``): table[k] = sat( rsh(f(z(k)), y_fraction - log2 s_o) )               (2)

for the levels k / s_x, k = -2^(b-1) .. 2^(b-1) - 1. An input of 8 bits has 256 of them, one of 16 bits 65,536; a wider
one is narrowed to 16 bits first. An infinite f saturates; outside its domain f is what it is at the domain's edge, with
the slope 0, so that no table holds a NaN. The table is computed on the device from the scales, without looking at
values, so the cost over a full-size activation is one lookup. The file carries the table inside the function body.
The gradient is the float function's at the fake-quantized input. It is zero where the argument of the chip's own function
saturates and, where the output grid follows the observed range, where the output does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from linger import observe
from linger.errors import LingerError
from linger.numerics import Grid, exponent, grid_of, levels, saturate, set_grid, shift_round
from linger.ops._base import ONNX_INT, Op, real_text
from linger.ops._case import Case
from linger.ops._lowered import Lowered, Operand, requant_node
from linger.ops._pwl import argument, evaluate, torch_values
from linger.ops._site import Site
from linger.rounding import HALF_UP, ROUNDINGS
from linger.steps import piecewise
from linger.targets import Pwl, known

WIDEST_TABLE = 16  # bits of the input
TINY = 1e-200  # the least magnitude of a rest that never is 0, where its own formula underflows


@dataclass(frozen=True, kw_only=True)
class Function:
    """f in two independent texts. The callables take v (float64, any shape) and the call's ``numbers`` by name.

    ``line``, ``rest``, ``slope``: PyTorch; the slope is finite, and at a kink that of PyTorch. ``numpy``: (line, rest).
    ``real``: ONNX statements on floats, ``X`` to ``Y``, with ``@name`` for a number. ``numbers``: arguments and defaults,
    ``nonzero`` those that must not be 0. ``fixed``: the output scale is 2^(bits - fixed), for a range known beforehand;
    0 where it is observed. ``pole``: |f| between two levels may exceed both.
    """

    op_type: str
    rest: Callable[..., Tensor]
    slope: Callable[..., Tensor]
    numpy: Callable[..., tuple[Any, np.ndarray]]
    real: str
    line: Callable[..., Tensor] | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    nonzero: tuple[str, ...] = ()
    fixed: int = 0
    pole: bool = False

    def said(self, call: Mapping[Any, Any]) -> dict[str, float]:
        """The call's numbers, as the file stores them: float32.

        Raises:
            LingerError: one is NaN, infinite, or 0 where it must not be.
        """
        found = {k: float(np.float32(v if call.get(k) is None else call[k])) for k, v in self.numbers.items()}
        for name, value in found.items():
            if not math.isfinite(value) or (name in self.nonzero and not value):
                allowed = "finite numbers other than 0" if name in self.nonzero else "finite numbers"
                raise LingerError(f"{name} is {call[name]}, allowed are {allowed}; give one of them")
        return found


class _Lookup(torch.autograd.Function):
    """values[q] with the gradient slopes[q]; the tables start at level 0, the negative levels follow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, values: Tensor, slopes: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, slopes)
        found = values.index_select(0, positions(q)).view(q.shape)
        if slopes is None:  # a NaN has no level; in training its range refuses it
            found.add_(x - x)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        q, slopes = ctx.saved_tensors
        return slopes.index_select(0, positions(q)).view(q.shape).mul_(grads[0]), None, None, None


def levels_from_zero(bits: int, device: torch.device) -> Tensor:
    """The levels of ``bits`` bits as float64 in the order of ``positions``: 0, 1, ..., -2, -1.

    Not by a cast that wraps around: inductor's loops do not wrap.
    """
    k = torch.arange(2**bits, dtype=torch.float64, device=device)
    return torch.where(k < 2 ** (bits - 1), k, k - 2**bits)


def positions(q: Tensor) -> Tensor:
    """Levels (int8 or int16) as positions in a table that starts at level 0."""
    if q.dtype == torch.int8:
        return q.view(torch.uint8).flatten().long()
    return q.flatten().long().bitwise_and_(0xFFFF)


class UnarySite(Site):
    """One call of a function of one tensor, ``class SinSite(UnarySite, sin)``.

    ``functions`` has one, or several by the value of the call's argument ``by``.
    """

    functions: ClassVar[Mapping[Any, Function]]
    by: ClassVar[str] = ""

    def __init_subclass__(cls, function: Function | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if function is not None:
            cls.functions = {"": function}
        cls.observed = () if all(f.fixed for f in cls.functions.values()) else ("o",)

    @classmethod
    def takes(cls, x: Any = None, *args: Any, **call: Any) -> bool:
        chosen = call.get(cls.by, next(iter(cls.functions)))
        return isinstance(x, Tensor) and isinstance(chosen, (int, float, str)) and chosen in cls.functions

    @classmethod
    def meant(cls, call: Mapping[Any, Any]) -> tuple[Function, dict[str, float]]:
        """The function that a call means, and its numbers."""
        function = cls.functions[call.get(cls.by, next(iter(cls.functions)))]
        return function, function.said(call)

    def pwl(self, function: Function) -> Pwl | None:
        """The chip's own function, None where it has none."""
        return known(self.chip).functions.get(function.op_type)

    def operand_bits(self, bits: Sequence[int]) -> int:
        return min(super().operand_bits(bits), WIDEST_TABLE)

    def forward(self, x: Tensor, **call: Any) -> Tensor:
        function, said = self.meant(call)
        bits = self.out_bits = self.operand_bits([g.bits for g in [grid_of(x)] if g is not None])
        x, scale = self.operand(x, "x", bits)
        with torch.no_grad():
            q = (x * scale).to(torch.int8 if bits == 8 else torch.int16)
            k = levels_from_zero(bits, x.device)
            v = k / scale.double()
            line, rest = self.parts(function, said, k, v, scale)
            s_o = self.output_scale(function, q, k, rest if line is None else line + rest, bits)
            integers, inside = _rounded(line, rest, s_o, bits, self.rounding)
            slopes = self.slopes(function, said, v, inside) if x.requires_grad else None
        y = _Lookup.apply(x, q, (integers / s_o).float(), slopes)
        return set_grid(y, Grid(s_o.float(), bits))

    def parts(
        self, function: Function, said: Mapping[str, float], k: Tensor, v: Tensor, scale: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """f at every level as line (None for 0) and rest; the chip's own function is all rest, and exact."""
        table = self.pwl(function)
        if table is not None:
            return None, torch_values(k, scale, table) / 2.0**table.y_fraction
        return None if function.line is None else function.line(v, **said), function.rest(v, **said)

    def slopes(self, function: Function, said: Mapping[str, float], v: Tensor, inside: Tensor) -> Tensor:
        """f' at every level, 0 where the result or the argument of the chip's own function saturates."""
        slopes, table = function.slope(v, **said), self.pwl(function)
        if table is not None:
            slopes = slopes * (v.abs() < 2.0 ** (table.width - 1 - table.x_fraction))
        return (slopes if function.fixed else slopes * inside).float()

    def output_scale(self, function: Function, q: Tensor, k: Tensor, exact: Tensor, bits: int) -> Tensor:
        """The result's scale: fixed, or from the running maximum of |f|."""
        if function.fixed:
            return exact.new_full((), 2.0 ** (bits - function.fixed))
        if self.training:
            size = torch.nan_to_num(exact, posinf=0, neginf=0).float()
            if observe.watcher() is not None:
                self.watch("o", size.index_select(0, positions(q)))
            self.follow("o", observe.peak(_reached(function, q, k, size)))
        else:
            self.require_range("o")
        return self.scale("o", bits).double()

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        function, said = self.meant(call)
        given, table = operands[0], self.pwl(function)
        x = given if table is None else as_argument(given, table)
        attrs = {"scale_x": x.scale, "scale_o": out.scale, "data_bits": x.bits, "o_bits": out.bits, **said}
        form = table_form(known(self.chip).platform, x, out, said)
        source: int | str = 0 if x == given else "%0"
        node = Lowered(op_type=function.op_type, inputs=(source,), attrs=attrs, bits=out.bits, form=form)
        return (node,) if x == given else (requant_node(given, x), node)


def _rounded(line: Tensor | None, rest: Tensor, s_o: Tensor, bits: int, rounding: str) -> tuple[Tensor, Tensor]:
    """Equation (1), and whether the result is within range."""
    if line is None:
        t = rest * s_o + 0.5
        n = torch.floor(t)
        v, tie = n, n == t
    else:
        t = line * s_o + 0.5
        n = torch.floor(t)
        part = t - n + rest * s_o
        whole = torch.floor(part)
        v, tie = n + whole, whole == part
    v = ROUNDINGS[rounding].settled(v, tie)
    y = v.clamp(-levels(bits) - 1, levels(bits))
    return y, y == v


def _reached(function: Function, q: Tensor, k: Tensor, size: Tensor) -> Tensor:
    """|f| of the levels from the lowest to the highest of ``q``, 0 for the others; with a pole, of those in ``q``."""
    if not q.numel():
        return size[:0]
    if function.pole:
        return size.index_select(0, positions(q))
    low, high = torch.aminmax(q)
    return torch.where((k >= low) & (k <= high), size, 0.0)


def as_argument(x: Operand, table: Pwl) -> Operand:
    """The operand that the chip's function reads: of 16 bits and at least ``x_fraction`` where its argument has 16 bits."""
    if table.width > WIDEST_TABLE:
        return x
    scale = max(x.scale * 2.0 ** (WIDEST_TABLE - x.bits), 2.0**table.x_fraction)
    return Operand(scale=scale, bits=WIDEST_TABLE, shape=x.shape)


def table_form(platform: str, x: Operand, out: Operand, said: Mapping[str, float]) -> str:
    """All that a table depends on: chip, scales, widths and the call's numbers."""
    numbers = "".join(f" {k}={float(v)!r}" for k, v in sorted(said.items()))
    return f"{platform} {exponent(x.scale)} {exponent(out.scale)} {x.bits} {out.bits}{numbers}"


def integer_table(
    function: Function, scale_x: float, scale_o: float, bits: int, o_bits: int, platform: str, said: Mapping[str, float],
    rounding: str = HALF_UP,
) -> np.ndarray:  # fmt: skip
    """Equation (1), or (2) where the chip has the function, for every level of ``bits`` bits, lowest first.

    A fixed output scale is what the function says, as on the chip; a file's ``scale_o`` does not change it.
    """
    scale_o = 2.0 ** (o_bits - function.fixed) if function.fixed else scale_o
    k = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    table = known(platform.lower()).functions.get(function.op_type)
    if table is not None:
        y = evaluate(argument(k, scale_x, table), table)
        return saturate(shift_round(y, table.y_fraction - exponent(scale_o), rounding), o_bits)
    with np.errstate(all="ignore"):
        line, rest = function.numpy(k / scale_x, **said)
        fraction, whole = np.modf(line * scale_o + 0.5)
        part = fraction + rest * scale_o
        v = whole + np.floor(part)
        return saturate(ROUNDINGS[rounding].settled(v, np.floor(part) == part), o_bits)


def runner(function: Function) -> Callable[..., np.ndarray]:
    """``run`` of a function."""

    def run(
        x: np.ndarray, *, scale_x: float, scale_o: float, platform: str = "venus", o_bits: int = 8,
        rounding: str = HALF_UP, **attrs: Any,
    ) -> np.ndarray:  # fmt: skip
        """x int8 or int16 of any shape -> the same shape in ``o_bits`` bits."""
        bits = 8 * x.dtype.itemsize
        said = {name: attrs[name] for name in function.numbers}
        table = integer_table(function, scale_x, scale_o, bits, o_bits, platform, said, rounding)
        return piecewise(lambda v: table[v.astype(np.int64) + 2 ** (bits - 1)])(x)

    return run


def table_body(function: Function) -> Callable[[str, int], tuple[str, str]]:
    """Body of a function: its table as a constant, and a Gather."""

    def body(form: str, opset: int, rounding: str = HALF_UP) -> tuple[str, str]:
        platform, q_x, q_o, bits, out_bits, *numbers = form.split(" ")
        said = {name: float(v) for name, _, v in (s.partition("=") for s in numbers)}
        table = integer_table(
            function, 2.0 ** int(q_x), 2.0 ** int(q_o), int(bits), int(out_bits), platform, said, rounding
        )
        return "X", gather_text("X", "Y", table, f"int{out_bits}")

    return body


def gather_text(source: str, result: str, table: np.ndarray, kind: str) -> str:
    """Statements for ``result`` = table[source], the table's first entry being that of the lowest integer."""
    text = f"{result}_t = Constant <value = {kind}[{len(table)}] {{{', '.join(map(str, table.tolist()))}}}> ()\n"
    text += f"{result}_h = Constant <value = int32 {{{len(table) // 2}}}> ()\n"
    text += f"{result}_i = Cast <to: int = {ONNX_INT[32]}> ({source})\n{result}_k = Add ({result}_i, {result}_h)\n"
    return text + f"{result} = Gather ({result}_t, {result}_k)\n"


def unary(
    site: type[UnarySite],
    calls: Sequence[Callable[..., Any]],
    modules: tuple[type[torch.nn.Module], ...] = (),
    aliases: tuple[str, ...] = (),
    tag: str = "",
) -> Op:
    """The row of a site and its only function. With a ``tag`` of its own, functions have rows elsewhere."""
    function = next(iter(site.functions.values()))
    names = (*([site.by] if site.by else []), *function.numbers, "inplace")
    row = nodes_only(function)
    return replace(
        row, name=tag or row.name, integer=site, site=tag or row.name.lower(), calls=tuple(calls),
        names=dict.fromkeys(calls, names), aliases=aliases, modules=modules,
    )  # fmt: skip


def nodes_only(function: Function) -> Op:
    """The row of a function that no call names alone."""
    return Op(name=function.op_type, run=runner(function), body=table_body(function), real=real_text(function.real))


def table_case(name: str, make: Callable[[], Callable[..., Any]], divisor: bool = False) -> Case:
    """A case of a function whose table is equation (1) on every chip; its widths differ in nothing but the table."""
    return Case(name=name, make=make, shapes=((2, 60),), bits=(8,), divisor=divisor)
