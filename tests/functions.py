"""The functions of one tensor as data: site, numbers of the call, the float function in PyTorch and in high precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mpmath as mp
import torch
from torch import Tensor
from torch.nn import functional as F

from linger.numerics import Grid, levels, set_grid
from linger.ops import SITES
from linger.ops._unary import Function, UnarySite
from linger.ops.activations import SELU_ALPHA, SELU_SCALE


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One function with its numbers. ``precise`` takes and returns ``mpmath`` numbers.

    ``arithmetic``: made of + - * / of exact operands, so no mathematical library is asked.
    ``tail``: beyond +-16, f is its line and less than nothing can see.
    """

    name: str
    tag: str
    torch: Callable[[Tensor], Tensor]
    precise: Callable[[Any], Any]
    call: Mapping[str, Any] = field(default_factory=dict)
    arithmetic: bool = False
    tail: bool = False

    @property
    def function(self) -> Function:
        return SITES[self.tag].integer.meant(self.call)[0]  # type: ignore[union-attr,operator]

    @property
    def said(self) -> dict[str, float]:
        return SITES[self.tag].integer.meant(self.call)[1]  # type: ignore[union-attr,operator]


def every_level(exponent: int, bits: int = 8) -> Tensor:
    """All values of the grid 2^exponent, lowest first, tagged with it."""
    x = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) * 2.0**-exponent
    return set_grid(x, Grid(torch.tensor(2.0**exponent), bits))


def site(tag: str, chip: str = "venus", peak: float | None = None) -> UnarySite:
    """A site in eval mode; ``peak``: the running maximum of its result."""
    made: Any = SITES[tag].integer()  # type: ignore[misc]
    made.chip = chip
    if peak is not None and "running_o" in made._buffers:
        made.running("o").fill_(peak)
    return made.eval()  # type: ignore[no-any-return]


def peak_of(x: Tensor) -> float:
    """The largest finite magnitude, at least that of a tiny number."""
    finite = x[x.isfinite()].abs()
    return max(float(finite.max()), 2.0**-50)


def at_0(f: Callable[[Any], Any], there: Any) -> Callable[[Any], Any]:
    """f of a positive number, ``there`` for 0 and below."""
    return lambda v: f(v) if v > 0 else there


def sigmoid(v: Any) -> Any:
    return 1 / (1 + mp.exp(-v))


def softplus(v: Any) -> Any:
    return mp.log1p(mp.exp(v))


def log2(v: Any) -> Any:
    mantissa, exponent = mp.frexp(v)
    return exponent - 1 + mp.log(2 * mantissa) / mp.log(2)


def elu(v: Any, alpha: Any = 1) -> Any:
    return v if v > 0 else alpha * mp.expm1(v)


def gelu_tanh(v: Any) -> Any:
    return v * sigmoid(2 * mp.sqrt(2 / mp.pi) * (v + mp.mpf(0.044715) * v**3))


def positive(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """f as fixed point defines it: of a negative number what it is of 0."""
    return lambda v: f(v.clamp_min(0))


POINT_1, POINT_7, POINT_01 = (mp.mpf(float(torch.tensor(v))) for v in (0.1, 0.7, 0.01))  # as float32
CHIP = (
    Variant(name="sigmoid", tag="iqsigmoid", torch=torch.sigmoid, precise=sigmoid),
    Variant(name="tanh", tag="iqtanh", torch=torch.tanh, precise=mp.tanh),
    Variant(name="silu", tag="iqsilu", torch=F.silu, precise=lambda v: v * sigmoid(v), tail=True),
    Variant(name="gelu", tag="iqgelu", torch=F.gelu, tail=True,
            precise=lambda v: v * mp.erfc(-v / mp.sqrt(2)) / 2),
)  # fmt: skip
OWN = (
    Variant(name="hardsigmoid", tag="iqhardsigmoid", torch=F.hardsigmoid, arithmetic=True,
            precise=lambda v: min(max(v + 3, 0), 6) / 6),
    Variant(name="softsign", tag="iqsoftsign", torch=F.softsign, arithmetic=True, precise=lambda v: v / (1 + abs(v))),
    Variant(name="leaky-relu", tag="iqleakyrelu", torch=F.leaky_relu, arithmetic=True,
            precise=lambda v: v if v > 0 else v * POINT_01),
    Variant(name="leaky-relu-0.1", tag="iqleakyrelu", torch=lambda v: F.leaky_relu(v, float(POINT_1)), arithmetic=True,
            precise=lambda v: v if v > 0 else v * POINT_1, call={"negative_slope": 0.1}),
    Variant(name="threshold", tag="iqthreshold", torch=lambda v: F.threshold(v, 0.5, float(POINT_7)), arithmetic=True,
            precise=lambda v: v if v > 0.5 else POINT_7, call={"threshold": 0.5, "value": 0.7}),
    Variant(name="hardswish", tag="iqhardswish", torch=F.hardswish, arithmetic=True,
            precise=lambda v: v * min(max(v + 3, 0), 6) / 6),
    Variant(name="elu", tag="iqelu", torch=F.elu, precise=elu, tail=True),
    Variant(name="elu-0.7", tag="iqelu", torch=lambda v: F.elu(v, float(POINT_7)), tail=True,
            precise=lambda v: elu(v, POINT_7), call={"alpha": 0.7}),
    Variant(name="celu-0.7", tag="iqcelu", torch=lambda v: F.celu(v, float(POINT_7)), tail=True,
            precise=lambda v: v if v > 0 else POINT_7 * mp.expm1(v / POINT_7), call={"alpha": 0.7}),
    Variant(name="selu", tag="iqselu", torch=F.selu, precise=lambda v: mp.mpf(SELU_SCALE) * elu(v, mp.mpf(SELU_ALPHA))),
    Variant(name="gelu-tanh", tag="iqgelu", torch=lambda v: F.gelu(v, approximate="tanh"), precise=gelu_tanh, tail=True,
            call={"approximate": "tanh"}),
    Variant(name="mish", tag="iqmish", torch=F.mish, precise=lambda v: v * mp.tanh(softplus(v)), tail=True),
    Variant(name="softplus", tag="iqsoftplus", torch=F.softplus, tail=True,
            precise=lambda v: v if v > 20 else softplus(v)),
    Variant(name="softplus-2-5", tag="iqsoftplus", torch=lambda v: F.softplus(v, 2, 5), tail=True,
            precise=lambda v: v if 2 * v > 5 else softplus(2 * v) / 2, call={"beta": 2, "threshold": 5}),
    Variant(name="logsigmoid", tag="iqlogsigmoid", torch=F.logsigmoid, precise=lambda v: -softplus(-v), tail=True),
    Variant(name="exp", tag="iqexp", torch=torch.exp, precise=mp.exp),
    Variant(name="log", tag="iqlog", torch=positive(torch.log), precise=at_0(mp.log, -mp.inf)),
    Variant(name="log2", tag="iqlog2", torch=positive(torch.log2), precise=at_0(log2, -mp.inf)),
    Variant(name="erf", tag="iqerf", torch=torch.erf, precise=mp.erf),
    Variant(name="sin", tag="iqsin", torch=torch.sin, precise=mp.sin),
    Variant(name="cos", tag="iqcos", torch=torch.cos, precise=mp.cos),
    Variant(name="square", tag="iqsquare", torch=torch.square, precise=lambda v: v * v, arithmetic=True),
    Variant(name="cube", tag="iqpow", torch=lambda v: v**3, precise=lambda v: v**3, call={"exponent": 3}, arithmetic=True),
    Variant(name="sqrt", tag="iqsqrt", torch=positive(torch.sqrt), precise=at_0(mp.sqrt, mp.mpf(0))),
    Variant(name="rsqrt", tag="iqrsqrt", torch=positive(lambda v: 1 / v.sqrt()),
            precise=at_0(lambda v: 1 / mp.sqrt(v), mp.inf)),
    Variant(name="reciprocal", tag="iqreciprocal", torch=torch.reciprocal, arithmetic=True,
            precise=lambda v: 1 / v if v else mp.inf),
)  # fmt: skip
CHIPS = ("venus", "arcs", "venusa")
EVERYWHERE = [(v, chip) for v in CHIP for chip in CHIPS] + [(v, "venus") for v in OWN]  # own ones are the same on all


def scales(function: Function, peak: float, bits: int = 8) -> tuple[int, ...]:
    """Exponents of output grids: from one that holds ``peak`` with room to one that saturates nearly everything."""
    if function.fixed:
        return (bits - function.fixed,)
    fitting = int(torch.tensor(levels(bits) / peak).log2().floor())
    return tuple(min(max(fitting + d, -60), 60) for d in (-3, -1, 0, 1, 5))
