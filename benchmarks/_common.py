"""What the benchmarks share: the machine's description and interleaved timing."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from rich.console import Console
from rich.table import Table


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
        path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", "utf-8")
