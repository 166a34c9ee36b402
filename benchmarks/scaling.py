"""Does fixed point cost more as a net grows? Ratios of a training step and of its memory over widths, depths and batches.

``python -m benchmarks.scaling [--threads N] [--seconds S]``: convolution, batch normalization and relu, eager.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import nn

import linger
from benchmarks._common import show
from benchmarks.train_step import memory_and_kernels, ratios, step_of

WIDTH, DEPTH, BATCH, SIZE = 32, 6, 16, 24
GROWN = {"width": (16, 32, 64), "depth": (3, 6, 12), "batch": (8, 16, 32)}


def net_of(width: int, depth: int) -> nn.Sequential:
    """(N, width, SIZE, SIZE) -> the same shape."""
    block = [(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()) for _ in range(depth)]
    return nn.Sequential(*(layer for layers in block for layer in layers))


def row(what: str, value: int, seconds: float) -> tuple[str, ...]:
    """One size: the float step's time, and the ratios."""
    size = {"width": WIDTH, "depth": DEPTH, "batch": BATCH} | {what: value}
    net, x = net_of(size["width"], size["depth"]), torch.randn(size["batch"], size["width"], SIZE, SIZE)
    fixed = copy.deepcopy(net)
    linger.trace_layers(fixed, fixed, x)
    linger.init(fixed)
    steps = step_of(net, x), step_of(fixed, x)
    ratio, base = ratios(*steps, seconds)
    (bytes_a, kernels_a), (bytes_b, kernels_b) = map(memory_and_kernels, steps)
    kernels = f"{(kernels_b - kernels_a) / size['depth']:.0f}"
    return f"{what} {value}", f"{1e3 * base:.1f} ms", f"{ratio:.2f}", f"{bytes_b / bytes_a:.2f}", kernels


def main() -> None:
    """Print one row per size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    rows = [row(what, value, given.seconds) for what, values in GROWN.items() for value in values]
    columns = ("size", "float", "time", "peak memory", "more kernels per layer")
    show(f"width {WIDTH}, depth {DEPTH}, batch {BATCH}, one of them grown", columns, rows)


if __name__ == "__main__":
    main()
