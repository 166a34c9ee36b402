"""The switches of upstream's API (``upstream`` 1.2). They are read when ``init`` or ``normalize_layers`` converts a net."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from linger.errors import LingerError


class QuantMode(Enum):
    """How a range becomes a grid: power-of-two scales only."""

    QValue = 1


class PlatFormQuant(Enum):
    """The family of chips whose rounding is followed."""

    luna_quant = 1


@dataclass
class Config:
    """What is switched on. ``off`` holds the sites that stay in float; ``bn_frozen``: conversion sets bn.momentum to 0."""

    platform_quant: PlatFormQuant = PlatFormQuant.luna_quant
    bn_frozen: bool = False
    off: set[str] = field(default_factory=set)


config = Config()


def _switch(tags: tuple[str, ...], enable: bool) -> None:
    config.off = config.off.difference(tags) if enable else config.off.union(tags)


def SetPlatFormQuant(platform_quant: PlatFormQuant = PlatFormQuant.luna_quant) -> None:
    """Choose the family of chips; there is one."""
    if platform_quant is not PlatFormQuant.luna_quant:
        raise LingerError(
            f"SetPlatFormQuant: found {platform_quant}, allowed is PlatFormQuant.luna_quant; pass that, and choose the chip "
            "with init(target=...)"
        )
    config.platform_quant = platform_quant


def SetBnMomentumUpdate(disable: bool = True) -> None:
    """With True, the statistics of every batch normalization converted from now on stay as they are."""
    config.bn_frozen = disable


def SetIQTensorAdd(enable: bool = True) -> None:
    """Sums and differences in fixed point (default) or in float."""
    _switch(("iqadd", "iqsub"), enable)


def SetIQTensorMul(enable: bool = True) -> None:
    """Products in fixed point (default) or in float."""
    _switch(("iqmul",), enable)


def SetIQTensorDiv(enable: bool = True) -> None:
    """Quotients in fixed point (default) or in float."""
    _switch(("iqdiv",), enable)


def SetIQTensorSum(enable: bool = True) -> None:
    """Sums and means over dimensions in fixed point (default) or in float."""
    _switch(("iqsum", "iqmean"), enable)


def SetIQTensorCat(enable: bool = True) -> None:
    """Concatenation in fixed point (default) or in float."""
    _switch(("iqcat",), enable)


def SetIQTensorClamp(enable: bool = True) -> None:
    """Clamps in fixed point (default) or in float."""
    _switch(("iqclamp", "iqrelu6"), enable)


def SetIQTensorSigmoid(enable: bool = True) -> None:
    """Sigmoids in fixed point (default) or in float."""
    _switch(("iqsigmoid",), enable)


def SetIQTensorTanh(enable: bool = True) -> None:
    """Hyperbolic tangents in fixed point (default) or in float."""
    _switch(("iqtanh",), enable)


def SetIQTensorSoftmax(enable: bool = True) -> None:
    """Softmax and softmin in fixed point (default) or in float."""
    _switch(("SoftmaxInt", "softmin"), enable)


def SetIQTensorLogSoftmax(enable: bool = True) -> None:
    """Log-softmax in fixed point (default) or in float."""
    _switch(("LogSoftmaxInt",), enable)


def SetIQTensorVar(enable: bool = True) -> None:
    """Variances and standard deviations in fixed point (default) or in float."""
    _switch(("iqvar", "iqstd"), enable)


def SetFunctionBmmQuant(enable: bool = True) -> None:
    """Matrix products of two activations, and attention, in fixed point (default) or in float."""
    _switch(("function_bmm",), enable)


def SetFunctionChannelShuffleQuant(enable: bool = True) -> None:
    """Channel shuffles in fixed point (default) or in float."""
    _switch(("channel_shuffle",), enable)
