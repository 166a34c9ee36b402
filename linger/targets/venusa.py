"""The table of venusA (``engine`` 4)."""

from __future__ import annotations

from linger.targets._base import Target

VENUSA = Target(name="venusa", platform="venusA", data_bits=(8, 16, 32), parameter_bits=(4, 8))
