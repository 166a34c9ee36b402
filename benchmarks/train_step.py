"""One training step of the float net against the normalized and the fixed-point net: medians and ratios."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import linger
from benchmarks._common import interleaved, show
from tests.nets import NETS

BATCH, ROUNDS = 16, 15


def step_of(net: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward, backward and an SGD step on ``x`` (N, ...)."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

    def step() -> None:
        loss = net(x).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def stages(name: str) -> dict[str, Callable[[], None]]:
    """The step of each stage of one net of ``tests/nets.py``."""
    make, shape = NETS[name]
    x = torch.randn(BATCH, *shape)
    net = make()
    traced = copy.deepcopy(net)
    linger.trace_layers(traced, traced, x)
    normalized = linger.normalize_layers(copy.deepcopy(traced))
    fixed = linger.init(copy.deepcopy(traced))
    return {"float": step_of(net, x), "normalized": step_of(normalized, x), "fixed point": step_of(fixed, x)}


def main() -> None:
    """Print one row per net."""
    torch.manual_seed(0)
    rows = []
    for name in NETS:
        seconds = interleaved(stages(name), ROUNDS)
        ratios = [f"{seconds[s] / seconds['float']:.2f}" for s in ("normalized", "fixed point")]
        rows.append((name, f"{1e3 * seconds['float']:.1f} ms", *ratios))
    show(f"training step, batch {BATCH}", ("net", "float", "normalized / float", "fixed point / float"), rows)


if __name__ == "__main__":
    main()
