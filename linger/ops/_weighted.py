"""Layers and calls whose accumulator is a weighted sum: convolution, transposed convolution, linear.

acc = sum(q_x * q_w) + q_b,   q_b = round(b * s_x * s_w) as int32                                  (1)
out = saturate(shift_round(acc, log2(s_x * s_w / s_o)))                                            (2)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

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
from linger.ops._constant import constant_of
from linger.ops._lowered import Lowered, Operand
from linger.ops._site import Site


class Product(Protocol):
    """How a weighted sum multiplies: everything but its weight and bias."""

    def accumulate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product; exact on the values it is given."""

    def absolute_sum(self, weight: Tensor) -> Tensor:
        """sum|w| per output, shape (out,): how far one output's accumulator can go for inputs of magnitude 1."""

    def attrs(self, weight: tuple[int, ...]) -> dict[str, Any]:
        """Strides, pads and the like, under the engine's names, for a weight of this shape."""

    def wide_form(self, weight: tuple[int, ...], data_bits: int, parameter_bits: int) -> str:
        """Name of the body that is exact beyond 2^24."""


class WeightedSum(IntModule):
    """Equations (1) and (2) on a weight and a bias that are handed in."""

    weighted: ClassVar[bool] = True
    op_type: ClassVar[str]

    def grids(self, weight: Tensor, bias: Tensor | None, s_x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Weight and bias within their bounds on their grids for an input of scale ``s_x``, and the scale of the weight."""
        weight = bound_parameter(weight.float(), self.normalize_weight)
        bias = None if bias is None else bound_parameter(bias.float(), self.normalize_bias)
        return on_grids(weight, bias, s_x, self.parameter_bits)

    def weighted_sum(self, product: Product, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer: ``x`` quantized where it has no grid, multiplied exactly, and put on the output's grid."""
        x, s_x = self.enter(x)
        self.prove(s_x, product, weight, bias)
        w, b, s_w = self.grids(weight, bias, s_x)
        finest = s_x * s_w
        if self.out_bits == 32:
            finest = room_for_sum(finest, self.bound(product, w, s_w, b, finest))
        if not self.exact_in_float32:
            x, w, b = x.double(), w.double(), None if b is None else b.double()
        return self.leave(product.accumulate(x, w, b), finest)

    def bound(self, product: Product, w: Tensor, s_w: Tensor, b: Tensor | None, s_acc: Tensor) -> Tensor:
        """max over outputs of sum|q_w| * max|q_x| + |q_b|, in LSB, computed in float64 (shape [])."""
        peak = product.absolute_sum(w.detach().double()) * s_w * reach(self.data_bits)
        if b is not None:
            peak = peak + b.detach().double().abs() * s_acc
        return peak.amax().float()

    @torch.no_grad()
    def accumulator_peak(self, s_x: Tensor, *given: Any) -> float:
        """``given``: the product, weight and bias."""
        product, weight, bias = given
        w, b, s_w = self.grids(weight, bias, s_x)
        return float(self.bound(product, w, s_w, b, s_x * s_w))

    @torch.no_grad()
    def nodes(
        self, product: Product, x: Operand, out: Operand, weight: Tensor, bias: Tensor | None, names: Mapping[str, str]
    ) -> tuple[Lowered, ...]:
        """The node that computes the same integers; ``names`` are those of the stored weight and bias."""
        s_x = torch.tensor(x.scale, device=weight.device)
        w, b, s_w = self.grids(weight, bias, s_x)
        q_b = np.zeros(len(product.absolute_sum(w)), np.int32) if b is None else quantize(b, s_x * s_w, 32)
        attrs = {
            **product.attrs(tuple(weight.shape)),
            "data_bits": x.bits,
            "parameter_bits": self.parameter_bits,
            "o_bits": out.bits,
            "scale_x": x.scale,
            "scale_w": float(s_w),
            "scale_o": out.scale,
        }
        peak = float(self.bound(product, w, s_w, b, s_x * s_w))
        wide = product.wide_form(tuple(weight.shape), x.bits, self.parameter_bits)
        form = ("f32" if peak < FLOAT32_EXACT else wide) + ("" if out.bits == 8 else f"_o{out.bits}")
        return (
            Lowered(
                op_type=self.op_type, inputs=(0, "weight", "bias"), attrs=attrs, bits=out.bits, form=form, peak=peak,
                params={"weight": quantize(w, s_w, self.parameter_bits), "bias": q_b}, names=names,
            ),
        )  # fmt: skip


class WeightedInt(WeightedSum):
    """Fixed-point twin of a layer with ``weight`` and ``bias``; the subclass says how to multiply."""

    weight: Tensor
    bias: Tensor | None

    def product(self) -> Product:
        """The layer's own strides, pads and the like."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.weighted_sum(self.product(), x, self.weight, self.bias)

    @torch.no_grad()
    def derived(self) -> dict[str, Tensor]:
        s_w = self.grids(self.weight, self.bias, self.scale("x", self.data_bits))[2]
        return super().derived() | {"scale_w": s_w, "running_w": levels(self.parameter_bits) / s_w}

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        return self.nodes(self.product(), operands[0], out, self.weight, self.bias, {})


class WeightedSite(WeightedSum, Site):
    """The functional call of such a layer: weight and bias are parameters or buffers of the net, or computed from them.

    Widths are those given to ``init``, as for the layer.
    """

    observed: ClassVar[tuple[str, ...]] = ("x", "o")

    @classmethod
    def takes(cls, x: Any, weight: Any = None, bias: Any = None, **call: Any) -> bool:
        return all(constant_of(t) is not None for t in (weight, bias) if t is not None)

    @staticmethod
    def product(weight: tuple[int, ...], call: Mapping[str, Any]) -> Product:
        """What the call's other arguments say, for a weight of this shape."""
        raise NotImplementedError

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, **call: Any) -> Tensor:
        return self.weighted_sum(self.product(tuple(weight.shape), call), x, weight, bias)

    def weights_at(self, call: Mapping[Any, Any]) -> frozenset[int]:
        return frozenset((1, 2))

    def operand_bits(self, bits: Sequence[int]) -> int:
        return self.data_bits

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        x, *held = operands
        tensors = [o.tensor for o in held]
        weight, bias = tensors[0], tensors[1] if len(tensors) > 1 else None
        assert weight is not None
        names = {key: o.name for key, o in zip(("weight", "bias"), held, strict=False) if o.name}
        product = self.product(tuple(weight.shape), {k: v for k, v in call.items() if isinstance(k, str)})
        return self.nodes(product, x, out, weight, bias, names)


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


def multiplier_text(double: bool = False, second: str = "scale_w") -> str:
    """Statements for ``M`` = s_o / (s_x * s_w), exact because all are powers of two."""
    text = constants(sx="@scale_x", sw=f"@{second}", so="@scale_o") + "sxw = Mul (sx, sw)\n"
    return text + ("Mf = Div (so, sxw)\nM = Cast <to: int = 11> (Mf)\n" if double else "M = Div (so, sxw)\n")


def result_text(accumulator: str, double: bool, bits: int, second: str = "scale_w") -> str:
    """Equation (2) of an ``accumulator`` statement that is exact in float (or double); results above 16 bits need double.

    ``second``: the attribute that holds the second factor's scale.
    """
    if double or bits <= 16:
        return f"A = {accumulator}\n" + multiplier_text(double, second) + requant_text("A", "M", "Y", bits, double)
    text = f"S = {accumulator}\nA = Cast <to: int = 11> (S)\n"
    return text + multiplier_text(True, second) + requant_text("A", "M", "Y", bits, double=True)


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
