"""How other implementations round, saturate and add up: steps that take the place of the reference's.

Every function stands for ``shift_round(v, n)``, ``saturate(v, bits)``, ``quantize_array(x, scale, bits)``,
``rounded_mean(total, k, away)`` or ``exact_matmul(a, b)`` of ``numerics``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from linger import numerics
from linger.numerics import int_dtype, levels, reach
from linger.rounding import HALF_UP, ROUNDINGS

Step = Callable[..., np.ndarray]
_RULE: ContextVar[str] = ContextVar("_RULE", default=HALF_UP)
plain: dict[str, Step] = {
    name: getattr(numerics, name).__wrapped__ for name in ("shift_round", "saturate", "quantize_array", "exact_matmul")
}


@contextmanager
def rounding(rule: str) -> Iterator[None]:
    """The rounding of the node that is computed again: ``exact`` follows it."""
    token = _RULE.set(rule)
    try:
        yield
    finally:
        _RULE.reset(token)


exact: dict[str, Step] = {
    **plain,
    "shift_round": lambda v, n: plain["shift_round"](v, n, _RULE.get()),
    "quantize_array": lambda x, scale, bits: plain["quantize_array"](x, scale, bits, _RULE.get()),
}


# --- ties and truncation: of v / 2^n, and of x * scale


def _half(v: np.ndarray, n: int) -> np.ndarray:
    """Where v / 2^n is exactly between two integers."""
    v = v.astype(np.int64)
    return v & ((1 << n) - 1) == 1 << (n - 1) if 0 < n < 63 else np.zeros(v.shape, bool)


def _tie(down: Callable[[np.ndarray, np.ndarray], Any]) -> dict[str, Step]:
    """Ties go down where ``down(v, half up result)`` says so."""

    def shift_round(v: np.ndarray, n: int) -> np.ndarray:
        up = plain["shift_round"](v, n)
        return up - (_half(v, n) & down(v, up))

    def quantize_array(x: np.ndarray, scale: float, bits: int) -> np.ndarray:
        v = np.clip(x.astype(np.float64) * scale, -2.0 * reach(bits), 2.0 * reach(bits))
        up = np.floor(v + 0.5)
        q = up - ((v % 1 == 0.5) & down(v, up))
        return np.clip(q, -reach(bits), reach(bits) - 1).astype(int_dtype(bits))

    def rounded_mean(total: np.ndarray, k: int, away: bool) -> np.ndarray:
        up = (2 * total + k) // (2 * k)
        return up - ((2 * total % (2 * k) == k) & down(total, up))

    return {"shift_round": shift_round, "quantize_array": quantize_array, "rounded_mean": rounded_mean}


def _cut(toward_zero: bool) -> dict[str, Step]:
    def shift_round(v: np.ndarray, n: int) -> np.ndarray:
        v = v.astype(np.int64)
        if n <= 0:
            return exact["shift_round"](v, n)
        size = min(n, 63)
        return np.sign(v) * (np.abs(v) >> size) if toward_zero else v >> size

    def quantize_array(x: np.ndarray, scale: float, bits: int) -> np.ndarray:
        v = x.astype(np.float64) * scale
        v = np.trunc(v) if toward_zero else np.floor(v)
        return np.clip(v, -reach(bits), reach(bits) - 1).astype(int_dtype(bits))

    def rounded_mean(total: np.ndarray, k: int, away: bool) -> np.ndarray:
        return np.sign(total) * (np.abs(total) // k) if toward_zero else total // k

    return {"shift_round": shift_round, "quantize_array": quantize_array, "rounded_mean": rounded_mean}


TIES = {
    "up": _tie(lambda v, up: np.zeros(v.shape, bool)),
    "to even": _tie(lambda v, up: up % 2 != 0),
    "down": _tie(lambda v, up: np.ones(v.shape, bool)),
    "away from zero": _tie(lambda v, up: v < 0),
    "toward zero": _tie(lambda v, up: v > 0),
    "to odd": _tie(lambda v, up: up % 2 == 0),
}
CUTS = {"toward minus infinity": _cut(False), "toward zero": _cut(True)}


def twice(first: int, tie: str = "") -> dict[str, Step]:
    """Rounded to ``first`` bits fewer, then to the rest."""
    once = TIES[tie]["shift_round"] if tie else exact["shift_round"]

    def shift_round(v: np.ndarray, n: int) -> np.ndarray:
        return once(v, n) if n <= first else once(once(v, first), n - first)

    return {"shift_round": shift_round}


# --- saturation


def wrapped(v: np.ndarray, bits: int) -> np.ndarray:
    """The lowest ``bits`` bits as a signed integer."""
    half = 1 << (bits - 1)
    return ((v.astype(np.int64) + half) & (2 * half - 1)) - half


def _quantized_wrapping(x: np.ndarray, scale: float, bits: int) -> np.ndarray:
    v = ROUNDINGS[_RULE.get()].entering(np.clip(x.astype(np.float64) * scale, -(2.0**61), 2.0**61), bits <= 16)
    return wrapped(v.astype(np.int64), bits).astype(int_dtype(bits))


def _symmetric(v: np.ndarray, bits: int) -> np.ndarray:
    return np.clip(v, -levels(bits), levels(bits)).astype(int_dtype(bits))


SATURATIONS: dict[str, dict[str, Step]] = {
    "the lowest bits are kept": {
        "saturate": lambda v, bits: wrapped(v, bits).astype(int_dtype(bits)), "quantize_array": _quantized_wrapping,
    },
    "it stops one above the lowest integer": {
        "saturate": _symmetric,
        "quantize_array": lambda x, scale, bits: _symmetric(exact["quantize_array"](x, scale, bits), bits),
    },
}  # fmt: skip


# --- accumulators


def _before_rounding(change: Callable[[np.ndarray], np.ndarray]) -> dict[str, Step]:
    return {"shift_round": lambda v, n: exact["shift_round"](change(v.astype(np.int64)), n)}


def _single(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.matmul(a.astype(np.float32), b.astype(np.float32)).astype(np.int64)


def _single_in_order(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float32 sums in the order of the products."""
    total = np.zeros((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]), np.float32)
    for k in range(a.shape[-1]):
        total += a[..., :, k, None].astype(np.float32) * b[..., None, k, :].astype(np.float32)
    return total.astype(np.int64)


def _rounded_to_single(v: np.ndarray) -> np.ndarray:
    return v.astype(np.float32).astype(np.int64)


def _in_pairs(offset: int) -> dict[str, Step]:
    """Two products are added in 16 bits that saturate; integers of the left side are stored with an offset."""

    def exact_matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = a.astype(np.int64) + offset, b.astype(np.int64)
        shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
        total = np.zeros(shape, np.int64)
        for k in range(0, a.shape[-1], 2):
            two = np.matmul(a[..., :, k : k + 2], b[..., k : k + 2, :])
            total += np.clip(two, -(2**15), 2**15 - 1)
        return total - offset * b.sum(-2, keepdims=True)

    return {"exact_matmul": exact_matmul}


NARROW: dict[str, dict[str, Step]] = {
    "24 bits wrap around": _before_rounding(lambda v: wrapped(v, 24)),
    "int16 wraps around": _before_rounding(lambda v: wrapped(v, 16)),
    "pairs of products saturate at 16 bits": _in_pairs(0),
    "pairs of products saturate at 16 bits, the input with an offset of 128 (uint8, x86 without VNNI)": _in_pairs(128),
    "int16 saturates": _before_rounding(lambda v: np.clip(v, -(2**15), 2**15 - 1)),
}
WIDE: dict[str, dict[str, Step]] = {
    "int32 wraps around": _before_rounding(lambda v: wrapped(v, 32)),
    "int32 saturates": _before_rounding(lambda v: np.clip(v, -(2**31), 2**31 - 1)),
    "float32 holds no sum beyond 2^24": _before_rounding(_rounded_to_single),
    "float32 sums beyond 2^24": {"exact_matmul": _single},
    "float32 sums beyond 2^24, in order": {"exact_matmul": _single_in_order},
    "float32 sums beyond 2^24, in order, the last rounded too": {
        "exact_matmul": _single_in_order, **_before_rounding(_rounded_to_single),
    },
}  # fmt: skip
