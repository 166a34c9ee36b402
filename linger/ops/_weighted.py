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
    saturate,
    scale_from_weight,
    shift_round,
)
from linger.ops._base import IntModule, constants, requant_text
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

    def weight_grid(self) -> tuple[Tensor, Tensor]:
        """The weight within its bound, and its scale."""
        weight = bound_parameter(self.weight.float(), self.normalize_weight)
        return weight, scale_from_weight(weight, self.parameter_bits)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        x, s_x = self.enter(x)
        self.prove()
        weight, s_w = self.weight_grid()
        w = fake_quant(weight, s_w, self.parameter_bits)
        finest = s_x * s_w
        b = (
            None
            if self.bias is None
            else fake_quant(bound_parameter(self.bias.float(), self.normalize_bias), finest, 32)
        )
        if self.out_bits == 32:
            finest = finest * pow2_floor(FLOAT32_EXACT / self.bound(w, s_w, b, finest).clamp_min(FLOAT32_EXACT))
        if not self.exact_in_float32:
            x, w, b = x.double(), w.double(), None if b is None else b.double()
        return self.leave(self.accumulate(x, w, b), finest)

    def bound(self, w: Tensor, s_w: Tensor, b: Tensor | None, s_acc: Tensor) -> Tensor:
        """max over outputs of sum|q_w| * max|q_x| + |q_b|, in LSB, in float64 (shape [])."""
        peak = self.absolute_sum(w.detach().double()) * s_w * 2.0 ** (self.data_bits - 1)
        if b is not None:
            peak = peak + b.detach().double().abs() * s_acc
        return peak.amax().float()

    @torch.no_grad()
    def accumulator_peak(self) -> float:
        weight, s_w = self.weight_grid()
        s_acc = self.scale("x", self.data_bits) * s_w
        b = None if self.bias is None else fake_quant(self.bias.detach().float(), s_acc, 32)
        return float(self.bound(fake_quant(weight, s_w, self.parameter_bits), s_w, b, s_acc))

    def derived(self) -> dict[str, Tensor]:
        s_w = self.weight_grid()[1]
        return super().derived() | {"scale_w": s_w, "running_w": levels(self.parameter_bits) / s_w}

    @torch.no_grad()
    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        x = operands[0]
        weight, s_w = self.weight_grid()
        q_w = quantize(weight, s_w, self.parameter_bits)
        outputs = len(self.absolute_sum(weight))
        q_b = np.zeros(outputs, np.int32)
        if self.bias is not None:
            q_b = quantize(bound_parameter(self.bias.float(), self.normalize_bias), s_w * x.scale, 32)
        peak = self.accumulator_peak()
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


def split_form(terms: int, data_bits: int, parameter_bits: int) -> str:
    """Cut x into 8-bit pieces and w into p-bit pieces so that each partial product of ``terms`` terms is below 2^24."""
    pieces = max(1, data_bits // 8)
    top = 128 if pieces == 1 else 255
    width = next(p for p in (4, 2, 1) if p == 1 or terms * top * (2**p - 1) < FLOAT32_EXACT)
    return f"x{pieces}w{-(-max(parameter_bits, width) // width)}p{width}"


def requantize(acc: np.ndarray, scale_x: float, scale_w: float, scale_o: float, o_bits: int) -> np.ndarray:
    """Equation (2)."""
    return saturate(shift_round(acc, exponent(scale_x) + exponent(scale_w) - exponent(scale_o)), o_bits)


def output_bits(form: str) -> tuple[str, int]:
    """``"f32_o16"`` -> ``("f32", 16)``; the suffix is left out for 8 bits."""
    base, _, bits = form.partition("_o")
    return base, int(bits or 8)


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


def sum_body(form: str, product: str) -> tuple[str, str]:
    """Body of a weighted sum. ``product`` is an ONNX statement with {y}, {x}, {w} and {b} (", bias" or empty)."""
    base, bits = output_bits(form)
    if base == "f32":
        text = "Xf = Cast <to: int = 1> (X)\nWf = Cast <to: int = 1> (W)\nBf = Cast <to: int = 1> (B)\n"
        text += product.format(y="A", x="Xf", w="Wf", b=", Bf") + "\n" + multiplier_text()
        return "X, W, B", text + requant_text("A", "M", "Y", bits)
    n_x, rest = base[1:].split("w")
    n_w, width = (int(v) for v in rest.split("p"))
    text = "Xd = Cast <to: int = 11> (X)\nWd = Cast <to: int = 11> (W)\nBd = Cast <to: int = 11> (B)\n"
    text += split_text("Xd", "x", int(n_x), 8) + split_text("Wd", "w", n_w, width)
    total = ""
    for i in range(int(n_x)):
        for j in range(n_w):
            name = f"t{i}_{j}"
            text += product.format(y=f"{name}f", x=f"x{i}", w=f"w{j}", b="") + "\n"
            text += constants(**{f"{name}s": f"double {{{2 ** (8 * i + width * j)}}}"})
            text += f"{name}d = Cast <to: int = 11> ({name}f)\n{name} = Mul ({name}d, {name}s)\n"
            text += f"{name}a = Add ({total}, {name})\n" if total else ""
            total = f"{name}a" if total else name
    text += f"Bn = BiasShape (Bd)\nAcc = Add ({total}, Bn)\n" + multiplier_text(double=True)
    return "X, W, B", text + requant_text("Acc", "M", "Y", bits, double=True)
