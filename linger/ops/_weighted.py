"""Layers and calls whose accumulator is a weighted sum: convolution, transposed convolution, linear.

acc = sum(q_x * q_w) + q_b,   q_b = round(b * s_x * s_w) as int32                                  (1)
out = saturate(shift_round(acc, log2(s_x * s_w / s_o)))                                            (2)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from linger.eager import at_hand, power, power_below, widest
from linger.numerics import (
    FLOAT32_EXACT,
    bound_parameter,
    exponent,
    fake_quant,
    levels,
    pow2_floor,
    quantize,
    reach,
    saturate,
    scale_from_running,
    scale_from_weight,
    shift_round,
)
from linger.ops import _once
from linger.ops._base import IntModule
from linger.ops._constant import constant_of
from linger.ops._lowered import Lowered, Operand
from linger.ops._once import Given
from linger.ops._placed import holding, placed
from linger.ops._site import Site
from linger.rounding import HALF_UP
from linger.steps import piecewise

WIDE_BIAS = 2**30  # LSB: what an int32 holds, and room for the products
NARROW_BIAS = 2**23  # LSB: half of what float32 holds; the products have the other half
MOST_PARTS = 16  # of a float32 sum; beyond them float64 is faster


class Product(Protocol):
    """How a weighted sum multiplies: everything but its weight and bias."""

    @property
    def groups(self) -> int:
        """Parts of the channels that do not mix."""

    @property
    def transposed(self) -> bool:
        """Whether the weight's first axis is that of the input channels."""

    def accumulate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product; exact on the values it is given."""

    def absolute_sum(self, weight: Tensor) -> Tensor:
        """sum|w| per output, shape (out,): how far one output's accumulator can go for inputs of magnitude 1."""

    def attrs(self, weight: tuple[int, ...], x: Operand) -> dict[str, Any]:
        """Strides, pads and the like, under the engine's names, for a weight of this shape."""

    def wide_form(self, weight: tuple[int, ...], data_bits: int, parameter_bits: int) -> str:
        """Name of the body that is exact beyond 2^24."""


class WeightedSum(IntModule):
    """Equations (1) and (2) on a weight and a bias that are handed in."""

    weighted: ClassVar[bool] = True
    op_type: ClassVar[str]
    repeats: bool = False  # a forward has called it several times

    def forget(self) -> None:
        super().forget()
        _once.EVAL.pop(self, None)

    def placed(
        self, product: Product, weight: Tensor, bias: Tensor | None, s_x: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Weight and bias within their bounds on their grids for an input of scale ``s_x``, and the scale of the weight."""
        given = Given(weight, bias, s_x, self.settings(product))
        weight = bound_parameter(weight.float(), self.normalize_weight)
        bias = None if bias is None else bound_parameter(bias.float(), self.normalize_bias)
        if self.learned("w") is not None:
            return self.learned_weight(product, weight, bias, s_x)
        kept = _once.recall(self, given)
        if kept is not None:
            return holding(weight, kept.weight), holding(bias, kept.bias), kept.scale
        s_w, bits = scale_from_weight(weight, self.parameter_bits), self.parameter_bits
        if bias is None:
            w, b = self.snapped(weight, "w", s_w, s_w, bits, inside=True), None
        else:
            s_w = room_for_bias(s_w, s_x, bias, self.bias_limit(product, weight))
            w, b = placed(weight, bias, s_w, s_x * s_w, bits)
        _once.keep(self, given, w, b, s_w)
        return w, b, s_w

    def settings(self, product: Product) -> tuple[Any, ...]:
        """What decides, beside the tensors, on which grids weight and bias are put."""
        bounds = self.normalize_weight, self.normalize_bias
        return (*bounds, self.parameter_bits, self.data_bits, self.out_bits, product.groups, product.transposed)

    def learned_weight(
        self, product: Product, weight: Tensor, bias: Tensor | None, s_x: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """``placed`` where the range of the weight is learned."""
        own = s_w = scale_from_running(self.range_of("w"), self.parameter_bits)
        if bias is not None:
            s_w = room_for_bias(own, s_x, bias, self.bias_limit(product, weight))
            bias = fake_quant(bias, s_x * s_w, 32, inside=True)
        return self.snapped(weight, "w", s_w, own, self.parameter_bits), bias, s_w

    def weighted_sum(self, product: Product, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer: ``x`` quantized where it has no grid, multiplied exactly, and put on the output's grid."""
        x, s_x = self.enter(x)
        w, b, s_w = self.placed(product, weight, bias, s_x)
        finest = lsb = s_x * s_w
        if self.out_bits == 32:
            finest = room_for_sum(lsb, self.bound(product, w, s_w, b, lsb))
        return self.leave(self.exact_sum(product, x, w, b, lsb), finest, fresh=True)

    def part(self, weight: Tensor) -> int:
        """Input channels that one float32 sum holds exactly: integers up to 2^24, of factors that every kernel keeps."""
        return part(self.data_bits, self.parameter_bits, tuple(weight.shape[2:]))

    def bias_limit(self, product: Product, weight: Tensor) -> int:
        """How large |q_b| may get, in LSB: less where products and bias then always fit one float32 sum."""
        channels, kernel = channels_of(product, weight), tuple(weight.shape[2:])
        fits = fits_with_bias(channels, self.data_bits, self.parameter_bits, kernel)
        return NARROW_BIAS if fits and self.out_bits == 8 else WIDE_BIAS

    def one_sum(self, product: Product, w: Tensor, b: Tensor | None, lsb: Tensor) -> bool:
        """Whether one float32 sum holds all products and the bias: any within its limit, or this one where it can be looked at."""
        channels = channels_of(product, w)
        if b is None or self.bias_limit(product, w) == NARROW_BIAS:
            return channels <= self.part(w)
        reached = widest(b) * lsb.item() if at_hand(b) else math.inf
        return fits_with_bias(channels, self.data_bits, self.parameter_bits, tuple(w.shape[2:]), reached)

    def exact_sum(self, product: Product, x: Tensor, w: Tensor, b: Tensor | None, lsb: Tensor) -> Tensor:
        """Equation (1) without rounding, ``lsb`` being s_x * s_w. No weight decides how, so that it holds compiled and as they grow.

        One float32 sum where it stays within 2^24; else one for each part of the input channels, added in float64, as is
        the bias; float64 throughout where there would be too many parts.
        """
        if self.one_sum(product, w, b, lsb):
            return product.accumulate(x, w, b)
        size, channels = self.part(w), channels_of(product, w)
        if channels > MOST_PARTS * size:
            return product.accumulate(x.double(), w.double(), None if b is None else b.double())
        cut = [(x, w)] if channels <= size else parts_of(product, x, w, size)
        total = functools.reduce(torch.add, [product.accumulate(*part, None).double() for part in cut])
        return total if b is None else total + b.double().reshape(-1, *[1] * (w.dim() - 2))

    def bound(self, product: Product, w: Tensor, s_w: Tensor, b: Tensor | None, s_acc: Tensor) -> Tensor:
        """max over outputs of sum|q_w| * max|q_x| + |q_b|, in LSB, computed in float64 (shape [])."""
        peak = product.absolute_sum(w.detach().double()) * s_w * reach(self.data_bits)
        if b is not None:
            peak = peak + b.detach().double().abs() * s_acc
        return peak.amax().float()

    @torch.no_grad()
    def nodes(
        self, product: Product, x: Operand, out: Operand, weight: Tensor, bias: Tensor | None
    ) -> tuple[Lowered, ...]:
        """The node that computes the same integers."""
        s_x = torch.tensor(x.scale, device=weight.device)
        w, b, s_w = self.placed(product, weight, bias, s_x)
        q_b = np.zeros(len(product.absolute_sum(w)), np.int32) if b is None else quantize(b, s_x * s_w, 32)
        attrs = {
            **product.attrs(tuple(weight.shape), x),
            "data_bits": x.bits,
            "parameter_bits": self.parameter_bits,
            "o_bits": out.bits,
            "scale_x": x.scale,
            "scale_w": float(s_w),
            "scale_o": out.scale,
        }
        peak = float(self.bound(product, w, s_w, b, s_x * s_w))
        form = "f32" if peak < FLOAT32_EXACT else product.wide_form(tuple(weight.shape), x.bits, self.parameter_bits)
        form += "" if out.bits == 8 else f"_o{out.bits}"
        params = {"weight": quantize(w, s_w, self.parameter_bits), "bias": q_b}
        return (
            Lowered(
                op_type=self.op_type, inputs=(0, "weight", "bias"), attrs=attrs, params=params, bits=out.bits, form=form,
                peak=peak,
            ),
        )  # fmt: skip


class WeightedInt(WeightedSum):
    """Fixed-point twin of a layer with ``weight`` and ``bias``; the subclass says how to multiply."""

    learns = ("o", "w")
    weight: Tensor
    bias: Tensor | None

    def product(self) -> Product:
        """The layer's own strides, pads and the like."""
        raise NotImplementedError

    def accumulate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's own product; exact on the values it is given."""
        return self.product().accumulate(x, weight, bias)

    def channels(self) -> int:
        """Input channels that one output sums over."""
        return channels_of(self.product(), self.weight)

    def grids(self, s_x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Weight and bias on their grids for an input of scale ``s_x``, and the scale of the weight."""
        return self.placed(self.product(), self.weight, self.bias, s_x)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.weighted_sum(self.product(), x, self.weight, self.bias)

    @torch.no_grad()
    def accumulator_peak(self, s_x: Tensor) -> float:
        w, b, s_w = self.grids(s_x)
        return float(self.bound(self.product(), w, s_w, b, s_x * s_w))

    @torch.no_grad()
    def derived(self) -> dict[str, Tensor]:
        s_w = self.grids(self.scale("x", self.data_bits))[2]
        return super().derived() | {"scale_w": s_w, "running_w": levels(self.parameter_bits) / s_w}

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        return self.nodes(self.product(), operands[0], out, self.weight, self.bias)


class WeightedSite(WeightedSum, Site):
    """The functional call of such a layer: weight and bias are parameters or buffers of the net, or computed from them.

    Widths are those given to ``init``, as for the layer.
    """

    observed: ClassVar[tuple[str, ...]] = ("x", "o")
    parameter_names: ClassVar[tuple[str, ...]] = ("weight", "bias")
    learns = ("o",)

    @classmethod
    def takes(cls, x: Any, weight: Any = None, bias: Any = None, **call: Any) -> bool:
        return all(constant_of(t) is not None for t in (weight, bias) if t is not None)

    @staticmethod
    def product(weight: tuple[int, ...], call: Mapping[Any, Any]) -> Product:
        """What the call's other arguments say, for a weight of this shape."""
        raise NotImplementedError

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, **call: Any) -> Tensor:
        return self.weighted_sum(self.product(tuple(weight.shape), call), x, weight, bias)

    def operand_bits(self, bits: Sequence[int]) -> int:
        return self.data_bits

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        weight, bias = call["weight"], call.get("bias")
        return self.nodes(self.product(tuple(weight.shape), call), operands[0], out, weight, bias)


def _per_channel(data_bits: int, parameter_bits: int, kernel: tuple[int, ...]) -> int:
    """The most that one input channel adds to a sum, in LSB."""
    return reach(data_bits) * reach(parameter_bits) * math.prod(kernel)


def part(data_bits: int, parameter_bits: int, kernel: tuple[int, ...]) -> int:
    """``WeightedSum.part``"""
    factors_kept = max(data_bits, parameter_bits) <= 8  # also those that multiply in TF32 or bfloat16
    return (FLOAT32_EXACT + 1) // _per_channel(data_bits, parameter_bits, kernel) if factors_kept else 0


def fits_with_bias(
    channels: int, data_bits: int, parameter_bits: int, kernel: tuple[int, ...], bias: float = NARROW_BIAS
) -> bool:
    """Whether the products of this many channels and a bias of so many LSB fit one float32 sum."""
    sum_limit = channels * _per_channel(data_bits, parameter_bits, kernel)
    return part(data_bits, parameter_bits, kernel) > 0 and sum_limit + bias < FLOAT32_EXACT


def channels_of(product: Product, weight: Tensor) -> int:
    """Input channels that one output sums over."""
    return weight.shape[0] // product.groups if product.transposed else weight.shape[1]


def parts_of(product: Product, x: Tensor, w: Tensor, size: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Input and weight, cut into parts of at most ``size`` channels of every group."""
    axis = x.dim() - w.dim() + 1
    xs = x.unflatten(axis, (product.groups, -1)).split(size, axis + 1)
    ws = w.unflatten(0, (product.groups, -1)).split(size, 1) if product.transposed else w.split(size, 1)
    for part, weight in zip(xs, ws, strict=True):
        yield part.flatten(axis, axis + 1), weight.flatten(0, 1) if product.transposed else weight


def on_grids(
    weight: Tensor, bias: Tensor | None, s_x: Tensor, bits: int, limit: int = WIDE_BIAS
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weight and bias (|q_b| <= ``limit``) on their grids for an input of scale ``s_x``, and the scale of the weight."""
    s_w = scale_from_weight(weight, bits)
    if bias is None:
        return fake_quant(weight, s_w, bits, inside=True), None, s_w
    s_w = room_for_bias(s_w, s_x, bias, limit)
    return *placed(weight, bias, s_w, s_x * s_w, bits), s_w


def room_for_sum(s_acc: Tensor, peak: Tensor) -> Tensor:
    """The finest scale at which a 32-bit result whose accumulator stays within ``peak`` LSB is an exact float32."""
    return s_acc * pow2_floor(FLOAT32_EXACT / peak.clamp_min(FLOAT32_EXACT))


def room_for_bias(s_w: Tensor, s_x: Tensor, bias: Tensor, limit: int = WIDE_BIAS) -> Tensor:
    """The weight's scale, made coarser where the integer bias would be too large: |b| * s_x * s_w <= ``limit``."""
    if at_hand(bias) and at_hand(s_w) and bias.dtype != torch.float64:
        reached, own = widest(bias) * s_x.item(), s_w.item()
        if 2.0**-60 < reached < 2.0**60 and own == own:
            n = power_below(limit, reached)
            return s_w if own <= 2.0**n else power(n)
    peak = bias.detach().abs().amax().float() * s_x
    room = pow2_floor(limit / peak.clamp(2.0**-90, 2.0**90))
    return torch.where(peak > 0, torch.minimum(s_w, room), s_w) + (peak - peak)  # NaN for a bias that is not finite


def requantize(
    acc: np.ndarray, scale_x: float, scale_w: float, scale_o: float, o_bits: int, rounding: str = HALF_UP
) -> np.ndarray:
    """Equation (2)."""
    shift = exponent(scale_x) + exponent(scale_w) - exponent(scale_o)
    return piecewise(lambda v: saturate(shift_round(v, shift, rounding), o_bits))(acc)
