"""The table of arcs (``engine`` 4)."""

from __future__ import annotations

from linger.targets._base import Target

ARCS = Target(name="arcs", platform="arcs", data_bits=(8, 32), parameter_bits=(4, 8))
