"""Matrix product of two activations, or of an activation and a parameter that is no plain 2-d right factor.

    acc = sum over k of x[..., m, k] * y[..., k, n],   out = sat( rsh(acc, log2(s_x * s_y / s_o)) )    (1)

Leading axes are broadcast; the chip itself has 2-d and 3-d products of the same batch (``engine`` 2), which is what
``matmul`` brings every call to that allows it. Operands have 8 or 16 bits; wider ones are narrowed to 16.

|acc| <= K * 2^(b_x - 1) * 2^(b_y - 1) for K terms, by shape and width alone: below 2^24 the product is computed in float32,
else in float64, in PyTorch and in the file. Products of 8 bits are summed in 32 bits on the chip, those of 16 in 64 (its
vectors hold sums beyond 2^31), so the bound must stay below 2^31, and 2^53 with 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linger.errors import LingerError
from linger.numerics import FLOAT32_EXACT, exact_matmul, fake_quant, grid_of, quantize, scale_from_weight
from linger.ops._base import Op, output_bits, real_text
from linger.ops._case import Case, Holder
from linger.ops._lowered import Lowered, Operand
from linger.ops._site import Site
from linger.ops._weighted import requantize
from linger.ops._weighted_text import result_text
from linger.rounding import HALF_UP

WIDEST_OPERAND = 16


def product(x: Tensor, y: Tensor | None = None, *, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
    """(..., M, K) times (..., K, N): x and y, or x and what depends on parameters alone, on its ``left`` or ``right``."""
    other = right if left is None else left
    other = y if other is None else other
    assert other is not None
    return torch.matmul(other, x) if left is not None else torch.matmul(x, other)


class BmmSite(Site):
    """``torch.bmm`` and every call that comes down to it"""

    op_type = "BmmInt"
    learns = ("o",)
    parameter_names = ("left", "right")

    def operand_bits(self, bits: Sequence[int]) -> int:
        return min(super().operand_bits(bits), WIDEST_OPERAND)

    def held_bits(self, bits: int) -> int:
        """Width of a parameter next to an activation of ``bits`` bits: the chip multiplies equal widths."""
        return self.parameter_bits if bits == 8 else bits

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, left: Tensor | None = None, right: Tensor | None = None
    ) -> Tensor:
        bits = self.out_bits = self.operand_bits([g.bits for g in map(grid_of, (x, y)) if g is not None])
        first = self.operand(x, "x", bits)
        if y is not None:
            other, width = self.operand(y, "y", bits), bits
        else:
            other, width = self.held(right if left is None else left, bits), self.held_bits(bits)  # type: ignore[arg-type]
        (x, s_x), (y, s_y) = (first, other) if left is None else (other, first)
        exact = accumulator(x.shape[-1], bits, width) <= FLOAT32_EXACT
        return self.leave(torch.matmul(x, y) if exact else torch.matmul(x.double(), y.double()), s_x * s_y)

    def held(self, weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """A parameter on its grid, from its own maximum."""
        bits = self.held_bits(bits)
        scale = scale_from_weight(weight, bits)
        return fake_quant(weight.float(), scale, bits), scale

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        x, bits = operands[0], operands[0].bits
        side = next((name for name in self.parameter_names if call.get(name) is not None), None)
        sources: list[int | str] = [0, 1] if side is None else [0, side]
        scales, params, width = [x.scale, operands[-1].scale], {}, bits
        terms, open_ended = x.shape[-1], len(x.shape) - 1 in x.dynamic
        if side is not None:
            width = self.held_bits(bits)
            scales[1] = float(scale_from_weight(call[side], width))
            params[side] = quantize(*self.held(call[side], bits), width)
            terms, open_ended = call[side].shape[-1 if side == "left" else -2], False
        if side == "left":
            sources, scales = sources[::-1], scales[::-1]
        peak = accumulator(terms, bits, width)
        attrs = {
            "scale_x": scales[0],
            "scale_y": scales[1],
            "scale_o": out.scale,
            "data_bits": bits,
            "o_bits": out.bits,
        }
        form = "f32" if peak <= FLOAT32_EXACT and not open_ended else "f64"
        form += "" if out.bits == 8 else f"_o{out.bits}"
        return (
            Lowered(
                op_type=self.op_type, inputs=tuple(sources), attrs=attrs, params=params, bits=out.bits, form=form,
                peak=float(peak),
            ),
        )  # fmt: skip


def accumulator(terms: int, x_bits: int, y_bits: int) -> int:
    """The bound of |acc| for ``terms`` products.

    Raises:
        LingerError: the chip's accumulator may not hold it.
    """
    bound = int(terms) * 2 ** (x_bits - 1) * 2 ** (y_bits - 1)
    limit = 31 if max(x_bits, y_bits) <= 8 else 53
    if bound >= 2**limit:
        raise LingerError(
            f"a sum of {int(terms)} products of {x_bits} x {y_bits} bits may reach {bound}, allowed are {limit} bits "
            f"({2**limit - 1}); cut the inner dimension into parts and add their products"
        )
    return bound


def run(
    x: np.ndarray,
    y: np.ndarray,
    *,
    scale_x: float,
    scale_y: float,
    scale_o: float,
    o_bits: int = 0,
    rounding: str = HALF_UP,
    **_: Any,
) -> np.ndarray:
    """x (..., M, K), y (..., K, N) -> (..., M, N); equation (1). The result has the width of ``x`` unless ``o_bits`` is given."""
    return requantize(exact_matmul(x, y), scale_x, scale_y, scale_o, o_bits or 8 * x.dtype.itemsize, rounding)


def body(form: str, opset: int, rounding: str = HALF_UP) -> tuple[str, str]:
    base, bits = output_bits(form)
    double = base == "f64"
    text = "".join(f"{n}f = Cast <to: int = {11 if double else 1}> ({n})\n" for n in ("X", "Y0"))
    return "X, Y0", text + result_text("MatMul (Xf, Y0f)", double, bits, "scale_y", rounding)


CASES = (
    Case(name="bmm", make=lambda: torch.bmm, shapes=((2, 5, 8), (2, 8, 6))),
    Case(name="matmul-4d", make=lambda: lambda x, y: x @ y.mT, shapes=((2, 3, 4, 8), (2, 3, 5, 8))),
    Case(name="matmul-broadcast", make=lambda: torch.matmul, shapes=((2, 1, 4, 8), (2, 3, 8, 5))),
    Case(name="matmul-2d-right", make=lambda: lambda x, y: torch.matmul(x, other=y.sum(0)), shapes=((2, 7, 8), (2, 8, 5))),
    Case(name="matmul-vector", make=lambda: lambda x, y: x.matmul(y.sum(0)), shapes=((2, 3, 40), (2, 40))),
    Case(name="matmul-vector-left", make=lambda: lambda x, y: x.sum(0) @ y, shapes=((2, 9), (2, 9, 4))),
    Case(name="matmul-K1023", make=lambda: lambda x, y: x @ y.mT, shapes=((2, 3, 1023), (2, 2, 1023))),
    Case(name="matmul-K1024", make=lambda: lambda x, y: x @ y.mT, shapes=((2, 3, 1024), (2, 2, 1024))),
    Case(name="matmul-K4608", make=lambda: lambda x, y: x @ y.mT, shapes=((2, 3, 4608), (2, 2, 4608))),
    Case(name="matmul-dynamic-K", make=lambda: lambda x, y: x @ (x.mT @ y), shapes=((2, 9), (2, 5))),
    Case(name="matmul-parameter", make=lambda: Holder(lambda x, w: x @ w, (8, 5)), shapes=((2, 3, 8),)),
    Case(name="matmul-parameter-left", make=lambda: Holder(lambda x, w: w @ x, (4, 8)), shapes=((2, 8, 3),)),
    Case(name="matmul-parameter-3d", make=lambda: Holder(lambda x, w: x @ w, (3, 8, 5)), shapes=((2, 3, 4, 8),)),
    Case(name="matmul-parameter-vector", make=lambda: Holder(lambda x, w: x @ w, (8,)), shapes=((2, 3, 8),)),
    Case(
        name="addmm",
        make=lambda: Holder(lambda x, b, w: torch.addmm(b, x.reshape(-1, 8), w).reshape(-1, 3, 5), (5,), (8, 5)),
        shapes=((2, 3, 8),),
    ),
    Case(
        name="baddbmm",
        make=lambda: lambda b, x, y: torch.baddbmm(b, x, y, beta=0.5, alpha=2),
        shapes=((2, 4, 6), (2, 4, 8), (2, 8, 6)),
    ),
    Case(name="einsum", make=lambda: lambda x, y: torch.einsum("bhid,bjhd->bhij", x, y), shapes=((2, 3, 4, 8), (2, 5, 3, 8))),
    Case(name="einsum-free", make=lambda: lambda x, y: torch.einsum("b...ik,b...kj->b...ji", x, y), shapes=((2, 3, 4, 8), (2, 3, 8, 5))),
    Case(name="einsum-parameter", make=lambda: Holder(lambda x, w: torch.einsum("bnd,hdk->bhnk", x, w), (2, 8, 3)), shapes=((2, 5, 8),)),
    Case(name="einsum-no-sum", make=lambda: lambda x, y: torch.einsum("bi,bj->bij", x, y), shapes=((2, 15), (2, 16))),
)  # fmt: skip

OPS = (
    Op(name="BmmInt", run=run, body=body, real=real_text("Y = MatMul (X, Y0)"), integer=BmmSite, site="function_bmm",
       calls=(product,), aliases=("QBmm",)),
)  # fmt: skip
