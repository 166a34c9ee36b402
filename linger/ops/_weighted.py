"""Layers whose accumulator is a weighted sum: convolution, transposed convolution, linear.

acc = sum(q_x * q_w) + q_b,   q_b = round(b * s_x * s_w) as int32                                  (1)
out = saturate(shift_round(acc, log2(s_x * s_w / s_o)))                                            (2)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

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
    scale_from_weight,
    shift_round,
)
from linger.ops._base import IntModule, constants, output_bits, requant_text
from linger.ops._lowered import Lowered, Operand


class WeightedInt(IntModule):
    """Fixed-point twin of a layer with ``weight`` and ``bias``; the subclass says how to multiply and what to write."""

    weighted: ClassVar[bool] = True
    op_type: ClassVar[str]
    weight: Tensor
    bias: Tensor | None

    def accumulate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's own product; exact on the values it is given."""
        raise NotImplementedError

    def absolute_sum(self, weight: Tensor) -> Tensor:
        """sum|w| per output, shape (out,): how far one output's accumulator can go for inputs of magnitude 1."""
        return weight.abs().flatten(1).sum(1)

    def operator_attrs(self, x: Operand, out: Operand) -> dict[str, Any]:
        """Strides, pads and the like, under the engine's names."""
        return {}

    def grids(self, s_x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Weight and bias on their grids for an input of scale ``s_x``, and the scale of the weight."""
        weight = bound_parameter(self.weight.float(), self.normalize_weight)
        bias = None if self.bias is None else bound_parameter(self.bias.float(), self.normalize_bias)
        return on_grids(weight, bias, s_x, self.parameter_bits)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        x, s_x = self.enter(x)
        self.prove(s_x)
        w, b, s_w = self.grids(s_x)
        finest = s_x * s_w
        if self.out_bits == 32:
            finest = room_for_sum(finest, self.bound(w, s_w, b, finest))
        if not self.exact_in_float32:
            x, w, b = x.double(), w.double(), None if b is None else b.double()
        return self.leave(self.accumulate(x, w, b), finest)

    def bound(self, w: Tensor, s_w: Tensor, b: Tensor | None, s_acc: Tensor) -> Tensor:
        """max over outputs of sum|q_w| * max|q_x| + |q_b|, in LSB, in float64 (shape [])."""
        peak = self.absolute_sum(w.detach().double()) * s_w * reach(self.data_bits)
        if b is not None:
            peak = peak + b.detach().double().abs() * s_acc
        return peak.amax().float()

    @torch.no_grad()
    def accumulator_peak(self, s_x: Tensor) -> float:
        w, b, s_w = self.grids(s_x)
        return float(self.bound(w, s_w, b, s_x * s_w))

    @torch.no_grad()
    def derived(self) -> dict[str, Tensor]:
        s_w = self.grids(self.scale("x", self.data_bits))[2]
        return super().derived() | {"scale_w": s_w, "running_w": levels(self.parameter_bits) / s_w}

    @torch.no_grad()
    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        x = operands[0]
        s_x = torch.tensor(x.scale, device=self.weight.device)
        w, b, s_w = self.grids(s_x)
        q_w = quantize(w, s_w, self.parameter_bits)
        q_b = np.zeros(len(self.absolute_sum(w)), np.int32) if b is None else quantize(b, s_x * s_w, 32)
        peak = self.accumulator_peak(s_x)
        attrs = {
            **self.operator_attrs(x, out),
            "data_bits": x.bits,
            "parameter_bits": self.parameter_bits,
            "o_bits": out.bits,
            "scale_x": x.scale,
            "scale_w": float(s_w),
            "scale_o": out.scale,
        }
        form = "f32" if peak < FLOAT32_EXACT else self.wide_form(q_w, x.bits)
        form += "" if out.bits == 8 else f"_o{out.bits}"
        params = {"weight": q_w, "bias": q_b}
        return (
            Lowered(
                op_type=self.op_type, inputs=(0, "weight", "bias"), attrs=attrs, params=params, bits=out.bits, form=form
            ),
        )

    def wide_form(self, q_w: np.ndarray, data_bits: int) -> str:
        """Name of the body that is exact beyond 2^24."""
        return "f64"


def on_grids(weight: Tensor, bias: Tensor | None, s_x: Tensor, bits: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weight and bias on their grids for an input of scale ``s_x``, and the scale of the weight."""
    s_w = scale_from_weight(weight, bits)
    if bias is not None:
        s_w = room_for_bias(s_w, s_x, bias)
        bias = fake_quant(bias, s_x * s_w, 32)
    return fake_quant(weight, s_w, bits), bias, s_w


def room_for_sum(s_acc: Tensor, peak: Tensor) -> Tensor:
    """The finest scale at which a 32-bit result whose accumulator stays within ``peak`` LSB is an exact float32."""
    return s_acc * pow2_floor(FLOAT32_EXACT / peak.clamp_min(FLOAT32_EXACT))


def room_for_bias(s_w: Tensor, s_x: Tensor, bias: Tensor) -> Tensor:
    """The weight's scale, made coarser where the int32 bias at scale s_x * s_w would saturate: |b| * s_x * s_w < 2^30."""
    peak = bias.detach().abs().amax().float() * s_x
    return torch.where(peak > 0, torch.minimum(s_w, pow2_floor(2.0**30 / peak.clamp(2.0**-90, 2.0**90))), s_w)


def split_form(terms: int, data_bits: int, parameter_bits: int) -> str:
    """Cut x into 8-bit pieces and w into p-bit pieces so that each partial product of ``terms`` terms is below 2^24."""
    pieces = max(1, data_bits // 8)
    top = 128 if pieces == 1 else 255
    width = next(p for p in (4, 2, 1) if p == 1 or terms * top * (2**p - 1) < FLOAT32_EXACT)
    return f"x{pieces}w{-(-max(parameter_bits, width) // width)}p{width}"


def requantize(acc: np.ndarray, scale_x: float, scale_w: float, scale_o: float, o_bits: int) -> np.ndarray:
    """Equation (2)."""
    return saturate(shift_round(acc, exponent(scale_x) + exponent(scale_w) - exponent(scale_o)), o_bits)


def split_text(source: str, prefix: str, pieces: int, width: int) -> str:
    """Statements cutting double ``source`` into floats ``prefix0`` .. of ``width`` bits, lowest first, the last signed."""
    text = constants(**{f"{prefix}base": f"double {{{2**width}}}", f"{prefix}inv": f"double {{{2.0**-width}}}"})
    rest = source
    for i in range(pieces - 1):
        high, low = f"{prefix}h{i}", f"{prefix}l{i}"
        text += (
            f"{high}m = Mul ({rest}, {prefix}inv)\n{high} = Floor ({high}m)\n{high}b = Mul ({high}, {prefix}base)\n"
            f"{low} = Sub ({rest}, {high}b)\n{prefix}{i} = Cast <to: int = 1> ({low})\n"
        )
        rest = high
    return text + f"{prefix}{pieces - 1} = Cast <to: int = 1> ({rest})\n"


def multiplier_text(double: bool = False) -> str:
    """Statements for ``M`` = s_o / (s_x * s_w), exact because all are powers of two."""
    text = constants(sx="@scale_x", sw="@scale_w", so="@scale_o") + "sxw = Mul (sx, sw)\n"
    return text + ("Mf = Div (so, sxw)\nM = Cast <to: int = 11> (Mf)\n" if double else "M = Div (so, sxw)\n")


def result_text(accumulator: str, double: bool, bits: int) -> str:
    """Equation (2) of an ``accumulator`` statement that is exact in float (or double); results above 16 bits need double."""
    if double or bits <= 16:
        return f"A = {accumulator}\n" + multiplier_text(double) + requant_text("A", "M", "Y", bits, double)
    text = f"S = {accumulator}\nA = Cast <to: int = 11> (S)\n"
    return text + multiplier_text(double=True) + requant_text("A", "M", "Y", bits, double=True)


def sum_body(form: str, product: str) -> tuple[str, str]:
    """Body of a weighted sum. ``product`` is an ONNX expression with {x}, {w} and {b} (", bias" or empty)."""
    base, bits = output_bits(form)
    if base == "f32":
        text = "Xf = Cast <to: int = 1> (X)\nWf = Cast <to: int = 1> (W)\nBf = Cast <to: int = 1> (B)\n"
        return "X, W, B", text + result_text(product.format(x="Xf", w="Wf", b=", Bf"), False, bits)
    n_x, rest = base[1:].split("w")
    n_w, width = (int(v) for v in rest.split("p"))
    text = "Xd = Cast <to: int = 11> (X)\nWd = Cast <to: int = 11> (W)\nBd = Cast <to: int = 11> (B)\n"
    text += split_text("Xd", "x", int(n_x), 8) + split_text("Wd", "w", n_w, width)
    total = ""
    for i in range(int(n_x)):
        for j in range(n_w):
            name = f"t{i}_{j}"
            text += f"{name}f = " + product.format(x=f"x{i}", w=f"w{j}", b="") + "\n"
            text += constants(**{f"{name}s": f"double {{{2 ** (8 * i + width * j)}}}"})
            text += f"{name}d = Cast <to: int = 11> ({name}f)\n{name} = Mul ({name}d, {name}s)\n"
            text += f"{name}a = Add ({total}, {name})\n" if total else ""
            total = f"{name}a" if total else name
    return "X, W, B", text + "Bn = BiasShape (Bd)\n" + result_text(f"Add ({total}, Bn)", True, bits)
