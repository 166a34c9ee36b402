"""What the benchmarks share: the machine's description, a net in fixed point, interleaved timing, memory, rows as JSON."""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import linger
from linger.files import whole


def machine() -> str:
    """Processor, threads and versions, one line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return (
        f"{name}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    )


def clock() -> float:
    """Seconds of the processor on one thread, since others may use the cores; else of the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def interleaved(
    tasks: Mapping[str, Callable[[], object]], rounds: int, warm: int = 2, now: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each task, as ``now`` counts them; every round runs all of them once, so that a slow moment hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for i in range(warm + rounds):
        for name, task in tasks.items():
            start = now()
            task()
            if i >= warm:
                times[name].append(now() - start)
    return {name: statistics.median(seen) for name, seen in times.items()}


def ratios(a: Callable[[], object], b: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Median of b's time over a's in interleaved runs, and a's median; at least 7 rounds."""
    (ratio,), base = over_first((a, b), seconds)
    return ratio, base


def over_first(tasks: Sequence[Callable[[], object]], seconds: float) -> tuple[list[float], float]:
    """Median of every other task's time over the first's in the same round, and the first's median; at least 7 rounds."""
    found: list[list[float]] = []
    start = time.perf_counter()
    for _ in range(3):
        for task in tasks:
            task()
    while len(found) < 7 or time.perf_counter() - start < seconds:
        times = [clock()]
        for task in tasks:
            task()
            times.append(clock())
        found.append([after - before for before, after in pairwise(times)])
    others = range(1, len(tasks))
    return [statistics.median(t[i] / t[0] for t in found) for i in others], statistics.median(t[0] for t in found)


def memory_and_kernels(step: Callable[[], None]) -> tuple[int, int]:
    """The most bytes that tensors of one step hold at once, and how many kernels it runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    held = most = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most, sum(e.count for e in seen.key_averages() if e.key.startswith("aten::"))


def fixed_of(net: nn.Module, x: Tensor) -> nn.Module:
    """A copy of the float net in fixed point, traced with ``x`` (N, ...)."""
    fixed = copy.deepcopy(net)
    linger.trace_layers(fixed, fixed, x)
    return linger.init(fixed)


def one_of(allowed: Collection[str]) -> Callable[[str], str]:
    """A type for argparse, whose ``choices`` refuse the default of a list of names before Python 3.12."""

    def name(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(f"found {text}, allowed are {', '.join(allowed)}; choose among them")
        return text

    return name


def show(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table below the machine's line."""
    console = Console()
    console.print(machine(), highlight=False)
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def write(path: Path | None, rows: list[dict[str, Any]]) -> None:
    """The machine and the unrounded figures as JSON; None writes nothing."""
    if path is not None:
        with whole(path) as out:
            out.write((json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n").encode())
