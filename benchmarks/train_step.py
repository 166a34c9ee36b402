"""One training step of the float net against the fixed-point net, eager and compiled: ratios, peak memory, kernels.

``python -m benchmarks.train_step [names] [--compile] [--peers] [--json FILE]``; medians of the ratios of interleaved
steps, of seconds on the wall, or with ``--threads 1`` of the processor's, which other programs on the machine change little.

``--peers``: the same steps of other libraries instead, in the same rounds, W8A8 with power-of-two scales. They do less:
``peers.brevitas_nets`` and ``peers.pt2e_nets`` say what stays in float there. Here all is in fixed point, the sums, pools
and functions between the layers too, and batch normalizations are folded, which both peers train as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._common import fixed_of, memory_and_kernels, one_of, over_first, ratios, show, write
from benchmarks.peers import TRAINABLE, NotRun, versions
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


def compiled_float(net: nn.Module, x: Tensor) -> tuple[Callable[[], None], str]:
    """The compiled float net's step; the eager one's, and why, where PyTorch fails to compile it."""
    torch._dynamo.reset()
    step = step_of(torch.compile(net, dynamic=False), x, net)  # type: ignore[arg-type]
    try:
        step()
    except Exception as error:
        return step_of(net, x), f"over the eager float net, for PyTorch does not compile it ({type(error).__name__})"
    return step, ""


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
        base_step, found["why"] = compiled_float(net, x)
        fast = step_of(torch.compile(fixed, dynamic=False), x, fixed)  # type: ignore[arg-type]
        found["compiled"], compiled = ratios(base_step, fast, seconds)
        found["compiled_float_ms"] = 1e3 * compiled
    for m in (net, fixed):
        m.eval()
    with torch.no_grad():
        found["eval"] = ratios(lambda: net(x), lambda: fixed(x), seconds / 2)[0]
    return found


def beside_peers(name: str, compile: bool, seconds: float) -> dict[str, Any]:
    """Time and peak memory of every library's step over those of the float net; why there are none, where there are none."""
    make, shape = MAKERS[name]
    x, net = torch.randn(BATCH, *shape), make()
    steps, why = {"float": step_of(net, x), "linger": step_of(fixed_of(net, x), x)}, {}
    if compile:
        torch._dynamo.reset()
        fixed = fixed_of(net, x)
        steps["linger, compiled"] = step_of(torch.compile(fixed, dynamic=False), x, fixed)  # type: ignore[arg-type]
    for peer, trainable in TRAINABLE.items():
        try:
            steps[peer] = step_of(trainable(net, x), x)
        except NotRun as reason:
            why[peer] = str(reason)
    times, base = over_first(list(steps.values()), seconds)
    bytes_of = [memory_and_kernels(step)[0] for step in steps.values()]
    found = {
        way: {"time": time, "memory": held / bytes_of[0]}
        for way, time, held in zip([*steps][1:], times, bytes_of[1:], strict=True)
    }
    return {"net": name, "float_ms": 1e3 * base, "over_float": found, "why": why}


def show_peers(found: list[dict[str, Any]]) -> None:
    """Time (memory) of one net in a row, and below why a cell is empty."""
    ways = list(dict.fromkeys(way for r in found for way in (*r["over_float"], *r["why"])))
    said = [{w: f"{v['time']:.2f} ({v['memory']:.2f})" for w, v in r["over_float"].items()} for r in found]
    rows = [
        (r["net"], f"{r['float_ms']:.1f} ms", *(s.get(w, "-") for w in ways)) for r, s in zip(found, said, strict=True)
    ]
    title = (
        f"training step, batch {BATCH}: time over float (peak memory over float), {versions() or 'no peer installed'}"
    )
    show(title, ("net", "float", *ways), rows)
    for line in dict.fromkeys(f"{r['net']}, {peer}: {reason}" for r in found for peer, reason in r["why"].items()):
        print(line)


def main(arguments: list[str] | None = None) -> None:
    """Print one row per net."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", type=one_of(MAKERS), default=list(MAKERS))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peers", action="store_true", help="against other libraries, where they are installed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    torch._dynamo.config.allow_rnn = True
    torch.manual_seed(0)
    measure = beside_peers if given.peers else row
    found = [measure(name, given.compile, given.seconds) for name in given.names]
    write(given.json, found)
    (show_peers if given.peers else show_rows)(found)


def show_rows(found: list[dict[str, Any]]) -> None:
    """What was measured of one net in a row."""
    rows = [
        (r["net"], f"{r['float_ms']:.1f} ms", f"{r['eager']:.2f}", f"{r['compiled']:.2f}" if "compiled" in r else "",
         f"{r['memory']:.2f}", "{} -> {}".format(*r["kernels"]), f"{r['eval']:.2f}")
        for r in found
    ]  # fmt: skip
    columns = ("net", "float", "eager", "compiled", "peak memory", "kernels", "eval")
    show(f"training step, batch {BATCH}: fixed point over float, each in its own mode", columns, rows)
    for r in found:
        if r.get("why"):
            print(f"{r['net']}, compiled: {r['why']}")


if __name__ == "__main__":
    main()
