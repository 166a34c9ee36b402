"""Exact matrix products of integers in NumPy, in the narrowest floating point that holds every partial sum."""

from __future__ import annotations

import numpy as np

from linger.steps import replaceable

FLOAT32_EXACT = 2**24 - 1  # below it a sum is an exact float32, and so is the sum shifted right by any n plus a half
FLOAT64_EXACT = 2.0**52  # half of what float64 holds: the bound itself is found in float64


@replaceable
def exact_matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b on integers as int64: through BLAS where a floating point holds every partial sum, whatever their order, else in int64.

    Either may be a vector, as of ``np.matmul``. Where ``a`` lies in memory transposed, so does the result.
    """
    peak = _partial_sums(a, b)
    kind = np.float32 if peak <= FLOAT32_EXACT else np.float64 if peak <= FLOAT64_EXACT else np.int64
    a, b = a.astype(kind), b.astype(kind)
    transposed = a.ndim > 1 < b.ndim and a.strides[-2] < a.strides[-1]
    product = np.matmul(b.swapaxes(-1, -2), a.swapaxes(-1, -2)).swapaxes(-1, -2) if transposed else np.matmul(a, b)
    return product.astype(np.int64, copy=False)


def _partial_sums(a: np.ndarray, b: np.ndarray) -> float:
    """How far a partial sum of a @ b may go: what the types say where that is little, else max|a| times the largest sum|b|."""
    if a.dtype.kind == b.dtype.kind == "i":
        by_type = a.shape[-1] * 2.0 ** (8 * (a.itemsize + b.itemsize) - 2)
        if by_type <= FLOAT32_EXACT:
            return by_type
    largest = max(float(a.max(initial=0)), -float(a.min(initial=0)))
    return largest * float(np.abs(b.astype(np.float64)).sum(-2 if b.ndim > 1 else -1).max(initial=0))
