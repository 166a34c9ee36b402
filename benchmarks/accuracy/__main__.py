"""Accuracy of every way of quantizing on every task and seed, each exported and compared with its file.

.venv/bin/python -m benchmarks.accuracy --data fashion --limit 10000 --write docs/accuracy.md
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import linger
from benchmarks._common import machine
from benchmarks.accuracy.peers import PEERS
from benchmarks.accuracy.results import BASE, Cell, Results, aims, table
from benchmarks.accuracy.results import FLOAT as FLOAT_BITS
from benchmarks.accuracy.tasks import TASKS, Task, accuracy, data_of
from benchmarks.accuracy.ways import FLOAT, LATER, WAYS, WIDE, Bits, Job, Start, train
from benchmarks.peers import NotRun, versions
from linger.demo_data import Split
from linger.files import whole

VERIFIED = 500  # test inputs that go through all five runners
MARK = "<!-- what the command printed -->"
console = Console(stderr=True)


def differing(net: nn.Module, data: Split) -> int:
    """Integers that differ between PyTorch and the file, over all runners."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error", linger.LingerWarning)  # a float island would be a lie in the table
        path = Path(folder) / "net.onnx"
        linger.onnx.export(net, (data[2][:1],), path, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
        report = linger.verify(net, path, data[2][:VERIFIED], quiet=True)
    return sum(report.differing.values())


def cell(name: str, way: Start, job: Job) -> Cell:
    """Accuracy of one way; an error where its file differs."""
    start, found, why = time.perf_counter(), None, ""
    torch.manual_seed(job.seed)
    try:
        net = way(job)
        found = accuracy(net, job.data)
        wrong = differing(net, job.data) if name in WAYS else 0
    except NotRun as reason:
        why, wrong = str(reason), 0
    except linger.LingerError as error:
        if "no two layers" not in str(error):
            raise
        why, wrong = "no two layers between which channels can be scaled", 0
    if wrong:
        raise SystemExit(f"{job.task.name}, {name}, {job.bits}: {wrong} integers differ")
    seconds = time.perf_counter() - start
    said = why if found is None else f"{found:.2f} % ({seconds:.0f} s)"
    console.print(f"{job.task.name} seed {job.seed} W{job.bits[0]}A{job.bits[1]} {name}: {said}", highlight=False)
    return Cell(
        task=job.task.name, seed=job.seed, way=name, bits=job.bits, accuracy=found, seconds=seconds, why=why
    )  # fmt: skip


def wanted(widths: list[Bits], options: argparse.Namespace) -> list[tuple[str, Start, Bits]]:
    """Every cell of a task and seed, in the order of the table."""
    cells = [(name, way, FLOAT_BITS) for name, way in FLOAT.items()]
    for name, way in (WAYS | (PEERS if options.peers else {})).items():
        wide = name in WIDE or name.endswith(", PTQ")  # nets of wide activations need no training
        cells += [(name, way, b) for b in widths if (b[1] <= 8 or wide) and (b[0] == 4 or not name.endswith("mixed"))]
    return [c for c in cells if c[0] == BASE or not options.ways or c[0] in options.ways]


def measure(task: Task, seed: int, widths: list[Bits], results: Results, options: argparse.Namespace) -> None:
    """One task and seed: the cells that are missing."""
    cells = [c for c in wanted(widths, options) if (task.name, seed, c[0], c[2]) not in results.cells]
    if not cells:
        return
    split = data_of(task, options.data, options.limit)
    torch.manual_seed(seed)
    start = time.perf_counter()
    net = train(task.make(), split, task.epochs, task.rate, seed)
    console.print(f"{task.name} seed {seed}: float net in {time.perf_counter() - start:.0f} s", highlight=False)
    shared: dict[str, Any] = {}
    for name, way, bits in cells:
        results.add(cell(name, way, Job(task=task, net=net, data=split, bits=bits, seed=seed, shared=shared)))


def page(results: Results, widths: list[Bits], options: argparse.Namespace) -> str:
    """All tables, and what they were made with."""
    command = shlex.join(["python", "-m", "benchmarks.accuracy", *sys.argv[1:]])
    said = (
        f"`{command}`, {results.seconds():,.0f} s without the float nets, on {machine()}, {versions() or 'no peers'}."
    )
    parts = [said, "", "0 integers differ in every cell of linger's.", "", aims(results, options.tasks)]
    for name in options.tasks:
        if any(results.of(name, BASE, FLOAT_BITS)):
            parts.append(table(results, name, about(TASKS[name], options), [*FLOAT, *WAYS, *PEERS], widths))
    return "\n".join(parts)


def about(task: Task, options: argparse.Namespace) -> str:
    """The net, its data and their sizes."""
    split = data_of(task, options.data, options.limit)
    size = sum(p.numel() for p in task.make().parameters())
    what = f"{options.data} images" if task.about == "images" else task.about
    return (
        f"{(task.make.__doc__ or '').strip()} {size:,} parameters. Data: {what}; {len(split[0]):,} to train, "
        f"{len(split[2]):,} to test; {task.epochs} epochs in float, {LATER} later."
    )


def width(text: str) -> Bits:
    """8/16: bits of weights, of activations."""
    weights, data = text.split("/")
    return int(weights), int(data)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--ways", nargs="+", choices=[*FLOAT, *WAYS, *PEERS], help="rows; all of them by default")
    parser.add_argument(
        "--bits", nargs="+", type=width, default=[(8, 8), (4, 8), (8, 16)], help="weights/activations, such as 8/16"
    )
    parser.add_argument("--data", default="mnist", help="of the image nets: mnist, fashion or a directory of idx files")
    parser.add_argument("--limit", type=int, help="training inputs of every task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="other libraries too")
    parser.add_argument("--results", type=Path, default=Path("linger-benchmark/accuracy.jsonl"))
    parser.add_argument("--write", type=Path, help="a Markdown file that exists; what follows its mark is replaced")
    options = parser.parse_args(arguments)
    if options.write and not options.write.is_file():
        parser.error(f"found no file {options.write}, allowed is one that exists; make it, or leave --write out")
    return options


def run(options: argparse.Namespace) -> None:
    """Every task and seed; after each of them the tables of what there is."""
    results = Results(options.results, {"data": options.data, "limit": options.limit})
    text = ""
    for seed in range(options.seeds):
        for name in options.tasks:
            measure(TASKS[name], seed, options.bits, results, options)
            text = page(results, options.bits, options)
            if options.write:
                head = options.write.read_text("utf-8").partition(MARK)[0]
                with whole(options.write) as out:
                    out.write(f"{head}{MARK}\n\n{text}".encode())
    print(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and print."""
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    try:
        run(options)
    except linger.LingerError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
