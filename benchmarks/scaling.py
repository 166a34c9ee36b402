"""Does fixed point cost more as a net grows? Ratios of a training step and of its memory over widths, depths and batches.

``python -m benchmarks.scaling [--threads N] [--seconds S] [--json FILE]``: convolution, batch normalization and relu, eager.
``--ranks 2``: instead, DistributedDataParallel over gloo with one thread per process, the batch being that of each rank.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks._common import fixed_of, memory_and_kernels, ratios, show, write
from benchmarks.train_step import step_of

WIDTH, DEPTH, BATCH, SIZE = 32, 6, 16, 24
GROWN = {"width": (16, 32, 64), "depth": (3, 6, 12), "batch": (8, 16, 32)}


def net_of(width: int, depth: int) -> nn.Sequential:
    """(N, width, SIZE, SIZE) -> the same shape."""
    block = [(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()) for _ in range(depth)]
    return nn.Sequential(*(layer for layers in block for layer in layers))


def pair(width: int, depth: int, batch: int) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """The float net, the same in fixed point, and a batch."""
    net, x = net_of(width, depth), torch.randn(batch, width, SIZE, SIZE)
    return net, fixed_of(net, x), x


def row(what: str, value: int, seconds: float) -> dict[str, Any]:
    """One size: the float step's time, and the ratios."""
    size = {"width": WIDTH, "depth": DEPTH, "batch": BATCH} | {what: value}
    net, fixed, x = pair(size["width"], size["depth"], size["batch"])
    steps = step_of(net, x), step_of(fixed, x)
    ratio, base = ratios(*steps, seconds)
    (bytes_a, kernels_a), (bytes_b, kernels_b) = map(memory_and_kernels, steps)
    more = (kernels_b - kernels_a) / size["depth"]
    return {
        "size": f"{what} {value}",
        "float_ms": 1e3 * base,
        "time": ratio,
        "memory": bytes_b / bytes_a,
        "kernels": more,
    }


def together(steps: list[Callable[[], None]], seconds: float) -> list[list[float]]:
    """Seconds on the wall of interleaved steps; rank 0 says how long, and nobody starts before all are there."""
    times: list[list[float]] = [[] for _ in steps]
    begun, going = time.perf_counter(), torch.ones(1)
    while going.item():
        for step, seen in zip(steps, times, strict=True):
            dist.barrier()
            start = time.perf_counter()
            step()
            seen.append(time.perf_counter() - start)
        going.fill_(float(len(times[0]) < 9 or time.perf_counter() - begun < seconds))
        dist.broadcast(going, 0)
    return [seen[2:] for seen in times]


def rank_of(rank: int, ranks: int, folder: str, depth: int, seconds: float) -> None:
    """What one process does; rank 0 writes what it measured."""
    if any(interface == "lo" for _, interface in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{depth}", rank=rank, world_size=ranks)
    net, fixed, x = pair(WIDTH, depth, BATCH)
    base, ours = together([step_of(DistributedDataParallel(m), x) for m in (net, fixed)], seconds)
    ratio = statistics.median(b / a for a, b in zip(base, ours, strict=True))
    found = {"depth": depth, "ranks": ranks, "float_ms": 1e3 * statistics.median(base), "time": ratio}
    found["fixed_ms"] = 1e3 * statistics.median(ours)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found), "utf-8")
    dist.barrier()
    dist.destroy_process_group()


def parallel(depth: int, ranks: int, seconds: float) -> dict[str, Any]:
    """Float and fixed-point DistributedDataParallel in ``ranks`` processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_of, (ranks, folder, depth, seconds), nprocs=ranks)
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text("utf-8"))
        return found


def show_ranks(most: int, depths: tuple[int, ...], seconds: float) -> list[dict[str, Any]]:
    """One row per depth and number of processes."""
    found = [parallel(depth, n, seconds) for depth in depths for n in range(1, most + 1)]
    rows = [
        (f"depth {r['depth']}, {r['ranks']} ranks", f"{r['float_ms']:.1f} ms", f"{r['fixed_ms']:.1f} ms", f"{r['time']:.2f}")
        for r in found
    ]  # fmt: skip
    title = f"DistributedDataParallel over gloo, width {WIDTH}, batch {BATCH} on each rank, one thread each, wall"
    show(title, ("size", "float", "fixed point", "time"), rows)
    return found


def show_sizes(what: dict[str, tuple[int, ...]], seconds: float) -> list[dict[str, Any]]:
    """One row per size."""
    found = [row(name, value, seconds) for name, values in what.items() for value in values]
    rows = [
        (r["size"], f"{r['float_ms']:.1f} ms", f"{r['time']:.2f}", f"{r['memory']:.2f}", f"{r['kernels']:.0f}") for r in found
    ]  # fmt: skip
    columns = ("size", "float", "time", "peak memory", "more kernels per layer")
    show(f"width {WIDTH}, depth {DEPTH}, batch {BATCH}, one of them grown", columns, rows)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Print one row per size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--ranks", type=int, help="processes; 1 to this many are measured")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    found = show_ranks(given.ranks, GROWN["depth"], given.seconds) if given.ranks else show_sizes(GROWN, given.seconds)
    write(given.json, found)


if __name__ == "__main__":
    main()
