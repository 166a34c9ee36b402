"""Numbers as a reader says them, the same in every way a report is written."""

from __future__ import annotations

from linger.report._data import Scale
from linger.report._meter import BEST


def count(n: float) -> str:
    """950, 12.3 k, 4.56 M, 1.2 G."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if n >= size:
            return f"{n / (1e3 if unit == ' k' else size):.3g}{unit}"
    return f"{n:,.0f}"


def share(x: float | None) -> str:
    """A share in percent; "" where it is not known."""
    if x is None:
        return ""
    return "0 %" if x == 0 else "< 0.01 %" if x < 1e-4 else f"{100 * x:.2f} %" if x < 0.1 else f"{100 * x:.0f} %"


def decibels(x: float | None) -> str:
    """One digit behind the point; "exact" at the most there is; "" where it is not known."""
    return "" if x is None else "exact" if x >= BEST else f"{x:.1f}"


def number(x: float | None) -> str:
    """Four digits."""
    return "" if x is None else f"{x:.4g}"


def step(grid: Scale) -> str:
    """1/32 of a scale of 32, 4 of a scale of 1/4."""
    return f"1/{grid.scale:.0f}" if grid.scale > 1 else f"{1 / grid.scale:.0f}"


def shape(sizes: tuple[int, ...]) -> str:
    """1x3x32x32"""
    return "x".join(map(str, sizes))
