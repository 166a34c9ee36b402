"""How far the integer normalizations and spreads are from their float functions, over rows of 2 to 2048 elements.

Rows are noise of every amplitude, ramps and one-hot rows; weights are 1 and biases 0. The output of a normalization is
int8 at 2^4 or int16 at 2^10 (the finest that a weight of 1 allows), that of a variance or deviation the finest that holds
it. Results beyond the output's range are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from benchmarks._common import show
from linger.ops import groupnorm, layernorm, rmsnorm, variance
from linger.targets import TARGETS

LENGTHS = (2, 3, 31, 256, 257, 1000, 2048)
EPS = float(np.float32(1e-5))
Pair = tuple[np.ndarray, np.ndarray, float]  # integers, the float function in real units, the output's scale


class Row(NamedTuple):
    """One line of the table; errors in output LSB and in real units."""

    function: str
    targets: str
    max_lsb: float
    mean_lsb: float
    max_real: float
    mean_real: float


def inputs(length: int, bits: int) -> np.ndarray:
    """Integers (rows, length)."""
    top = 2 ** (bits - 1)
    rng = np.random.default_rng(length)
    rows = [rng.integers(-(2**k), 2**k, length) for k in range(1, bits) for _ in range(8)]
    hot = np.zeros(length, np.int64)
    hot[0] = top - 1
    return np.stack([*rows, hot, -hot, np.linspace(-top, top - 1, length).round().astype(np.int64)])


def norm_pairs(bits: int, centred: bool, run: Callable[..., np.ndarray]) -> Iterator[Pair]:
    """``run(q, w, b, scale_x, scale_w, scale_o, o_bits)`` against x / sigma."""
    scale_x, scale_o = 2.0 ** (bits - 4), 2.0 ** (4 if bits == 8 else 10)
    for length in LENGTHS:
        q = inputs(length, bits)
        x = q / scale_x
        x = x - x.mean(-1, keepdims=True) if centred else x
        exact = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)
        w, b = np.full(length, 64, np.int8), np.zeros(length, np.int32)
        yield run(q, w, b, scale_x=scale_x, scale_w=64.0, scale_o=scale_o, o_bits=bits), exact, scale_o


def spread_pairs(
    bits: int, run: Callable[..., np.ndarray], exact: Callable[[np.ndarray], np.ndarray]
) -> Iterator[Pair]:
    """The unbiased variance or deviation of every row."""
    scale_x = 2.0 ** (bits - 4)
    for length in LENGTHS:
        q = inputs(length, bits)
        values = exact(q / scale_x)
        scale_o = 2.0 ** np.floor(np.log2((2 ** (bits - 1) - 1) / values.max()))
        found = run(q, dims=(1,), correction=1, scale_x=scale_x, scale_o=scale_o, o_bits=bits)
        yield found, values, scale_o


def row(function: str, targets: str, bits: int, pairs: Iterator[Pair]) -> Row:
    """The largest and the mean error over all lengths."""
    lsb, real = [], []
    for found, exact, scale in pairs:
        inside = np.abs(exact * scale) < 2 ** (bits - 1) - 1
        error = np.abs(found / scale - exact)[inside]
        real.append(error)
        lsb.append(error * scale)
    a, b = np.concatenate(lsb), np.concatenate(real)
    return Row(f"{function}, {bits} bits", targets, a.max(), a.mean(), b.max(), b.mean())


def instances(q: np.ndarray, w: np.ndarray, b: np.ndarray, **scales: float) -> np.ndarray:
    """Each row as the only channel of an image; the same integers as the group of one channel has."""
    return groupnorm.run(q[:, None], w[:1], b[:1], num_groups=1, **scales)[:, 0]  # type: ignore[arg-type]


def rows() -> list[Row]:
    """One row per function, width and kind of arithmetic."""
    found = []
    for bits in (8, 16):
        for chip in TARGETS if bits == 8 else ("venus", "venusa"):

            def on_chip(*x: np.ndarray, platform: str = chip, **scales: float) -> np.ndarray:
                return layernorm.run(*x, platform=platform, **scales)  # type: ignore[arg-type]

            found.append(row("layer norm", chip, bits, norm_pairs(bits, True, on_chip)))
        found.append(row("group and instance norm", "all", bits, norm_pairs(bits, True, instances)))
        found.append(row("rms norm", "all", bits, norm_pairs(bits, False, rmsnorm.run)))
        variances = spread_pairs(bits, variance.run_var, lambda x: x.var(-1, ddof=1))
        found.append(row("variance", "all", bits, variances))
        deviations = spread_pairs(bits, variance.run_std, lambda x: x.std(-1, ddof=1))
        found.append(row("standard deviation", "all", bits, deviations))
    return found


def main() -> None:
    """Print the table."""
    lines = [(r.function, r.targets, *(f"{v:.4g}" for v in r[2:])) for r in rows()]
    show("error against the float function", ("function", "targets", "max LSB", "mean LSB", "max", "mean"), lines)


if __name__ == "__main__":
    main()
