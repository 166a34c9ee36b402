"""Widths that have a grid."""

from __future__ import annotations

from linger.errors import LingerError

ALLOWED_DATA_BITS = (8, 16, 32)
ALLOWED_PARAMETER_BITS = (4, 8, 16)


def check_bits(data_bits: int = 8, parameter_bits: int = 8, out_bits: int = 8) -> None:
    """Raise LingerError for a width that has no grid."""
    for what, bits, allowed in (
        ("data_bits", data_bits, ALLOWED_DATA_BITS),
        ("parameter_bits", parameter_bits, ALLOWED_PARAMETER_BITS),
        ("out_bits", out_bits, ALLOWED_DATA_BITS),
    ):
        if not isinstance(bits, int) or bits not in allowed:
            raise LingerError(f"{what} is {bits!r}, allowed are {', '.join(map(str, allowed))}; choose one of them")
