"""What every row normalization shares: the forward, its node, the twins' bookkeeping and the sites'."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from linger.errors import LingerError
from linger.numerics import bound_parameter, levels, quantize
from linger.ops._base import IntModule
from linger.ops._constant import constant_of
from linger.ops._lowered import Lowered, Operand, requant_node
from linger.ops._norm import CHIP_EPS, NORMAL, SUM_LIMIT, Rows, check_rows, form_of, normalized
from linger.ops._normalize import Normalized
from linger.ops._site import Site
from linger.ops._weighted import on_grids, room_for_sum
from linger.targets import known

WIDEST_NORM = 16  # bits of the input
Parameters = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Norm:
    """One normalization of one tensor: its rows, its float function of (x, weight, bias), its node's own attributes."""

    rows: Rows
    ideal: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
    attrs: Mapping[str, Any] = field(default_factory=dict)


class _Carried(torch.autograd.Function):
    """``exact`` with the gradient of ``ideal``."""

    @staticmethod
    def forward(ctx: Any, ideal: Tensor, exact: Tensor) -> Tensor:
        ctx.dtype = ideal.dtype
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None


class NormModule(IntModule):
    """A twin or a site. ``op_type`` is the node's."""

    op_type: ClassVar[str]
    learns = ("o",)

    def gamma_bits(self) -> int:
        """Width of the stored weight: what was asked for, at least what the chip's node reads."""
        return max(self.parameter_bits, known(self.chip).weight_bits.get(self.op_type, 0))

    def normal_bits(self) -> int:
        """Width of a normalized value: the chip's, where it has the node."""
        chip = known(self.chip)
        return 32 if self.op_type in chip.lacks else chip.normal_bits

    def on_grids(self, weight: Tensor | None, bias: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor | None, Tensor]:
        """Weight (ones without one) and bias within their bounds and on their grids, and the weight's scale."""
        where = bias if weight is None else weight
        device = self.running("o").device if where is None else where.device
        weight = torch.ones(rows.affine, device=device) if weight is None else weight.float()
        weight = bound_parameter(weight.reshape(rows.affine), self.normalize_weight)
        if bias is not None:
            bias = bound_parameter(bias.float().reshape(rows.affine), self.normalize_bias)
        return on_grids(weight, bias, torch.full((), NORMAL, device=device), self.gamma_bits())

    def compute(self, x: Tensor, s_x: Tensor, parameters: Parameters, norm: Norm) -> Tensor:
        """Equations (1) to (6) of ``_norm`` on x, which has a grid of scale ``s_x``."""
        w, b, s_w = self.on_grids(*parameters, norm.rows)
        y = normalized(x, s_x, norm.rows, self.normal_bits())
        exact = self.scaled(y, w.detach().double(), None if b is None else b.detach().double(), s_w, norm.rows.length)
        finest = s_w * NORMAL
        if self.out_bits == 32:
            finest = room_for_sum(finest, self.peak(w, b, s_w, norm.rows.length))
        if torch.is_grad_enabled():
            given = next((p for p in parameters if p is not None), None)
            ideal = norm.ideal(
                x,
                None if given is None else w.reshape(given.shape),
                None if given is None or b is None else b.reshape(given.shape),
            )
            exact = _Carried.apply(ideal, exact)
        return self.leave(exact, finest)

    def scaled(self, y: Tensor, w: Tensor, b: Tensor | None, s_w: Tensor, length: int) -> Tensor:
        """The accumulator of equation (6) as a real number; it saturates only where it can reach 32 bits at all."""
        factor = w / NORMAL
        if self.top(length) * 2.0 ** (self.gamma_bits() - 1) < SUM_LIMIT:
            return y * factor if b is None else torch.addcmul(b, y, factor)
        s_acc = s_w.double() * NORMAL
        product = torch.minimum(torch.maximum(y * factor, -SUM_LIMIT / s_acc), (SUM_LIMIT - 1) / s_acc)
        return product if b is None else product + b

    def top(self, length: int | None) -> float:
        """An upper bound of |y|: 2^10 * sqrt(T), and r is at most 2^-9 too large; the chip's width without a T."""
        widest = 2.0 ** (self.normal_bits() - 1)
        return widest if length is None else min(widest, NORMAL * length**0.5 * 1.01 + 1)

    def peak(self, w: Tensor, b: Tensor | None, s_w: Tensor, length: int | None) -> Tensor:
        """An upper bound of |accumulator| in LSB."""
        peak = (w.detach().double().abs().amax() * s_w * self.top(length)).clamp_max(float(SUM_LIMIT))
        return (peak if b is None else peak + b.detach().double().abs().amax() * (s_w * NORMAL)).float()

    @torch.no_grad()
    def nodes(self, x: Operand, out: Operand, parameters: Parameters, norm: Norm) -> tuple[Lowered, ...]:
        """The node, behind a Requant where the operand is finer than the rows allow."""
        w, b, s_w = self.on_grids(*parameters, norm.rows)
        bits = self.gamma_bits()
        q_w = quantize(w, s_w, bits).reshape(-1)
        q_b = np.zeros(q_w.shape, np.int32) if b is None else quantize(b, s_w * NORMAL, 32).reshape(-1)
        taken = replace(x, scale=min(x.scale, norm.rows.finest))
        attrs = {
            **norm.attrs, "data_bits": x.bits, "parameter_bits": bits, "o_bits": out.bits,
            "scale_x": taken.scale, "scale_w": float(s_w), "scale_o": out.scale,
        }  # fmt: skip
        if float(np.float32(norm.rows.eps)) != CHIP_EPS:
            attrs["epsilon"] = float(norm.rows.eps)
        source: int | str = 0 if taken == x else "%0"
        form = form_of(norm.rows, taken.scale, self.normal_bits(), out.bits)
        node = Lowered(
            op_type=self.op_type, inputs=(source, "weight", "bias"), attrs=attrs,
            params={"weight": q_w, "bias": q_b}, bits=out.bits, form=form,
        )  # fmt: skip
        return (node,) if taken == x else (requant_node(x, taken), node)


class NormInt(NormModule):
    """Fixed-point twin of a layer; the subclass says what it computes (``norm``) for an input of some shape."""

    weighted = True
    normal_length: int | None = None  # of a row, where it does not depend on the input

    def norm(self, shape: Sequence[int], bits: int) -> Norm:
        raise NotImplementedError

    def given(self) -> Parameters:
        """Weight and bias of the layer."""
        return self._parameters.get("weight"), self._parameters.get("bias")

    def operand_bits(self, bits: Sequence[int]) -> int:
        return min(self.data_bits, WIDEST_NORM)

    def forward(self, x: Tensor) -> Tensor:
        bits = self.operand_bits(())
        norm = self.norm(x.shape, bits)
        x, s_x = self.enter(x, "x", bits)
        return self.compute(x, s_x, self.given(), norm)

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        norm = self.norm(operands[0].shape, operands[0].bits)
        return self.nodes(operands[0], out, self.given(), norm)

    @torch.no_grad()
    def accumulator_peak(self, s_x: Tensor) -> float:
        w, b, s_w = self.frozen()
        return float(self.peak(w, b, s_w, self.normal_length))

    def frozen(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Weight, bias and the weight's scale as the file stores them, flat."""
        weight, bias = self.given()
        count = next((p.numel() for p in (weight, bias) if p is not None), 1)
        return self.on_grids(weight, bias, Rows(length=1, eps=0.0, cut=(), affine=(count,), keep=0))

    @torch.no_grad()
    def derived(self) -> dict[str, Tensor]:
        s_w, s_x = self.frozen()[2], self.scale("x", self.operand_bits(()))
        return super().derived() | {"scale_x": s_x, "scale_w": s_w, "running_w": levels(self.gamma_bits()) / s_w}


class NormSite(NormModule, Site):
    """A functional call; its weight and bias are parameters of the net, or computed from some, and stored in the node."""

    parameter_names = ("weight", "bias")

    @classmethod
    def takes(cls, x: Any = None, *args: Any, **call: Any) -> bool:
        given = [p for p in (call.get("weight"), call.get("bias")) if p is not None]
        return isinstance(x, Tensor) and all(constant_of(p) is not None for p in given)

    @classmethod
    def norm(cls, shape: Sequence[int], bits: int, **call: Any) -> Norm:
        raise NotImplementedError

    def operand_bits(self, bits: Sequence[int]) -> int:
        return min(super().operand_bits(bits), WIDEST_NORM)

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, **call: Any) -> Tensor:
        bits = self.out_bits = min(self.width(x), WIDEST_NORM)
        norm = self.norm(x.shape, bits, **call)
        x, s_x = self.operand(x, "x", bits)
        return self.compute(x, s_x, (weight, bias), norm)

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        said = {k: v for k, v in call.items() if isinstance(k, str)}
        parameters = said.pop("weight", None), said.pop("bias", None)
        return self.nodes(operands[0], out, parameters, self.norm(operands[0].shape, operands[0].bits, **said))


class NormalizedNorm(Normalized):
    """Range-constrained float twin: weight, bias and output within their bounds."""

    def norm(self, shape: Sequence[int], bits: int) -> Norm:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        return self.bound_output(
            self.norm(x.shape, 8).ideal(
                x,
                None if weight is None else bound_parameter(weight, self.normalize_weight),
                None if bias is None else bound_parameter(bias, self.normalize_bias),
            )
        )


def layer_rows(shape: Sequence[int], normalized_shape: Sequence[int], eps: float, bits: int, centred: bool) -> Rows:
    """Rows over the trailing axes of ``normalized_shape``.

    Raises:
        LingerError: the tensor does not end in that shape, or rows are too long.
    """
    wanted = tuple([int(n) for n in normalized_shape])
    lead = len(shape) - len(wanted)
    if lead < 0 or tuple(shape[lead:]) != wanted:
        raise LingerError(
            f"found an input of shape {tuple(shape)}, allowed are shapes that end in {wanted}; change normalized_shape"
        )
    length = math.prod(wanted)
    check_rows(length, bits, eps)
    return Rows(
        length=length, eps=float(eps), cut=(*shape[:lead], length), affine=wanted, keep=lead, centred=centred
    )  # fmt: skip
