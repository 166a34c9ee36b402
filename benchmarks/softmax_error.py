"""How far every chip's softmax and log-softmax are from the float functions, by row length. Integers in NumPy only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks._common import show
from linger.ops import BY_NAME
from linger.ops.softmax import saturating_rows
from linger.targets import TARGETS

LENGTHS = (1, 2, 3, 31, 256, 257, 1000, 2048)
FINE = {
    "SoftmaxInt": 2.0**15,
    "LogSoftmaxInt": 2.0**10,
}  # output scales at 16 bits, so that the output grid counts little
Row = tuple[str, str, int, float, float, float]


def scores(length: int, count: int, seed: int) -> tuple[np.ndarray, float]:
    """Rows of int8 scores and their scale; the rows' standard deviations spread from 0.1 to 6."""
    rng = np.random.default_rng(seed)
    spread = np.geomspace(0.1, 6, count)[:, None]
    return np.clip(np.round(rng.normal(size=(count, length)) * spread * 16), -128, 127).astype(np.int8), 16.0


def reference(op: str, x: np.ndarray, scale: float) -> np.ndarray:
    """The float function in float64."""
    z = x / scale
    log = z - z.max(-1, keepdims=True)
    log -= np.log(np.exp(log).sum(-1, keepdims=True))
    return log if op == "LogSoftmaxInt" else np.exp(log)


def rows(count: int = 400) -> Iterator[Row]:
    """Op, chip, row length, maximum and mean error where the sum fits, and the share of rows whose sum saturates.

    Log-softmax is compared where the probability is at least 2^-10: below 2^-16 chips that take ln p give -64.
    """
    for op, fine in FINE.items():
        for chip in TARGETS.values():
            for length in LENGTHS:
                x, scale = scores(length, count, length)
                y = BY_NAME[op].run(x, scale_x=scale, scale_o=fine, platform=chip.platform, o_bits=16)
                wrong = saturating_rows(x, scale, platform=chip.platform)
                error = np.abs(y / fine - reference(op, x, scale))
                kept = np.repeat(~wrong[:, None], length, 1)
                if op == "LogSoftmaxInt":
                    kept &= reference("SoftmaxInt", x, scale) >= 2.0**-10
                kept = error[kept]
                yield op, chip.name, length, float(kept.max()), float(kept.mean()), float(wrong.mean())


def main() -> None:
    """Print the table; errors of softmax in units of 2^-15, of log-softmax in units of 2^-10."""
    printed = [
        (op, chip, str(n), f"{high * FINE[op]:.2f}", f"{mean * FINE[op]:.3f}", f"{wrong:.0%}")
        for op, chip, n, high, mean, wrong in rows()
    ]
    columns = ("op", "chip", "row", "max error (LSB)", "mean error (LSB)", "rows that saturate")
    show("Softmax against float64", columns, printed)


if __name__ == "__main__":
    main()
