"""Forward and backward of recurrent layers, float against fixed point: medians, ratios, and the peak of memory.

``python -m benchmarks.recurrent_step`` times batch 32, 50 steps, 64 features, 128 units on two threads; ``--threads 1`` counts
seconds of the processor.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import linger
from benchmarks._common import clock, interleaved, memory_and_kernels, show

BATCH, STEPS, FEATURES, UNITS, ROUNDS = 32, 50, 64, 128, 25
LAYERS: dict[str, type[nn.RNNBase]] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
CHIPS = ("venus", "arcs", "venusa")


def step_of(net: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward on ``x`` (steps, N, features), a gradient of the input included."""
    x = x.clone().requires_grad_()

    def step() -> None:
        net(x)[0].square().mean().backward()

    return step


def row(name: str) -> tuple[str, ...]:
    """One layer: the float net's time, then the ratio of each chip, and the largest ratio of memory."""
    x = torch.randn(STEPS, BATCH, FEATURES)
    layer = LAYERS[name](FEATURES, UNITS)
    nets = {chip: linger.init(nn.Sequential(copy.deepcopy(layer)), target=chip) for chip in CHIPS}
    tasks = {"float": step_of(layer, x)} | {chip: step_of(net, x) for chip, net in nets.items()}
    seconds = interleaved(tasks, ROUNDS, now=clock)
    memory = {key: memory_and_kernels(task)[0] for key, task in tasks.items()}
    ratios = [f"{seconds[c] / seconds['float']:.2f}" for c in CHIPS]
    sizes = [f"{memory[c] / memory['float']:.2f}" for c in CHIPS]
    return name, f"{1e3 * seconds['float']:.1f} ms", *ratios, f"{memory['float'] / 2**20:.1f} MiB", *sizes


def main(arguments: list[str] | None = None) -> None:
    """Print one row per layer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args(arguments).threads)
    torch.manual_seed(0)
    columns = ("layer", "float", *(f"{c} / float" for c in CHIPS), "float memory", *(f"{c} / float" for c in CHIPS))
    title = f"forward and backward, batch {BATCH}, {STEPS} steps, {FEATURES} -> {UNITS}"
    show(title, columns, [row(name) for name in LAYERS])


if __name__ == "__main__":
    main()
