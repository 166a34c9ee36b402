"""What a chip's table holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from linger.rounding import HALF_UP
from linger.targets._limits import Latency, Limit, Memory
from linger.targets._pwl import Pwl
from linger.targets._softmax import Softmax
from linger.targets._workspace import Workspace

LACKS = {
    "GroupNormInt": "the engine has no group or instance normalization",
    "RMSNormInt": "the engine has no root-mean-square normalization",
    "RNNInt": "the engine has no plain recurrent layer",
    "GRUInt": "the engine's GRU counts half of the previous state, or has no meaning at all",
    "iqStd": "the engine has no standard deviation",
}  # of every chip


@dataclass(frozen=True, kw_only=True)
class Target:
    """One chip. ``functions``: its piecewise-linear functions by op type. ``softmax``: its variant of softmax and log-softmax.
    ``platform`` is the packer's exact spelling; the other strings are attributes it insists on (``engine`` 2).

    ``weight_bits``: op type -> width in which its node reads the weight, where that is fixed. ``normal_bits``: width of a
    normalized value before the weight. ``longest_row``: op type -> elements of an 8-bit row up to which the engine's
    sums cannot wrap. ``lacks``: op type -> why the engine has no such node; it exports and runs everywhere else.
    ``time_swapped``: the engine's recurrent nodes find the steps on axis 1 where ``batch_first`` is 0.
    ``cat_requants``: an input of a cat that is finer than its output has to be brought to the output's scale before.
    ``rounding``: of activations, a row of ``linger.rounding``; nodes say it where it is not half up, for ``quant_mode`` means
    nothing to the engine.
    ``like``: of a chip from a file, the built-in one whose tables it has.
    ``ops``: op type -> what the engine does with it, a word of ``STATUSES``; an op that is not there cannot run.
    """

    name: str
    platform: str
    data_bits: tuple[int, ...]
    parameter_bits: tuple[int, ...]
    softmax: Softmax
    platform_quant: str = "luna_quant"
    quant_mode: str = "floor_add"
    rounding: str = HALF_UP
    functions: Mapping[str, Pwl] = field(default_factory=dict)
    weight_bits: Mapping[str, int] = field(default_factory=dict)
    normal_bits: int = 32
    longest_row: Mapping[str, int] = field(default_factory=lambda: {"LayerNormInt": 362})
    lacks: Mapping[str, str] = field(default_factory=lambda: dict(LACKS))
    time_swapped: bool = False
    cat_requants: bool = False
    ops: Mapping[str, str] = field(default_factory=dict)
    limits: tuple[Limit, ...] = ()
    memory: Memory = field(default_factory=Memory)
    workspaces: Mapping[str, Workspace] = field(default_factory=dict)
    latency: Latency = field(default_factory=Latency)
    like: str = ""

    def attributes(self, attrs: Mapping[str, Any]) -> dict[str, Any]:
        """A node's attributes as this chip's packer wants them: with its own where there is a scale, widths it can read."""
        said = dict(attrs)
        if any(key.startswith("scale_") for key in said):
            said |= {"platform": self.platform, "platform_quant": self.platform_quant, "quant_mode": self.quant_mode}
            said |= {} if self.rounding == HALF_UP else {"rounding": self.rounding}
        if "parameter_bits" in said:
            wide_enough = [b for b in self.parameter_bits if b >= said["parameter_bits"]]
            said["parameter_bits"] = min(wide_enough, default=said["parameter_bits"])
        return said
