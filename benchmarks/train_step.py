"""One training step of the float net against the fixed-point net, eager and compiled: ratios, peak memory, kernels.

``python -m benchmarks.train_step [names] [--compile] [--json FILE]``; medians of the ratios of interleaved steps,
of seconds on the wall, or with ``--threads 1`` of the processor's, which other programs on the machine change little.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._common import fixed_of, memory_and_kernels, one_of, ratios, show, write
from tests.nets import NETS

BATCH = 16


class Recurrent(nn.Module):
    """(N, 50, 32) -> (N, 10)"""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(32, 64, batch_first=True)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0][:, -1])


class Encoder(nn.Module):
    """(N, 50, 32) -> (N, 10)"""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(x).mean(1))


MAKERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **NETS,
    "LSTM": (lambda: Recurrent(nn.LSTM), (50, 32)),
    "GRU": (lambda: Recurrent(nn.GRU), (50, 32)),
    "transformer": (Encoder, (50, 32)),
}


def step_of(net: nn.Module, x: Tensor, source: nn.Module | None = None) -> Callable[[], None]:
    """Forward, backward and an SGD step on ``x`` (N, ...); ``source`` holds the parameters of a compiled net."""
    optimizer = torch.optim.SGD((source or net).parameters(), lr=1e-3)

    def step() -> None:
        loss = net(x).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def row(name: str, compile: bool, seconds: float) -> dict[str, Any]:
    """Everything that is measured of one net."""
    make, shape = MAKERS[name]
    x, net = torch.randn(BATCH, *shape), make()
    fixed = fixed_of(net, x)
    steps = step_of(net, x), step_of(fixed, x)
    ratio, base = ratios(*steps, seconds)
    (bytes_a, kernels_a), (bytes_b, kernels_b) = map(memory_and_kernels, steps)
    found = {
        "net": name,
        "float_ms": 1e3 * base,
        "eager": ratio,
        "memory": bytes_b / bytes_a,
        "kernels": [kernels_a, kernels_b],
    }
    if compile:
        torch._dynamo.reset()
        fast = [step_of(torch.compile(m, dynamic=False), x, m) for m in (net, fixed)]  # type: ignore[arg-type]
        found["compiled"], compiled = ratios(*fast, seconds)
        found["compiled_float_ms"] = 1e3 * compiled
    for m in (net, fixed):
        m.eval()
    with torch.no_grad():
        found["eval"] = ratios(lambda: net(x), lambda: fixed(x), seconds / 2)[0]
    return found


def main(arguments: list[str] | None = None) -> None:
    """Print one row per net."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", type=one_of(MAKERS), default=list(MAKERS))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    torch._dynamo.config.allow_rnn = True
    torch.manual_seed(0)
    found = [row(name, given.compile, given.seconds) for name in given.names]
    rows = [
        (r["net"], f"{r['float_ms']:.1f} ms", f"{r['eager']:.2f}", f"{r['compiled']:.2f}" if "compiled" in r else "",
         f"{r['memory']:.2f}", "{} -> {}".format(*r["kernels"]), f"{r['eval']:.2f}")
        for r in found
    ]  # fmt: skip
    columns = ("net", "float", "eager", "compiled", "peak memory", "kernels", "eval")
    show(f"training step, batch {BATCH}: fixed point over float, each in its own mode", columns, rows)
    write(given.json, found)


if __name__ == "__main__":
    main()
