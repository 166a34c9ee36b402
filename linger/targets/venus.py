"""The table of venus (``engine`` 4)."""

from __future__ import annotations

from linger.targets._base import Target

VENUS = Target(name="venus", platform="venus", data_bits=(8, 16, 32), parameter_bits=(8,))
