"""One of two values, element by element: torch.where, masked_fill, maximum, minimum.

    iqWhere        out = cond ? sat(rsh(x, log2(s_x/s_o))) : sat(rsh(y, log2(s_y/s_o)))                (1)
    iqMax, iqMin   out = the larger, the smaller of the two, each brought to the output grid as in (1) (2)

The output grid covers both operands and is never finer than either, so every shift is >= 0. A number is quantized on the
output grid itself. A fill of ``FAR`` or more stands for infinity: it widens the grid to ``REACH`` at most and becomes the
grid's own limit, so that a mask of -inf in front of a softmax costs the other values no precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from linger import observe
from linger.errors import LingerError
from linger.numerics import (
    WIDEST,
    Grid,
    exponent,
    fake_quant,
    grid_of,
    int_dtype,
    reach,
    saturate,
    set_grid,
    shift_round,
)
from linger.ops._base import Op, constants, output_bits, real_text, requant_text
from linger.ops._case import Case
from linger.ops._lowered import Lowered, Operand
from linger.ops._site import Site
from linger.rounding import HALF_UP
from linger.steps import piecewise

FAR = 1e4  # from here on a fill means "never"
REACH = 8.0  # e^-8 is below half a step of an 8-bit probability


def fill_peak(x: Tensor) -> Tensor:
    """How far a grid has to reach for the values of a plain tensor, shape []."""
    size = x.detach().abs().float()
    if size.numel() == 0:
        return size.new_zeros(())
    return torch.where(size >= FAR, torch.full_like(size, REACH), size).amax()


def check_number(value: float) -> None:
    """Raise for NaN."""
    if value != value:
        raise LingerError("found the fill nan, allowed are numbers and infinities; fill with 0 or -inf")


def filled(value: float, scale: Tensor, bits: int) -> Tensor:
    """A number on the grid ``scale``, at the grid's limit where it is beyond, as a 0-d float32."""
    v = scale.new_full((), value, dtype=torch.float64)
    q = torch.floor(v * scale.double() + 0.5).clamp(-reach(bits), reach(bits) - 1)
    return (q / scale.double()).float()


def filled_integer(value: float, scale: float, bits: int) -> np.ndarray:
    """The integer of ``filled`` as the file stores it."""
    q = np.clip(np.floor(np.float64(value) * scale + 0.5), -reach(bits), reach(bits) - 1)
    return np.array(q, int_dtype(bits))


class PickSite(Site):
    """Two operands, tensors or numbers, on one grid that covers both."""

    def entered(self, x: Any, name: str, bits: int) -> tuple[Tensor, Tensor]:
        """A tensor on a grid; one that comes without may hold infinities."""
        if grid_of(x) is not None:
            return self.operand(x, name, bits)
        if f"running_{name}" not in self._buffers:
            self.register_buffer(f"running_{name}", torch.zeros((), device=x.device))
        if self.training:
            with torch.no_grad():
                self.follow(name, observe.peak(fill_peak(x)))
        else:
            self.require_range(name)
        scale = self.scale(name, bits)
        return fake_quant(x.float(), scale, min(bits, WIDEST), rounding=self.rounding), scale

    def common(self, *given: Any) -> tuple[list[Tensor], Grid]:
        """The operands on the grid of the result, and that grid."""
        self.out_bits = bits = self.width(*given)
        entered = {i: self.entered(v, "xy"[i], bits) for i, v in enumerate(given) if isinstance(v, Tensor)}
        numbers = {i: float(v) for i, v in enumerate(given) if i not in entered}
        for value in numbers.values():
            check_number(value)
        if self.training:
            with torch.no_grad():
                peaks = [observe.peak(x) for x, _ in entered.values()]
                peaks += [fill_peak(peaks[0].new_full((), v, dtype=torch.float64)) for v in numbers.values()]
                self.follow("o", torch.stack(peaks).amax())
        else:
            self.require_range("o")
        scale = torch.stack([self.scale("o", bits), *(s for _, s in entered.values())]).amin()
        brought = {i: fake_quant(x, scale, bits, rounding=self.rounding) for i, (x, _) in entered.items()}
        brought |= {i: filled(v, scale, bits) for i, v in numbers.items()}
        return [brought[i] for i in range(len(given))], Grid(scale, bits)

    def operand_name(self, position: int) -> str:
        return "xy"[position - sum(r < position for r in self.raw)]

    def node(
        self, given: tuple[Any, Any], operands: tuple[Operand, ...], out: Operand, cond: tuple[int, ...] = ()
    ) -> Any:
        """The node. ``given``: for either side, the position of its operand, or a number as a float."""
        inputs: list[int | str] = []
        params, scales = {}, []
        for name, v in zip(("x", "y"), given, strict=True):
            if isinstance(v, float):
                params[name] = filled_integer(v, out.scale, out.bits)
                inputs.append(name)
                scales.append(out.scale)
            else:
                inputs.append(v)
                scales.append(operands[v].scale)
        attrs = {
            "scale_x": scales[0],
            "scale_y": scales[1],
            "scale_o": out.scale,
            "data_bits": out.bits,
            "o_bits": out.bits,
        }
        form = "" if out.bits == 8 else f"_o{out.bits}"
        made = Lowered(
            op_type=self.op_type, inputs=(*inputs, *cond), attrs=attrs, params=params, bits=out.bits, form=form
        )
        return (made,)


class MaxSite(PickSite):
    """``torch.maximum(x, y)``, and ``torch.max`` of two tensors."""

    op_type = "iqMax"

    @classmethod
    def takes(cls, *args: Any, **kwargs: Any) -> bool:
        return len(args) == 2 and isinstance(args[1], Tensor) and not kwargs

    def forward(self, x: Any, y: Any) -> Tensor:
        (x, y), grid = self.common(x, y)
        return set_grid(torch.maximum(x, y) if self.op_type == "iqMax" else torch.minimum(x, y), grid)

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        return self.node((0, 1), operands, out)  # type: ignore[no-any-return]


class MinSite(MaxSite):
    """``torch.minimum(x, y)``, and ``torch.min`` of two tensors."""

    op_type = "iqMin"


class WhereSite(PickSite):
    """``torch.where(condition, x, y)``; the subclasses have other orders of the same three."""

    op_type = "iqWhere"
    order: ClassVar[tuple[int, int, int]] = (0, 1, 2)  # of condition, x, y in the call
    raw: ClassVar[frozenset[int]] = frozenset({0})

    @classmethod
    def takes(cls, *args: Any, **kwargs: Any) -> bool:
        return len(args) == 3 and not kwargs and isinstance(args[cls.order[0]], Tensor)

    def forward(self, *call: Any) -> Tensor:
        cond, x, y = (call[i] for i in self.order)
        (x, y), grid = self.common(x, y)
        return set_grid(torch.where(cond, x, y), grid)

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        tensors = [i for i in range(3) if i not in call]
        given = [float(call[i]) if i in call else tensors.index(i) for i in self.order]
        return self.node((given[1], given[2]), operands, out, (int(given[0]),))  # type: ignore[no-any-return]


class OwnWhereSite(WhereSite):
    """``x.where(condition, y)``"""

    order = (1, 0, 2)
    raw = frozenset({1})


class FillSite(WhereSite):
    """``x.masked_fill(condition, value)``"""

    order = (1, 2, 0)
    raw = frozenset({1})


@piecewise
def _brought(x: np.ndarray, *, scale_x: float, scale_o: float, o_bits: int, rounding: str) -> np.ndarray:
    return saturate(shift_round(x, exponent(scale_x) - exponent(scale_o), rounding), o_bits)


def run_where(
    x: np.ndarray, y: np.ndarray, cond: np.ndarray, *, scale_x: float, scale_y: float, scale_o: float, o_bits: int = 8,
    rounding: str = HALF_UP, **_: Any,
) -> np.ndarray:  # fmt: skip
    """Equation (1); the three are broadcast."""
    a = _brought(x, scale_x=scale_x, scale_o=scale_o, o_bits=o_bits, rounding=rounding)
    b = _brought(y, scale_x=scale_y, scale_o=scale_o, o_bits=o_bits, rounding=rounding)
    return np.where(cond, a, b)


def _run_pick(pick: Any) -> Any:
    def run(
        x: np.ndarray, y: np.ndarray, *, scale_x: float, scale_y: float, scale_o: float, o_bits: int = 8,
        rounding: str = HALF_UP, **_: Any,
    ) -> np.ndarray:  # fmt: skip
        """Equation (2)."""
        a = _brought(x, scale_x=scale_x, scale_o=scale_o, o_bits=o_bits, rounding=rounding)
        b = _brought(y, scale_x=scale_y, scale_o=scale_o, o_bits=o_bits, rounding=rounding)
        return pick(a, b)  # type: ignore[no-any-return]

    return run


def _body(statement: str, inputs: str = "X, Y0") -> Any:
    """Both operands on the output grid as doubles ``A`` and ``B``, and a statement that picks ``S``."""

    def body(form: str, opset: int, rounding: str = HALF_UP) -> tuple[str, str]:
        _, bits = output_bits(form)
        text = constants(sx="@scale_x", sy="@scale_y", so="@scale_o", one="double {1.0}")
        for source, scale, result in (("X", "sx", "A"), ("Y0", "sy", "B")):
            text += f"{result}f = Div (so, {scale})\n{result}m = Cast <to: int = 11> ({result}f)\n"
            text += f"{result}x = Cast <to: int = 11> ({source})\n"
            text += requant_text(f"{result}x", f"{result}m", result, bits, double=True, cast=False, rounding=rounding)
        return inputs, text + f"S = {statement}\n" + requant_text("S", "one", "Y", bits, double=True)

    return body


def _positive(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x > 0.3, x, y)


_PAIR = ((2, 3, 20), (2, 3, 20))
_ONE = ((2, 3, 20),)

CASES = (
    Case(name="where", make=lambda: _positive, shapes=_PAIR),
    Case(name="where-broadcast", make=lambda: lambda x, y: torch.where(y > 0, x, y), shapes=((2, 3, 20), (2, 1, 20))),
    Case(name="where-number", make=lambda: lambda x: torch.where(x < 1, x, 0.3), shapes=_ONE),
    Case(name="where-number-left", make=lambda: lambda x: torch.where(x < 1, 100.0, x), shapes=_ONE),
    Case(name="where-own", make=lambda: lambda x, y: x.where(y > x, y), shapes=_PAIR),
    Case(name="masked-fill", make=lambda: lambda x: x.masked_fill(x > 2, -0.7), shapes=_ONE),
    Case(name="masked-fill-inf", make=lambda: lambda x: x.masked_fill(x > 2, float("-inf")), shapes=_ONE),
    Case(name="maximum", make=lambda: torch.maximum, shapes=_PAIR),
    Case(name="max-of-two", make=lambda: lambda x, y: torch.max(x, y), shapes=((2, 3, 20), (2, 3, 1))),
    Case(name="minimum", make=lambda: torch.minimum, shapes=_PAIR),
    Case(name="min-of-two", make=lambda: lambda x, y: x.min(other=y), shapes=_PAIR),
)

OPS = (
    Op(name="iqMax", run=_run_pick(np.maximum), body=_body("Max (A, B)"), real=real_text("Y = Max (X, Y0)"), integer=MaxSite,
       site="iqmax", calls=(torch.maximum, Tensor.maximum, torch.max, Tensor.max)),
    Op(name="iqMin", run=_run_pick(np.minimum), body=_body("Min (A, B)"), real=real_text("Y = Min (X, Y0)"), integer=MinSite,
       site="iqmin", calls=(torch.minimum, Tensor.minimum, torch.min, Tensor.min)),
    Op(name="iqWhere", run=run_where, body=_body("Where (C, A, B)", "X, Y0, C"), real=real_text("Y = Where (C, X, Y0)"),
       integer=WhereSite, site="iqwhere", calls=(torch.where,)),
    Op(name="own_where", run=run_where, body=_body("Where (C, A, B)", "X, Y0, C"), real=real_text("Y = Where (C, X, Y0)"),
       integer=OwnWhereSite, site="iqwhere_own", calls=(Tensor.where,)),
    Op(name="masked_fill", run=run_where, body=_body("Where (C, A, B)", "X, Y0, C"), real=real_text("Y = Where (C, X, Y0)"),
       integer=FillSite, site="iqfill", calls=(Tensor.masked_fill, Tensor.masked_fill_, torch.masked_fill)),
)  # fmt: skip
