"""What a chip's table holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Target:
    """One chip. ``platform`` is the packer's exact spelling; the other strings are attributes it insists on (``engine`` 2)."""

    name: str
    platform: str
    data_bits: tuple[int, ...]
    parameter_bits: tuple[int, ...]
    platform_quant: str = "luna_quant"
    quant_mode: str = "floor_add"
