"""Variance and standard deviation over dimensions: the exact rational, rounded once.

q are the N integers at scale s_x, at most 2^(b-1) in magnitude; c is the correction (1 for the unbiased variance).

    D = N * sum q^2 - (sum q)^2,  d = N * (N - c),  a = floor(D / d),  r = D - a * d                    (1)
    var: e = log2(s_o / s_x^2)
      e >= 0:  out = sat( a * 2^e + floor((2^(e+1) * r + d) / (2 d)) )                                  (2)
      e < 0:   out = sat( floor((a + 2^(-e-1)) / 2^-e) )                                                (3)
    std: g = 1 + log2(s_o / s_x),  F = floor(4^g * D / d) = a * 4^g + floor(4^g * r / d), for g < 0 floor(a / 4^-g)
      out = sat( floor((1 + floor(sqrt F)) / 2) )                                                       (4)

Both are the nearest integer, ties upwards: (3) because r / d < 1 cannot reach the next integer, (4) because
out <= s_o * std + 1/2 means (2 out - 1)^2 <= 4^g * D / d. N is at most 2^20 and N * 2^(b-1) at most 2^31; the output is
no finer than s_x^2 * 2^14 (var) or s_x * 2^8 (std), so that every term stays below 2^62, and F below 2^52.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from linger.errors import LingerError
from linger.numerics import Grid, exponent, levels, saturate, set_grid, straight_through
from linger.ops._base import ONNX_INT, Op, constants
from linger.ops._case import Case
from linger.ops._lowered import Lowered, Operand
from linger.ops._site import Site

WIDEST_SPREAD = 16  # bits of the input
COUNT, TOTAL = 2**20, 2**31  # the largest N, and N * 2^(b-1)
FINEST_VAR, FINEST_STD = 14, 8
FAR = 40  # a shift right by this much or more leaves nothing of a


@dataclass(frozen=True, kw_only=True)
class Spread:
    """What a call reduces: ``dims`` sorted and not negative, ``count`` elements, ``correction`` c."""

    dims: tuple[int, ...]
    count: int
    correction: float
    keepdim: bool


def said(
    shape: Sequence[int], dim: Any = None, unbiased: Any = None, keepdim: bool = False, correction: Any = None, **_: Any
) -> Spread:
    """The call's arguments in any of PyTorch's spellings; a bool in the place of ``dim`` is ``unbiased``."""
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    if correction is None:
        correction = 1 if unbiased is None else int(bool(unbiased))
    rank = len(shape)
    given = range(rank) if dim is None or dim == () else (dim,) if isinstance(dim, int) else tuple(dim)
    dims = tuple(sorted([int(d) % max(rank, 1) for d in given]))
    return Spread(
        dims=dims, count=math.prod([int(shape[d]) for d in dims]), correction=correction, keepdim=bool(keepdim)
    )


class _SpreadSite(Site):
    finest: ClassVar[int]

    @classmethod
    def takes(cls, x: Any = None, *args: Any, **call: Any) -> bool:
        spread = said(x.shape, **call)
        return float(spread.correction).is_integer() and spread.count > spread.correction and x.dim() > 0

    def operand_bits(self, bits: Sequence[int]) -> int:
        return min(super().operand_bits(bits), WIDEST_SPREAD)

    def forward(self, x: Tensor, **call: Any) -> Tensor:
        self.out_bits = bits = min(self.width(x), WIDEST_SPREAD)
        spread = said(x.shape, **call)
        check_count(spread.count, bits)
        x, s_x = self.operand(x, "x", bits)
        a, r, d = quotient(x, s_x, spread)
        found = self.found(a, r, d, self.unit(s_x.double()))
        self.observe("o", found)
        s_o = torch.minimum(self.scale("o", bits).double(), self.unit(s_x.double()) * 2.0**self.finest)
        out = self.rounded(a, r, d, s_o / self.unit(s_x.double())).double()
        ideal = self.ideal(x, spread) if torch.is_grad_enabled() else found
        return set_grid(straight_through(ideal, out, s_o, bits), Grid(s_o.float(), bits))

    @staticmethod
    def unit(s_x: Any) -> Any:
        """The scale at which the result is a rational of small terms."""
        raise NotImplementedError

    @staticmethod
    def found(a: Tensor, r: Tensor, d: int, unit: Tensor) -> Tensor:
        """The rational's value in float32."""
        raise NotImplementedError

    def ideal(self, x: Tensor, spread: Spread) -> Tensor:
        """The float function, for its gradient."""
        raise NotImplementedError

    @staticmethod
    def rounded(a: Tensor, r: Tensor, d: int, ratio: Tensor) -> Tensor:
        """Equations (2) to (4) on int64; ``ratio`` is the output scale in units, a power of two."""
        raise NotImplementedError

    def lower(self, operands: tuple[Operand, ...], out: Operand, call: Mapping[Any, Any]) -> tuple[Lowered, ...]:
        x = operands[0]
        spread = said(x.shape, **{k: v for k, v in call.items() if isinstance(k, str)})
        c = int(spread.correction)
        attrs = {
            "dims": spread.dims, "keepdim": int(spread.keepdim), "correction": c, "unbiased": int(c == 1),
            "scale_x": x.scale, "scale_o": out.scale, "data_bits": x.bits, "o_bits": out.bits,
        }  # fmt: skip
        if len(spread.dims) == 1:
            attrs["dim"] = spread.dims[0]
        ratio = exponent(out.scale / self.unit(x.scale))
        form = f"{spread.count} {c} {ratio} {out.bits} {len(spread.dims)}"
        return (Lowered(op_type=self.op_type, inputs=(0,), attrs=attrs, bits=out.bits, form=form),)


def check_count(count: int, bits: int) -> None:
    """Raise LingerError for more elements than equation (1) holds."""
    most = min(COUNT, TOTAL // 2 ** (bits - 1))
    if count > most:
        raise LingerError(
            f"found {count} elements, allowed are {most} at {bits} bits; reduce fewer dimensions or use fewer data_bits"
        )


@torch.no_grad()
def quotient(x: Tensor, s_x: Tensor, spread: Spread) -> tuple[Tensor, Tensor, int]:
    """Equation (1): a, r as int64, and d."""
    q = x.double() * s_x.double()
    total = q.sum(spread.dims, spread.keepdim).long()
    n = spread.count
    big = n * (q * q).sum(spread.dims, spread.keepdim).long() - total * total
    d = n * (n - int(spread.correction))
    a = big // d
    return a, big - a * d, d


def _up(ratio: Tensor) -> Tensor:
    return ratio.clamp_min(1).long()


def _down(ratio: Tensor) -> Tensor:
    return (1 / ratio).clamp(1, 2.0**FAR).long()


class VarSite(_SpreadSite):
    """``x.var(dim, unbiased, keepdim)``"""

    op_type = "iqVar"
    finest = FINEST_VAR

    @staticmethod
    def unit(s_x: Any) -> Any:
        return s_x * s_x

    @staticmethod
    def found(a: Tensor, r: Tensor, d: int, unit: Tensor) -> Tensor:
        return ((a + r.double() / d) / unit).float()

    def ideal(self, x: Tensor, spread: Spread) -> Tensor:
        return torch.var(x, spread.dims, correction=spread.correction, keepdim=spread.keepdim)

    @staticmethod
    def rounded(a: Tensor, r: Tensor, d: int, ratio: Tensor) -> Tensor:
        up, down = _up(ratio), _down(ratio)
        return torch.where(ratio < 1, (a + down // 2) // down, a * up + (2 * up * r + d) // (2 * d))


class StdSite(_SpreadSite):
    """``x.std(dim, unbiased, keepdim)``"""

    op_type = "iqStd"
    finest = FINEST_STD

    @staticmethod
    def unit(s_x: Any) -> Any:
        return s_x

    @staticmethod
    def found(a: Tensor, r: Tensor, d: int, unit: Tensor) -> Tensor:
        return (torch.sqrt(a + r.double() / d) / unit).float()

    def ideal(self, x: Tensor, spread: Spread) -> Tensor:
        return torch.std(x, spread.dims, correction=spread.correction, keepdim=spread.keepdim)

    @staticmethod
    def rounded(a: Tensor, r: Tensor, d: int, ratio: Tensor) -> Tensor:
        square = 4 * ratio * ratio
        up, down = _up(square), _down(square)
        f = torch.where(square < 1, a // down, a * up + up * r // d)
        root = torch.sqrt(f.double()).long()
        root = root - (root * root > f).long()
        root = root + ((root + 1) * (root + 1) <= f).long()
        return (root + 1) // 2


# --- NumPy


def _terms(x: np.ndarray, axes: tuple[int, ...], c: int, keepdim: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """Equation (1)."""
    q = x.astype(np.int64)
    n = math.prod(x.shape[axis] for axis in axes)
    total = q.sum(axis=axes, keepdims=keepdim)
    big = n * (q * q).sum(axis=axes, keepdims=keepdim) - total * total
    d = n * (n - c)
    return big // d, big % d, d


def _axes(dims: Any, dim: Any) -> tuple[int, ...]:
    return tuple(dims) if dims is not None else (int(dim),)


def run_var(
    x: np.ndarray, *, dims: tuple[int, ...] | None = None, dim: int | None = None, keepdim: int = 0, unbiased: int = 1,
    correction: int | None = None, scale_x: float, scale_o: float, o_bits: int = 0, **_: Any,
) -> np.ndarray:  # fmt: skip
    """Equations (1) to (3); upstream's file has ``dim`` and ``unbiased`` only."""
    c = unbiased if correction is None else correction
    a, r, d = _terms(x, _axes(dims, dim), c, bool(keepdim))
    e = exponent(scale_o) - 2 * exponent(scale_x)
    if e >= 0:
        out = (a << e) + ((r << (e + 1)) + d) // (2 * d)
    else:
        shift = min(-e, FAR)
        out = (a + (1 << (shift - 1))) >> shift
    return saturate(out, o_bits or 8 * x.dtype.itemsize)


def integer_sqrt(v: np.ndarray) -> np.ndarray:
    """floor(sqrt(v)) of int64 below 2^62, bit by bit from the top."""
    root = np.zeros_like(v)
    for k in range(30, -1, -1):
        trial = root + (1 << k)
        root = np.where(trial * trial <= v, trial, root)
    return root


def run_std(
    x: np.ndarray, *, dims: tuple[int, ...] | None = None, dim: int | None = None, keepdim: int = 0, unbiased: int = 1,
    correction: int | None = None, scale_x: float, scale_o: float, o_bits: int = 0, **_: Any,
) -> np.ndarray:  # fmt: skip
    """Equations (1), (4)."""
    c = unbiased if correction is None else correction
    a, r, d = _terms(x, _axes(dims, dim), c, bool(keepdim))
    g = 1 + exponent(scale_o) - exponent(scale_x)
    f = (a << 2 * g) + (r << 2 * g) // d if g >= 0 else a >> min(-2 * g, FAR)
    return saturate((integer_sqrt(f) + 1) // 2, o_bits or 8 * x.dtype.itemsize)


# --- ONNX text


def _reduced(op: str, source: str, result: str, opset: int, since: int, keep: str = "@keepdim") -> str:
    keepdims = f"keepdims: int = {keep}"
    if opset < since:
        return f"{result} = {op} <axes: ints = @dims, {keepdims}> ({source})\n"
    return f"{result}_a = Constant <value_ints: ints = @dims> ()\n{result} = {op} <{keepdims}> ({source}, {result}_a)\n"


def _body(rounded: Callable[[int, int], str]) -> Callable[[str, int], tuple[str, str]]:
    """Body from the statements that make int64 ``v`` out of ``a``, ``r`` for (ratio's exponent, d)."""

    def body(form: str, opset: int) -> tuple[str, str]:
        n, c, ratio, bits, _ = (int(v) for v in form.split(" "))
        d = n * (n - c)
        text = "Xd = Cast <to: int = 11> (X)\nXX = Mul (Xd, Xd)\n"
        text += _reduced("ReduceSum", "Xd", "S1d", opset, 13) + _reduced("ReduceSum", "XX", "S2d", opset, 13)
        text += "S1 = Cast <to: int = 7> (S1d)\nS2 = Cast <to: int = 7> (S2d)\n"
        text += constants(N=f"int64 {{{n}}}", d=f"int64 {{{d}}}", top=f"int64 {{{levels(bits)}}}")
        text += "NS2 = Mul (N, S2)\nS11 = Mul (S1, S1)\nD = Sub (NS2, S11)\na = Div (D, d)\nad = Mul (a, d)\nr = Sub (D, ad)\n"
        text += rounded(ratio, d) + "q = Min (v, top)\n"
        return "X", text + f"Y = Cast <to: int = {ONNX_INT[bits]}> (q)\n"

    return body


def _var_text(e: int, d: int) -> str:
    if e < 0:
        shift = min(-e, FAR)
        text = constants(half=f"int64 {{{2 ** (shift - 1)}}}", one=f"int64 {{{2**shift}}}")
        return text + "ah = Add (a, half)\nv = Div (ah, one)\n"
    text = constants(up=f"int64 {{{2**e}}}", up2=f"int64 {{{2 ** (e + 1)}}}", d2=f"int64 {{{2 * d}}}")
    return text + "au = Mul (a, up)\nru = Mul (r, up2)\nrd = Add (ru, d)\nf = Div (rd, d2)\nv = Add (au, f)\n"


def _std_text(ratio: int, d: int) -> str:
    g = ratio + 1
    if g < 0:
        text = constants(down=f"int64 {{{2 ** min(-2 * g, FAR)}}}") + "F = Div (a, down)\n"
    else:
        text = (
            constants(up=f"int64 {{{4**g}}}") + "au = Mul (a, up)\nru = Mul (r, up)\nf = Div (ru, d)\nF = Add (au, f)\n"
        )
    text += (
        constants(one="int64 {1}", two="int64 {2}")
        + "Fd = Cast <to: int = 11> (F)\nrd = Sqrt (Fd)\nr0 = Cast <to: int = 7> (rd)\n"
    )
    text += "s0 = Mul (r0, r0)\nm0 = Greater (s0, F)\ni0 = Cast <to: int = 7> (m0)\nr1 = Sub (r0, i0)\n"
    text += (
        "p1 = Add (r1, one)\ns1 = Mul (p1, p1)\nm1 = Greater (s1, F)\ni1 = Cast <to: int = 7> (m1)\nr2 = Sub (p1, i1)\n"
    )
    return text + "r3 = Add (r2, one)\nv = Div (r3, two)\n"


def _real(std: bool) -> Callable[[str, int], str]:
    def real(form: str, opset: int) -> str:
        n, c, *_ = (int(v) for v in form.split(" "))
        text = _reduced("ReduceMean", "X", "mean", opset, 18, "1") + "dx = Sub (X, mean)\ndd = Mul (dx, dx)\n"
        text += _reduced("ReduceMean", "dd", "b", opset, 18) + constants(u=f"float {{{n / (n - c)!r}}}")
        return text + ("bu = Mul (b, u)\nY = Sqrt (bu)\n" if std else "Y = Mul (b, u)\n")

    return real


NAMES = ("dim", "unbiased", "keepdim")

CASES = (
    Case(name="var", make=lambda: lambda x: x.var(-1), shapes=((4, 6, 10),)),
    Case(name="var-biased-keepdim", make=lambda: lambda x: torch.var(x, (1, 3), unbiased=False, keepdim=True), shapes=((2, 6, 5, 4),)),
    Case(name="var-correction", make=lambda: lambda x: torch.var(x, dim=1, correction=3), shapes=((3, 7, 11),)),
    Case(name="std", make=lambda: lambda x: x.std(2, False), shapes=((4, 6, 10),)),
    Case(name="std-keepdim", make=lambda: lambda x: torch.std(x, [1, 2], keepdim=True), shapes=((3, 5, 13),)),
    Case(name="var-mean", make=lambda: lambda x: torch.cat(torch.var_mean(x, 1, keepdim=True), 1), shapes=((3, 8, 5),)),
)  # fmt: skip

OPS = (
    Op(name="iqVar", run=run_var, body=_body(_var_text), real=_real(False), half_up=True, integer=VarSite, site="iqvar",
       calls=(torch.var, Tensor.var), names={torch.var: NAMES, Tensor.var: NAMES}),
    Op(name="iqStd", run=run_std, body=_body(_std_text), real=_real(True), half_up=True, integer=StdSite, site="iqstd",
       calls=(torch.std, Tensor.std), names={torch.std: NAMES, Tensor.std: NAMES}),
)  # fmt: skip
