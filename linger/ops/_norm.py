"""Normalization of rows by an integer reciprocal square root: what the chips' LayerNorm does (``engine`` 3).

q are the T integers of a row at scale s_x, at most 2^(b-1) in magnitude; the result has scale 2^10.

    S1 = sum q (0 for root-mean-square), S2 = sum q^2,  n = T * q - S1,  D = T * S2 - S1^2 + E          (1)
    E = floor( f32( f32(eps * T^2) * s_x^2 ) + 1/2 ),  eps and the two products rounded to float32      (2)
    h = how many of 4^0, 4^1 .. 4^31 are <= D,  m = floor(D * 4^(5 - h))  in 256 .. 1023                (3)
    r = min( floor(2^19 / sqrt(m)), 32767 )                                                             (4)
    y = sat( rsh(n * r, h + 4) )  to the chip's width                                                   (5)
    out = sat( rsh( sat32(y * w) + b, 10 + log2 s_w - log2 s_o ) ),  b at scale 2^10 * s_w              (6)

Where D is 0, every n is 0 and so is y. The integers of an input finer than ``Rows.finest`` are first rounded to that
scale, so that E < 2^61. With T * 2^(b-1) <= 2^31 (``LONGEST``) both products of (1) are at most 2^62 and D < 2^63; n * r
is below 2^48, an exact float64. The engine's eps is 1e-5 and its two products wrap at 32 bits, which can happen in rows of
more than 362 int8 elements (``Target.longest_row``); here they never wrap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from linger.errors import LingerError
from linger.numerics import exponent, levels
from linger.ops._base import constants, requant_text
from linger.ops._weighted import requantize

FRACTION = 10  # bits below the point of a normalized value
NORMAL = 2.0**FRACTION
LONGEST = 31  # log2 of the largest T * 2^(b-1)
STEPS = 32  # powers of four that D is compared with
SUM_LIMIT = 2**31  # of equation (6)
CHIP_EPS = float(np.float32(1e-5))


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How a tensor is cut into rows and what is computed on them.

    ``cut``: the shape with rows on the last axis. ``affine``: the shape in which weight and bias meet the tensor.
    ``keep``: leading axes of ``cut`` and of the tensor whose size the file takes from its input.
    """

    length: int
    eps: float
    cut: tuple[int, ...]
    affine: tuple[int, ...]
    keep: int
    centred: bool = True

    @property
    def finest(self) -> float:
        """The largest power of two s with eps * T^2 * s^2 <= 2^60; 2^100 without eps."""
        if self.eps == 0:
            return 2.0**100
        return float(2.0 ** ((60 - math.frexp(self.eps * self.length * self.length)[1]) // 2))


def check_rows(length: int, bits: int, eps: float) -> None:
    """Raise LingerError for rows whose sums do not fit, or an eps that has no meaning."""
    if length * 2 ** (bits - 1) > 2**LONGEST:
        raise LingerError(
            f"found rows of {length} elements, allowed are {2 ** (LONGEST - bits + 1)} at {bits} bits; "
            "normalize over fewer elements or use fewer data_bits"
        )
    if not eps >= 0:
        raise LingerError(f"eps is {eps}, allowed are numbers from 0; change it")


# --- PyTorch: float64 holding integers, int64 for D; on the device, without a look at values


@torch.no_grad()
def normalized(x: Tensor, scale: Tensor, rows: Rows, bits: int) -> Tensor:
    """Equations (1) to (5): x on a grid of ``scale`` -> integers y in float64, of the shape of x; ``bits`` of the chip.

    q * T and S1 are multiplied by r / 2^(h + 4) one by one: both products, their difference and the half are multiples
    of 2^-(h + 4) below 2^48 of them, hence exact.
    """
    s_x = scale.float().clamp_max(rows.finest)
    q = torch.addcmul(s_x.new_full((), 0.5), x, s_x).floor_().reshape(rows.cut).double()
    squares = (q * q).sum(-1, keepdim=True).long()
    d = rows.length * squares + (eps_term(s_x, rows) if rows.eps else 0)
    if rows.centred:
        total = q.sum(-1, keepdim=True)
        f = factor(d - total.long() * total.long())
        y = torch.addcmul(0.5 - total * f, q, rows.length * f).floor_()
    else:
        y = torch.addcmul(q.new_full((), 0.5), q, rows.length * factor(d)).floor_()
    y = y.reshape(x.shape)
    return y if bits >= 32 else y.clamp_(-levels(bits) - 1, levels(bits))


def eps_term(s_x: Tensor, rows: Rows) -> Tensor:
    """Equation (2) for a 0-d float32 scale, as int64."""
    product = s_x.new_full((), rows.eps) * float(rows.length * rows.length) * s_x * s_x
    return torch.floor(product.double() + 0.5).long()


def factor(d: Tensor) -> Tensor:
    """r / 2^(h + 4) of equations (3), (4) for int64 D >= 0, in float64."""
    one = torch.ones((), dtype=torch.int64, device=d.device)
    powers = one << torch.arange(0, 2 * STEPS, 2, device=d.device)
    h = torch.bucketize(d, powers, right=True)
    m = (d << (10 - 2 * h).clamp_min(0)) >> (2 * h - 10).clamp_min(0)
    r = torch.floor(torch.sqrt(2.0**38 / m.clamp_min(256).double())).clamp_max(32767)
    return r / (one << (h + 4)).double()


# --- NumPy int64, an independent text


@cache
def reciprocals() -> np.ndarray:
    """Equation (4) for m = 256 .. 1023 in whole numbers: floor(sqrt(2^38 / m)), at most 32767; int64 (768,)."""
    return np.array([min(math.isqrt(2**38 // m), 32767) for m in range(256, 1024)], np.int64)


def eps_integer(eps: float, length: int, scale_x: float) -> int:
    """Equation (2)."""
    product = np.float32(eps) * np.float32(length * length) * np.float32(scale_x) * np.float32(scale_x)
    return math.floor(float(product) + 0.5)


def run_rows(x: np.ndarray, *, scale_x: float, eps: float, centred: bool, bits: int) -> np.ndarray:
    """Equations (1) to (5) on integers whose last axis is a row; int64 of the same shape."""
    q = x.astype(np.int64)
    length = q.shape[-1]
    total = q.sum(-1, keepdims=True) if centred else np.zeros((*q.shape[:-1], 1), np.int64)
    d = length * (q * q).sum(-1, keepdims=True) - total * total + eps_integer(eps, length, scale_x)
    length_in_bits = sum((d >> k > 0).astype(np.int64) for k in range(63))
    h = (length_in_bits + 1) // 2
    m = np.where(h < 5, d << np.maximum(10 - 2 * h, 0), d >> np.maximum(2 * h - 10, 0))
    product = (length * q - total) * reciprocals()[np.maximum(m, 256) - 256]
    y = (product + (np.int64(1) << (h + 3))) >> (h + 4)
    return np.clip(y, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def run_affine(y: np.ndarray, w: np.ndarray, b: np.ndarray, scale_w: float, scale_o: float, bits: int) -> np.ndarray:
    """Equation (6); the three arrays broadcast."""
    product = np.clip(y * w.astype(np.int64), -SUM_LIMIT, SUM_LIMIT - 1)
    return requantize(product + b.astype(np.int64), NORMAL, scale_w, scale_o, bits)


# --- ONNX text


def form_of(rows: Rows, scale_x: float, normal_bits: int, out_bits: int) -> str:
    """All that the text depends on."""
    cut = [0 if i < rows.keep else n for i, n in enumerate(rows.cut)]
    lists = (",".join(map(str, v)) for v in (cut, rows.affine))
    kind = "centred" if rows.centred else "plain"
    eps = float(np.float32(rows.eps))
    numbers = (rows.length, repr(eps), exponent(scale_x), normal_bits, out_bits)
    return " ".join([kind, *lists, *map(str, numbers)])


def _ints(name: str, values: str) -> str:
    return f"{name} = Constant <value = int64[{len(values.split(','))}] {{{values}}}> ()\n"


def _reduced(op: str, source: str, result: str, opset: int, since: int) -> str:
    """``op`` over the last axis; before opset ``since`` the axes are an attribute."""
    if opset < since:
        return f"{result} = {op} <axes = [-1], keepdims = 1> ({source})\n"
    return f"{result} = {op} <keepdims = 1> ({source}, last)\n"


def _table(name: str, values: list[float] | list[int], kind: str) -> str:
    return f"{name} = Constant <value = {kind}[{len(values)}] {{{', '.join(map(str, values))}}}> ()\n"


def _cut_text(cut: str, affine: str) -> str:
    """``Xr`` with rows on the last axis, ``Wr`` and ``Br`` as they meet the tensor; all of X's type."""
    text = "shape = Shape (Xf)\n" + _ints("last", "-1") + _ints("cut", cut) + _ints("affine", affine)
    return text + "Xr = Reshape (Xf, cut)\nWr = Reshape (Wf, affine)\nBr = Reshape (Bf, affine)\n"


def body(form: str, opset: int) -> tuple[str, str]:
    """Rows in float64, D in int64: everything is an exact integer."""
    kind, cut, affine, length, eps, q_x, normal_bits, bits = form.split(" ")
    text = "".join(f"{n}f = Cast <to: int = 11> ({n})\n" for n in "XWB") + _cut_text(cut, affine)
    text += "square = Mul (Xr, Xr)\n" + _reduced("ReduceSum", "square", "S2d", opset, 13)
    e = eps_integer(float(eps), int(length), 2.0 ** int(q_x))
    text += constants(T=f"int64 {{{length}}}", E=f"int64 {{{e}}}", Td=f"double {{{length}}}", half="double {0.5}")
    text += "S2 = Cast <to: int = 7> (S2d)\nTS2 = Mul (T, S2)\nDe = Add (TS2, E)\nTX = Mul (Td, Xr)\n"
    if kind == "centred":
        text += _reduced("ReduceSum", "Xr", "S1d", opset, 13) + "S1 = Cast <to: int = 7> (S1d)\n"
        text += "S11 = Mul (S1, S1)\nD = Sub (De, S11)\nn = Sub (TX, S1d)\n"
    else:
        text += "D = Identity (De)\nn = Identity (TX)\n"
    text += (
        _factor_text(opset) + "nr = Mul (n, factor)\nnrh = Add (nr, half)\nyr = Floor (nrh)\ny0 = Reshape (yr, shape)\n"
    )
    if int(normal_bits) < 32:
        top = 2 ** (int(normal_bits) - 1)
        text += constants(low=f"double {{{-top}}}", high=f"double {{{top - 1}}}") + "y = Clip (y0, low, high)\n"
    else:
        text += "y = Identity (y0)\n"
    return "X, W, B", text + _affine_text(int(bits))


def _factor_text(opset: int) -> str:
    """``factor`` = r / 2^(h + 4) of int64 ``D``: equations (3), (4)."""
    text = _table("below", [4**k - 1 for k in range(STEPS)], "int64") + "reached = Greater (D, below)\n"
    text += "one = Cast <to: int = 7> (reached)\n" + _reduced("ReduceSum", "one", "h", opset, 13)
    text += _table("ups", [4 ** max(5 - h, 0) for h in range(STEPS + 1)], "int64")
    text += _table("downs", [4 ** max(h - 5, 0) for h in range(STEPS + 1)], "int64")
    text += "up = Gather (ups, h)\ndown = Gather (downs, h)\nDup = Mul (D, up)\nm = Div (Dup, down)\n"
    text += constants(least="int64 {256}") + "mc = Max (m, least)\ni = Sub (mc, least)\n"
    text += _table("roots", [int(v) for v in reciprocals()], "double") + "r = Gather (roots, i)\n"
    text += _table("shifts", [2.0 ** -(h + 4) for h in range(STEPS + 1)], "double")
    return text + "s = Gather (shifts, h)\nfactor = Mul (r, s)\n"


def _affine_text(bits: int) -> str:
    """Equation (6) of double ``y``."""
    text = constants(lo32=f"double {{{-SUM_LIMIT}}}", hi32=f"double {{{SUM_LIMIT - 1}}}")
    text += "yw = Mul (y, Wr)\nyc = Clip (yw, lo32, hi32)\nA = Add (yc, Br)\n"
    text += constants(sw="@scale_w", so="@scale_o", one10=f"float {{{NORMAL}}}") + "s10 = Mul (sw, one10)\n"
    text += "Mf = Div (so, s10)\nM = Cast <to: int = 11> (Mf)\n"
    return text + requant_text("A", "M", "Y", bits, double=True)


def real(form: str, opset: int) -> str:
    """The same normalization on floats."""
    kind, cut, affine, _, eps, *_ = form.split(" ")
    text = "".join(f"{n}f = Identity ({n})\n" for n in "XWB") + _cut_text(cut, affine)
    if kind == "centred":
        text += _reduced("ReduceMean", "Xr", "mean", opset, 18) + "c = Sub (Xr, mean)\n"
    else:
        text += "c = Identity (Xr)\n"
    text += "cc = Mul (c, c)\n" + _reduced("ReduceMean", "cc", "v", opset, 18) + constants(eps=f"float {{{eps}}}")
    text += "ve = Add (v, eps)\nd = Sqrt (ve)\nyr = Div (c, d)\ny = Reshape (yr, shape)\n"
    return text + "yw = Mul (y, Wr)\nY = Add (yw, Br)\n"
