"""Functions of one tensor as tables over the levels of its grid: y = table[q].

    table[k] = sat( floor(f(k / s_x) * s_o + 1/2) ),  k = -2^(b-1) .. 2^(b-1) - 1                      (1)
    chip's own function (``Pwl``): table[k] = sat( rsh(f(z(k)), y_fraction - log2 s_o) )               (2)

An input of 8 bits has 256 levels, one of 16 bits 65,536; a wider one is narrowed to 16 bits first. The table is computed
on the device from the scales, without looking at values, so the cost over a full-size activation is one lookup. The file
carries the table inside the function body. The gradient is the float function's at the fake-quantized input; where the
output grid follows the observed range, it is zero where the output saturates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from linger.numerics import Grid, exponent, grid_of, levels, saturate, set_grid, shift_round
from linger.ops._base import ONNX_INT
from linger.ops._lowered import Lowered, Operand, requant_node
from linger.ops._pwl import argument, evaluate, torch_values
from linger.ops._site import Site
from linger.targets import TARGETS, Pwl

WIDEST_TABLE = 16  # bits of the input


class _Lookup(torch.autograd.Function):
    """values[q] with the gradient slopes[q], q the levels of ``x`` counted from the lowest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, values: Tensor, slopes: Tensor) -> Tensor:
        q = torch.addcmul(scale.new_full((), len(values) // 2), x, scale).to(torch.int32)
        ctx.save_for_backward(q.to(torch.uint8) if len(values) == 256 else q, slopes)
        return values.index_select(0, q.flatten()).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        q, slopes = ctx.saved_tensors
        return grads[0] * slopes.index_select(0, q.flatten().int()).view(q.shape), None, None, None


class UnarySite(Site):
    """One call of a function of one tensor. A subclass gives the float function and its derivative.

    ``fixed``: the output scale is 2^(bits - 1), for functions that stay within -1 .. 1. ``numbers``: the call's numeric
    arguments and their defaults; anything else in a call (``inplace``) changes nothing.
    """

    op_type: ClassVar[str]
    fixed: ClassVar[bool] = False
    numbers: ClassVar[Mapping[str, float]] = {}
    observed: ClassVar[tuple[str, ...]] = ("o",)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.fixed:
            cls.observed = ()

    @classmethod
    def said(cls, call: Mapping[Any, Any]) -> dict[str, float]:
        """The call's numbers, as the file stores them: float32."""
        return {k: float(np.float32(v if call.get(k) is None else call[k])) for k, v in cls.numbers.items()}

    @staticmethod
    def value(v: Tensor, **call: Any) -> Tensor:
        """f(v) in float64."""
        raise NotImplementedError

    @staticmethod
    def slope(v: Tensor, **call: Any) -> Tensor:
        """f'(v) in float64; at a kink, what PyTorch's own derivative is."""
        raise NotImplementedError

    def pwl(self) -> Pwl | None:
        """The chip's own function, None where it has none."""
        return TARGETS[self.chip].functions.get(self.op_type)

    def operand_bits(self, bits: Sequence[int]) -> int:
        return min(super().operand_bits(bits), WIDEST_TABLE)

    def forward(self, x: Tensor, **call: Any) -> Tensor:
        bits = self.out_bits = self.operand_bits([g.bits for g in [grid_of(x)] if g is not None])
        x, scale = self.operand(x, "x", bits)
        half = 2 ** (bits - 1)
        q = torch.arange(-half, half, dtype=torch.float64, device=x.device)
        v = q / scale.double()
        said = self.said(call)
        exact, slopes = self.value(v, **said), self.slope(v, **said)
        s_o = self.output_scale(x, scale, exact, bits)
        integers, inside = self.integers(q, scale, exact, s_o, bits)
        slopes = slopes if self.fixed else slopes * inside
        y = _Lookup.apply(x, scale, (integers / s_o).float(), slopes.float())
        return set_grid(y, Grid(s_o.float(), bits))

    def output_scale(self, x: Tensor, scale: Tensor, exact: Tensor, bits: int) -> Tensor:
        """The result's scale: fixed, or from the running maximum of |f(x)|."""
        if self.fixed:
            return scale.new_full((), 2.0 ** (bits - 1), dtype=torch.float64)
        if self.training:
            with torch.no_grad():
                y = _Lookup.apply(x.detach(), scale, exact.float(), exact.float())
                self.observe("o", y)
        else:
            self.require_range("o")
        return self.scale("o", bits).double()

    def integers(self, q: Tensor, scale: Tensor, exact: Tensor, s_o: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Equation (1) or (2) for every level, and whether the result is within range."""
        table = self.pwl()
        if table is None:
            v = torch.floor(exact * s_o + 0.5)
        else:
            v = torch.floor(torch_values(q, scale, table) * (s_o / 2.0**table.y_fraction) + 0.5)
        y = v.clamp(-levels(bits) - 1, levels(bits))
        return y, y == v

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        given, said, table = operands[0], self.said(call), self.pwl()
        x = given if table is None else as_argument(given, table)
        attrs = {"scale_x": x.scale, "scale_o": out.scale, "data_bits": x.bits, "o_bits": out.bits, **said}
        form = table_form(TARGETS[self.chip].platform, x, out, said)
        source: int | str = 0 if x == given else "%0"
        node = Lowered(op_type=self.op_type, inputs=(source,), attrs=attrs, bits=out.bits, form=form)
        return (node,) if x == given else (requant_node(given, x), node)


def as_argument(x: Operand, table: Pwl) -> Operand:
    """The operand that the chip's function reads: of 16 bits and at least ``x_fraction`` where its argument has 16 bits."""
    if table.width > WIDEST_TABLE:
        return x
    scale = max(x.scale * 2.0 ** (WIDEST_TABLE - x.bits), 2.0**table.x_fraction)
    return Operand(scale=scale, bits=WIDEST_TABLE, shape=x.shape)


def table_form(platform: str, x: Operand, out: Operand, call: Mapping[str, float]) -> str:
    """All that a table depends on: chip, scales, widths and the call's numbers."""
    said = "".join(f" {k}={float(v)!r}" for k, v in sorted(call.items()))
    return f"{platform} {exponent(x.scale)} {exponent(out.scale)} {x.bits} {out.bits}{said}"


def runner(op_type: str, value: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """``run`` of a function: the chip's own where it has one, else equation (1) on ``value``, f in NumPy float64."""

    def run(
        x: np.ndarray, *, scale_x: float, scale_o: float, platform: str = "venus", o_bits: int = 0, **call: Any
    ) -> np.ndarray:
        """x int8 or int16 of any shape -> the same shape in ``o_bits`` bits."""
        bits = o_bits or 8 * x.dtype.itemsize
        table = TARGETS[platform.lower()].functions.get(op_type)
        if table is None:
            call.pop("data_bits", None)
            with np.errstate(all="ignore"):
                y = value(x.astype(np.float64) / scale_x, **call)
                return saturate(np.floor(y * scale_o + 0.5), bits)
        return saturate(
            shift_round(evaluate(argument(x, scale_x, table), table), table.y_fraction - exponent(scale_o)), bits
        )

    return run


def table_body(run: Callable[..., np.ndarray]) -> Callable[[str, int], tuple[str, str]]:
    """Body of a function: its table as a constant, and a Gather."""

    def body(form: str, opset: int) -> tuple[str, str]:
        platform, q_x, q_o, bits, out_bits, *said = form.split(" ")
        half = 2 ** (int(bits) - 1)
        call = {k: float(v) for k, _, v in (s.partition("=") for s in said)}
        x = np.arange(-half, half).astype(np.int8 if int(bits) == 8 else np.int16)
        y = run(x, scale_x=2.0 ** int(q_x), scale_o=2.0 ** int(q_o), platform=platform, o_bits=int(out_bits), **call)
        values = ", ".join(map(str, y.tolist()))
        kind = "int8" if int(out_bits) == 8 else "int16"
        text = (
            f"t = Constant <value = {kind}[{2 * half}] {{{values}}}> ()\nh = Constant <value = int32 {{{half}}}> ()\n"
        )
        return "X", text + f"i = Cast <to: int = {ONNX_INT[32]}> (X)\nk = Add (i, h)\nY = Gather (t, k)\n"

    return body
