"""Pooling in NumPy: every window's sum or maximum, one axis after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Combine = Callable[..., np.ndarray]


def pooled(
    x: np.ndarray,
    combine: Combine,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    sizes: Sequence[int],
    dtype: np.dtype[Any] | type[np.generic],
) -> np.ndarray:
    """x (N, C, *space), padded -> (N, C, *sizes): ``combine`` (np.add, np.maximum) over every window, in ``dtype``.

    Both may be done one axis at a time, and along an axis one position of the window at a time, in long rows.
    """
    for axis, (k, s, d, n) in enumerate(zip(kernel, strides, dilations, sizes, strict=True), start=2):
        first, *others = (_every(x, axis, i * d, s, n) for i in range(k))
        out = first.astype(dtype)
        for other in others:
            combine(out, other, out=out)
        x = out
    return x


def _every(x: np.ndarray, axis: int, start: int, step: int, count: int) -> np.ndarray:
    """``count`` positions of ``axis``, from ``start`` on."""
    return x[(*[slice(None)] * axis, slice(start, start + (count - 1) * step + 1, step))]
