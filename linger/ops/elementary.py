"""Elementary functions and powers: tables in the form of ``ops/_unary``, whose equation (1) they follow.

log, log2, sqrt and rsqrt of a negative number are those of 0. So log and log2 are the lowest level there, rsqrt the
highest, sqrt 0; 1 / 0 is the highest level. The slope is 0 wherever f is infinite or constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linger.ops._unary import Function, UnarySite, nodes_only, table_case, unary

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _above_0(v: Tensor, slope: Tensor) -> Tensor:
    """``slope`` where v > 0, else 0."""
    return torch.where(v > 0, slope, 0.0)


def _root_line(v: Tensor) -> Tensor:
    """The root to 24 bits: exact where the root has no more, whatever the last bit of a library's root is."""
    return v.clamp_min(0).sqrt().float().double()


def _root_rest(v: Tensor) -> Tensor:
    """root - line = (v - line^2) / (root + line), the numerator exact."""
    line = _root_line(v)
    return torch.where(v > 0, (v - line * line) / (v.sqrt() + line), 0.0)


def _root(v: Tensor) -> Tensor:
    return _root_line(v) + _root_rest(v)


def _root_numpy(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    root = np.sqrt(np.maximum(v, 0))
    line = root.astype(np.float32).astype(np.float64)
    return line, np.where(v > 0, (v - line**2) / (root + line), 0)


def _log2_line(v: Tensor) -> Tensor:
    """floor(log2 v)"""
    return torch.frexp(v.clamp_min(0))[1].double() - 1


def _log2_rest(v: Tensor) -> Tensor:
    """log2 of v / 2^line, which is in 1 .. 2: exactly 0 for a power of two in every library."""
    mantissa, _ = torch.frexp(v.clamp_min(0))
    return torch.log(2 * mantissa) / math.log(2)


def _log2_numpy(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mantissa, n = np.frexp(np.maximum(v, 0))
    return n - 1.0, np.log2(mantissa + mantissa)


EXP = Function(
    op_type="iqExp", real="Y = Exp (X)",
    rest=torch.exp,
    slope=torch.exp,
    numpy=lambda v: (0.0, np.exp(v)),
)  # fmt: skip
LOG = Function(
    op_type="iqLog", real="Y = Log (X)",
    rest=lambda v: v.clamp_min(0).log(),
    slope=lambda v: _above_0(v, 1 / v),
    numpy=lambda v: (0.0, np.log(np.maximum(v, 0))),
)  # fmt: skip
LOG2 = Function(
    op_type="iqLog2", real="n = Log (X)\nc = Constant <value = float {1.442695}> ()\nY = Mul (n, c)",
    line=_log2_line,
    rest=_log2_rest,
    slope=lambda v: _above_0(v, 1 / (v * math.log(2))),
    numpy=_log2_numpy,
)  # fmt: skip
ERF = Function(
    op_type="iqErf", fixed=1, real="Y = Erf (X)",
    rest=torch.special.erf,
    slope=lambda v: torch.exp(-v.square()) * (2 / math.sqrt(math.pi)),
    numpy=lambda v: (0.0, _erf(v)),
)  # fmt: skip
SIN = Function(
    op_type="iqSin", fixed=1, real="Y = Sin (X)",
    rest=torch.sin,
    slope=torch.cos,
    numpy=lambda v: (0.0, np.sin(v)),
)  # fmt: skip
COS = Function(
    op_type="iqCos", fixed=1, real="Y = Cos (X)",
    line=torch.ones_like,
    rest=lambda v: -2 * torch.sin(v / 2).square(),
    slope=lambda v: -torch.sin(v),
    numpy=lambda v: (1.0, -2 * np.sin(v / 2) ** 2),
)  # fmt: skip
SQUARE = Function(
    op_type="iqSquare", real="Y = Mul (X, X)",
    rest=torch.square,
    slope=lambda v: 2 * v,
    numpy=lambda v: (0.0, v * v),
)  # fmt: skip
CUBE = Function(
    op_type="iqCube", real="s = Mul (X, X)\nY = Mul (X, s)",
    rest=lambda v: v * v * v,
    slope=lambda v: 3 * v * v,
    numpy=lambda v: (0.0, v**3),
)  # fmt: skip
SQRT = Function(
    op_type="iqSqrt", real="Y = Sqrt (X)",
    line=_root_line,
    rest=_root_rest,
    slope=lambda v: _above_0(v, 0.5 / _root(v)),
    numpy=_root_numpy,
)  # fmt: skip
RSQRT = Function(
    op_type="iqRsqrt", real="s = Sqrt (X)\nY = Reciprocal (s)",
    rest=lambda v: 1 / _root(v),
    slope=lambda v: _above_0(v, -0.5 / (v * _root(v))),
    numpy=lambda v: (0.0, 1 / np.add(*_root_numpy(v))),
)  # fmt: skip
RECIPROCAL = Function(
    op_type="iqReciprocal", pole=True, real="Y = Reciprocal (X)",
    rest=torch.reciprocal,
    slope=lambda v: torch.where(v != 0, -1 / v.square(), 0.0),
    numpy=lambda v: (0.0, 1 / v),
)  # fmt: skip


class ExpSite(UnarySite, function=EXP):
    """``torch.exp``"""


class LogSite(UnarySite, function=LOG):
    """``torch.log``"""


class Log2Site(UnarySite, function=LOG2):
    """``torch.log2``"""


class ErfSite(UnarySite, function=ERF):
    """``torch.erf``"""


class SinSite(UnarySite, function=SIN):
    """``torch.sin``"""


class CosSite(UnarySite, function=COS):
    """``torch.cos``"""


class SquareSite(UnarySite, function=SQUARE):
    """``torch.square``"""


class SqrtSite(UnarySite, function=SQRT):
    """``torch.sqrt``"""


class RsqrtSite(UnarySite, function=RSQRT):
    """``torch.rsqrt``"""


class ReciprocalSite(UnarySite, function=RECIPROCAL):
    """``torch.reciprocal``"""


class PowSite(UnarySite):
    """``x ** exponent`` for the exponents that are functions of this file; another one is a float island."""

    functions: Mapping[Any, Function] = {2: SQUARE, 3: CUBE, 0.5: SQRT, -0.5: RSQRT, -1: RECIPROCAL}
    by = "exponent"


CASES = (
    table_case("exp", lambda: torch.exp),
    table_case("log", lambda: lambda x: torch.log(x.clamp_min(0.5))),
    table_case("log2", lambda: lambda x: x.clamp_min(0.5).log2()),
    table_case("erf", lambda: torch.erf),
    table_case("sin", lambda: torch.sin),
    table_case("cos", lambda: torch.cos),
    table_case("square", lambda: torch.square),
    table_case("cube", lambda: lambda x: x**3),
    table_case("sqrt", lambda: lambda x: torch.sqrt(x.clamp_min(0.25))),
    table_case("rsqrt", lambda: lambda x: torch.rsqrt(x.clamp_min(0.25))),
    table_case("reciprocal", lambda: torch.reciprocal, divisor=True),
    table_case("pow", lambda: lambda x: torch.pow(x, exponent=-1), divisor=True),
)

OPS = (
    unary(ExpSite, (torch.exp, Tensor.exp, torch.exp_, Tensor.exp_)),
    unary(LogSite, (torch.log, Tensor.log, torch.log_, Tensor.log_)),
    unary(Log2Site, (torch.log2, Tensor.log2, torch.log2_, Tensor.log2_)),
    unary(ErfSite, (torch.erf, Tensor.erf, torch.erf_, Tensor.erf_, torch.special.erf)),
    unary(SinSite, (torch.sin, Tensor.sin, torch.sin_, Tensor.sin_)),
    unary(CosSite, (torch.cos, Tensor.cos, torch.cos_, Tensor.cos_)),
    unary(SquareSite, (torch.square, Tensor.square, torch.square_, Tensor.square_)),
    unary(SqrtSite, (torch.sqrt, Tensor.sqrt, torch.sqrt_, Tensor.sqrt_)),
    unary(RsqrtSite, (torch.rsqrt, Tensor.rsqrt, torch.rsqrt_, Tensor.rsqrt_)),
    unary(ReciprocalSite, (torch.reciprocal, Tensor.reciprocal, torch.reciprocal_, Tensor.reciprocal_)),
    unary(PowSite, (torch.pow, Tensor.pow, Tensor.pow_), tag="iqpow"),
    nodes_only(CUBE),
)  # fmt: skip
