"""Activations: tables in the form of ``ops/_unary``, whose equations (1) and (2) they follow.

Sigmoid and tanh are the chip's own functions on every chip, SiLU and GELU (in its erf form) on venusA.
A gate has the fixed output scale 2^(bits - 1): its 1 is 127/128 in 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linger.ops._case import Case
from linger.ops._unary import TINY, Function, UnarySite, nodes_only, table_case, unary

ROOT_HALF, ROOT_TWO_PI = math.sqrt(0.5), math.sqrt(2 * math.pi)
SELU_SCALE, SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
GELU_CUBE, GELU_INNER = 0.044715, math.sqrt(2 / math.pi)

_erfc = np.vectorize(math.erfc, otypes=[np.float64])


# --- gates


def _sigmoid(v: np.ndarray) -> Any:
    return 1 / (1 + np.exp(-v))


SIGMOID = Function(
    op_type="iqSigmoid", fixed=1, real="Y = Sigmoid (X)",
    rest=torch.sigmoid,
    slope=lambda v: torch.sigmoid(v) * torch.sigmoid(-v),
    numpy=lambda v: (0.0, _sigmoid(v)),
)  # fmt: skip
TANH = Function(
    op_type="iqTanh", fixed=1, real="Y = Tanh (X)",
    rest=torch.tanh,
    slope=lambda v: 1 - torch.tanh(v).square(),
    numpy=lambda v: (0.0, np.tanh(v)),
)  # fmt: skip
HARDSIGMOID = Function(
    op_type="iqHardsigmoid", fixed=1, real="Y = HardSigmoid <alpha: float = 0.16666667, beta: float = 0.5> (X)",
    rest=lambda v: (v + 3).clamp(0, 6) / 6,
    slope=lambda v: (v.abs() < 3).to(v) / 6,
    numpy=lambda v: (0.0, np.clip(v + 3, 0, 6) / 6),
)  # fmt: skip
SOFTSIGN = Function(
    op_type="iqSoftsign", fixed=1, real="Y = Softsign (X)",
    rest=lambda v: v / (1 + v.abs()),
    slope=lambda v: (1 + v.abs()).pow(-2),
    numpy=lambda v: (0.0, v / (1 + np.abs(v))),
)  # fmt: skip


class SigmoidSite(UnarySite, function=SIGMOID):
    """``torch.sigmoid``"""


class TanhSite(UnarySite, function=TANH):
    """``torch.tanh``"""


class HardsigmoidSite(UnarySite, function=HARDSIGMOID):
    """``F.hardsigmoid``"""


class SoftsignSite(UnarySite, function=SOFTSIGN):
    """``F.softsign``"""


# --- piecewise linear


def _threshold_numpy(v: np.ndarray, threshold: float, value: float) -> tuple[float, np.ndarray]:
    return 0.0, np.where(v <= threshold, value, v)


LEAKY_RELU = Function(
    op_type="iqLeakyRelu", numbers={"negative_slope": 0.01}, real="Y = LeakyRelu <alpha: float = @negative_slope> (X)",
    rest=lambda v, negative_slope: torch.where(v > 0, v, v * negative_slope),
    slope=lambda v, negative_slope: torch.where(v > 0, 1.0, negative_slope).to(v),
    numpy=lambda v, negative_slope: (0.0, np.where(v < 0, negative_slope * v, v)),
)  # fmt: skip
THRESHOLD = Function(
    op_type="iqThreshold", numbers={"threshold": 0.0, "value": 0.0},
    real="t = Constant <value_float: float = @threshold> ()\nv = Constant <value_float: float = @value> ()\n"
         "above = Greater (X, t)\nY = Where (above, X, v)",
    rest=lambda v, threshold, value: torch.where(v > threshold, v, value),
    slope=lambda v, threshold, value: (v > threshold).to(v),
    numpy=_threshold_numpy,
)  # fmt: skip
HARDSWISH = Function(
    op_type="iqHardswish",
    real="gate = HardSigmoid <alpha: float = 0.16666667, beta: float = 0.5> (X)\nY = Mul (X, gate)",
    rest=lambda v: v * (v + 3).clamp(0, 6) / 6,
    slope=lambda v: torch.where(v.abs() < 3, v / 3 + 0.5, (v > 0).to(v)),
    numpy=lambda v: (0.0, np.where(v >= 3, v, np.where(v > -3, v * (v + 3) / 6, 0))),
)  # fmt: skip


class LeakyReluSite(UnarySite, function=LEAKY_RELU):
    """``F.leaky_relu``"""


class ThresholdSite(UnarySite, function=THRESHOLD):
    """``F.threshold``"""


class HardswishSite(UnarySite, function=HARDSWISH):
    """``F.hardswish``"""


# --- exponential below 0, where the function approaches -alpha


def _elu_line(v: Tensor, alpha: float) -> Tensor:
    return torch.where(v > 0, v, torch.where(v < -1, -alpha, 0.0))


def _below(u: Tensor) -> Tensor:
    """e^u - 1, without its -1 where that is in the line."""
    return torch.where(u < -1, torch.exp(u), torch.expm1(u))


def _elu_numpy(v: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    line = np.select([v > 0, v < -1], [v, np.full_like(v, -alpha)], 0.0)
    return line, alpha * np.select([v > 0, v < -1], [0 * v, np.exp(v)], np.expm1(v))


def _celu_numpy(v: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    u = v / alpha
    line = np.select([v > 0, u < -1], [v, np.full_like(v, -alpha)], 0.0)
    return line, alpha * np.select([v > 0, u < -1], [0 * v, np.exp(u)], np.expm1(u))


ELU = Function(
    op_type="iqElu", numbers={"alpha": 1.0}, real="Y = Elu <alpha: float = @alpha> (X)",
    line=_elu_line,
    rest=lambda v, alpha: torch.where(v > 0, 0.0, alpha * _below(v)),
    slope=lambda v, alpha: torch.where(v > 0, 1.0, alpha * torch.exp(v)),
    numpy=_elu_numpy,
)  # fmt: skip
CELU = Function(
    op_type="iqCelu", numbers={"alpha": 1.0}, nonzero=("alpha",), real="Y = Celu <alpha: float = @alpha> (X)",
    line=lambda v, alpha: torch.where(v > 0, v, torch.where(v / alpha < -1, -alpha, 0.0)),
    rest=lambda v, alpha: torch.where(v > 0, 0.0, alpha * _below(v / alpha)),
    slope=lambda v, alpha: torch.where(v > 0, 1.0, torch.exp(v / alpha)),
    numpy=_celu_numpy,
)  # fmt: skip
SELU = Function(
    op_type="iqSelu", real="Y = Selu (X)",
    rest=lambda v: SELU_SCALE * torch.where(v > 0, v, SELU_ALPHA * torch.expm1(v)),
    slope=lambda v: SELU_SCALE * torch.where(v > 0, 1.0, SELU_ALPHA * torch.exp(v)),
    numpy=lambda v: (0.0, SELU_SCALE * np.where(v > 0, v, SELU_ALPHA * np.expm1(np.minimum(v, 0)))),
)  # fmt: skip


class EluSite(UnarySite, function=ELU):
    """``F.elu``"""


class CeluSite(UnarySite, function=CELU):
    """``torch.celu``"""


class SeluSite(UnarySite, function=SELU):
    """``torch.selu``"""


# --- smooth forms of relu: relu(v) and a tail that vanishes on both sides


def _tail(v: Tensor, gate: Tensor) -> Tensor:
    """-|v| * gate, the gate never 0."""
    return -v.abs() * gate.clamp_min(TINY)


def _tail_numpy(v: np.ndarray, gate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.maximum(v, 0), -np.abs(v) * np.maximum(gate, TINY)


def _silu_numpy(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Near 0, v / 2 + v / 2 (1 - e^-v) / (1 + e^-v): at small negative v it is within 1e-15 of ties."""
    line, rest = _tail_numpy(v, _sigmoid(-np.abs(v)))
    near = np.abs(v) < 1
    return np.where(near, 0.5 * v, line), np.where(near, -0.5 * v * np.expm1(-v) * _sigmoid(v), rest)


def _gelu_inner(v: Any) -> Any:
    return GELU_INNER * (v + GELU_CUBE * v * v * v)


def _gelu_tanh_slope(v: Tensor) -> Tensor:
    t = torch.tanh(_gelu_inner(v))
    return 0.5 * (1 + t) + 0.5 * v * (1 - t.square()) * GELU_INNER * (1 + 3 * GELU_CUBE * v.square())


def _mish_rest(v: Tensor) -> Tensor:
    """v > 0: mish(v) - v = -2 v / ((1 + e^v)^2 + 1); else mish(v) = v w / (w + 2), w = e^v (e^v + 2)."""
    e = torch.exp(v)
    w = e * (e + 2)
    return torch.where(v > 0, _tail(v, 2 / (w + 2)), v * w / (w + 2))


def _mish_slope(v: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(v))
    return t + v * torch.sigmoid(v) * (1 - t.square())


def _mish_numpy(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    e = np.exp(v)
    beyond = np.maximum(2 / ((1 + e) ** 2 + 1), TINY)
    return np.maximum(v, 0), np.where(v > 0, -v * beyond, v * (e * e + 2 * e) / (e * e + 2 * e + 2))


def _softplus_rest(v: Tensor, beta: float, threshold: float) -> Tensor:
    z = beta * v
    return torch.where(z > threshold, 0.0, torch.log1p(torch.exp(-z.abs())) / beta)


def _softplus_numpy(v: np.ndarray, beta: float, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    z = beta * v
    return np.where(z > 0, v, 0), np.where(z <= threshold, np.log1p(np.exp(-np.abs(z))) / beta, 0)


SILU = Function(
    op_type="iqSilu", real="gate = Sigmoid (X)\nY = Mul (X, gate)",
    line=lambda v: torch.where(v.abs() < 1, v / 2, v.relu()),
    rest=lambda v: torch.where(v.abs() < 1, v / 2 * torch.tanh(v / 2), _tail(v, torch.sigmoid(-v.abs()))),
    slope=lambda v: torch.sigmoid(v) * (1 + v * torch.sigmoid(-v)),
    numpy=_silu_numpy,
)  # fmt: skip
GELU = Function(
    op_type="iqGelu",
    real="s = Constant <value = float {0.70710677}> ()\nh = Constant <value = float {0.5}> ()\n"
         "one = Constant <value = float {1.0}> ()\nu = Mul (X, s)\ne = Erf (u)\nc = Add (e, one)\n"
         "g = Mul (c, h)\nY = Mul (X, g)",
    line=torch.relu,
    rest=lambda v: _tail(v, torch.special.erfc(v.abs() * ROOT_HALF) / 2),
    slope=lambda v: torch.special.erfc(-v * ROOT_HALF) / 2 + v * torch.exp(-v.square() / 2) / ROOT_TWO_PI,
    numpy=lambda v: _tail_numpy(v, _erfc(np.abs(v) * ROOT_HALF) / 2),
)  # fmt: skip
GELU_TANH = Function(
    op_type="iqGeluTanh",
    real="a = Constant <value = float {0.044715}> ()\nb = Constant <value = float {0.7978846}> ()\n"
         "h = Constant <value = float {0.5}> ()\none = Constant <value = float {1.0}> ()\n"
         "x2 = Mul (X, X)\nx3 = Mul (x2, X)\nax3 = Mul (x3, a)\ns = Add (X, ax3)\nu = Mul (s, b)\nt = Tanh (u)\n"
         "c = Add (t, one)\ng = Mul (c, h)\nY = Mul (X, g)",
    line=torch.relu,
    rest=lambda v: _tail(v, torch.sigmoid(-2 * _gelu_inner(v.abs()))),
    slope=_gelu_tanh_slope,
    numpy=lambda v: _tail_numpy(v, _sigmoid(-2 * _gelu_inner(np.abs(v)))),
)  # fmt: skip
MISH = Function(
    op_type="iqMish", real="s = Softplus (X)\nt = Tanh (s)\nY = Mul (X, t)",
    line=torch.relu,
    rest=_mish_rest,
    slope=_mish_slope,
    numpy=_mish_numpy,
)  # fmt: skip
SOFTPLUS = Function(
    op_type="iqSoftplus", numbers={"beta": 1.0, "threshold": 20.0}, nonzero=("beta",),
    real="b = Constant <value_float: float = @beta> ()\nt = Constant <value_float: float = @threshold> ()\n"
         "z = Mul (X, b)\ns = Softplus (z)\nd = Div (s, b)\nabove = Greater (z, t)\nY = Where (above, X, d)",
    line=lambda v, beta, threshold: torch.where(beta * v > 0, v, 0.0),
    rest=_softplus_rest,
    slope=lambda v, beta, threshold: torch.where(beta * v > threshold, 1.0, torch.sigmoid(beta * v)),
    numpy=_softplus_numpy,
)  # fmt: skip
LOGSIGMOID = Function(
    op_type="iqLogsigmoid", real="n = Neg (X)\ns = Softplus (n)\nY = Neg (s)",
    line=lambda v: v.clamp_max(0),
    rest=lambda v: -torch.log1p(torch.exp(-v.abs())).clamp_min(TINY),
    slope=lambda v: torch.sigmoid(-v),
    numpy=lambda v: (np.minimum(v, 0), -np.maximum(np.log1p(np.exp(-np.abs(v))), TINY)),
)  # fmt: skip


class SiluSite(UnarySite, function=SILU):
    """``F.silu``"""


class GeluSite(UnarySite):
    """``F.gelu``: two functions, by ``approximate``."""

    functions: Mapping[Any, Function] = {"none": GELU, "tanh": GELU_TANH}
    by = "approximate"


class MishSite(UnarySite, function=MISH):
    """``F.mish``"""


class SoftplusSite(UnarySite, function=SOFTPLUS):
    """``F.softplus``"""


class LogsigmoidSite(UnarySite, function=LOGSIGMOID):
    """``F.logsigmoid``"""


CHIPS = ("venus", "arcs", "venusa")

CASES = (
    Case(name="sigmoid", make=lambda: torch.sigmoid, shapes=((2, 60),), targets=CHIPS),
    Case(name="sigmoid-module", make=lambda: nn.Sigmoid(), shapes=((2, 3, 20),)),
    Case(name="tanh", make=lambda: torch.tanh, shapes=((2, 60),), targets=CHIPS),
    Case(name="tanh-module", make=lambda: nn.Tanh(), shapes=((2, 3, 20),)),
    table_case("hardsigmoid", lambda: nn.Hardsigmoid()),
    table_case("softsign", lambda: nn.Softsign()),
    table_case("leaky-relu", lambda: nn.LeakyReLU(0.1)),
    table_case("threshold", lambda: nn.Threshold(0.3, -1.1)),
    table_case("hardswish", lambda: nn.Hardswish()),
    table_case("elu", lambda: nn.ELU(0.7)),
    table_case("celu", lambda: nn.CELU(1.3)),
    table_case("selu", lambda: nn.SELU()),
    Case(name="silu", make=lambda: nn.SiLU(), shapes=((2, 60),), targets=CHIPS),
    Case(name="gelu", make=lambda: nn.GELU(), shapes=((2, 60),), targets=CHIPS),
    Case(name="gelu-tanh", make=lambda: nn.GELU("tanh"), shapes=((2, 60),), targets=CHIPS),
    table_case("mish", lambda: nn.Mish()),
    table_case("softplus", lambda: nn.Softplus()),
    table_case("softplus-numbers", lambda: lambda x: F.softplus(x, 2, threshold=5)),
    table_case("logsigmoid", lambda: nn.LogSigmoid()),
)

OPS = (
    unary(SigmoidSite, (torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.special.expit, torch.sigmoid_, Tensor.sigmoid_),
          (nn.Sigmoid,), ("QSigmoid",)),
    unary(TanhSite, (torch.tanh, Tensor.tanh, F.tanh, torch.tanh_, Tensor.tanh_), (nn.Tanh,), ("QTanh",)),
    unary(HardsigmoidSite, (F.hardsigmoid,), (nn.Hardsigmoid,)),
    unary(SoftsignSite, (F.softsign,), (nn.Softsign,)),
    unary(LeakyReluSite, (F.leaky_relu, F.leaky_relu_), (nn.LeakyReLU,)),
    unary(ThresholdSite, (F.threshold, F.threshold_, torch.threshold, torch.threshold_), (nn.Threshold,)),  # type: ignore[attr-defined]
    unary(HardswishSite, (F.hardswish,), (nn.Hardswish,)),
    unary(EluSite, (F.elu, F.elu_), (nn.ELU,)),
    unary(CeluSite, (F.celu, F.celu_, torch.celu, torch.celu_), (nn.CELU,)),
    unary(SeluSite, (F.selu, F.selu_, torch.selu, torch.selu_), (nn.SELU,)),
    unary(SiluSite, (F.silu,), (nn.SiLU,)),
    unary(GeluSite, (F.gelu,), (nn.GELU,)),
    nodes_only(GELU_TANH),
    unary(MishSite, (F.mish,), (nn.Mish,)),
    unary(SoftplusSite, (F.softplus,), (nn.Softplus,)),
    unary(LogsigmoidSite, (F.logsigmoid,), (nn.LogSigmoid,)),
)  # fmt: skip
