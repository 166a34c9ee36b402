"""Accuracy of every way of quantizing on every task, each exported and compared with its file.

.venv/bin/python -m benchmarks.accuracy --write docs/accuracy.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

import linger
from benchmarks._common import machine
from benchmarks.accuracy.tasks import TASKS, Task, accuracy, data_of
from benchmarks.accuracy.ways import WAYS, Bits, Job, train
from linger.demo_data import Split

VERIFIED = 500  # test inputs that go through all five runners
MARK = "<!-- what the command printed -->"
NONE = "-"
console = Console(stderr=True)


def differing(net: nn.Module, data: Split) -> int:
    """Integers that differ between PyTorch and the file, over all runners."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error", linger.LingerWarning)  # a float island would be a lie in the table
        path = Path(folder) / "net.onnx"
        linger.onnx.export(net, (data[2][:1],), path, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
        report = linger.verify(net, path, data[2][:VERIFIED], quiet=True)
    return sum(report.differing.values())


def cell(name: str, job: Job) -> str:
    """Accuracy of one way, "-" where it has nothing to do; an error where the file differs."""
    if job.bits[1] > 8 and name.startswith("QAT"):
        return NONE  # wide activations are for nets that are not trained again
    start = time.perf_counter()
    torch.manual_seed(job.seed)
    try:
        net = WAYS[name](job)
    except linger.LingerError as error:
        if "no two layers" not in str(error):
            raise
        return NONE
    found, wrong = accuracy(net, job.data), differing(net, job.data)
    if wrong:
        raise SystemExit(f"{job.task.name}, {name}, {job.bits}: {wrong} integers differ")
    console.print(
        f"{job.task.name} W{job.bits[0]}A{job.bits[1]} {name}: {found:.2f} % ({time.perf_counter() - start:.0f} s)"
    )
    return f"{found:.1f}"


def table(task: Task, bits: list[Bits], seed: int, data: str, limit: int | None) -> str:
    """One task as a Markdown table."""
    split = data_of(task, data, limit)
    torch.manual_seed(seed)
    net = train(task.make(), split, task.epochs, task.rate, seed)
    base = accuracy(net, split)
    console.print(f"{task.name} float: {base:.2f} %")
    size = sum(p.numel() for p in net.parameters())
    lines = [
        f"### {task.name}",
        "",
        f"{(task.make.__doc__ or '').strip()} {size:,} parameters; float {base:.1f} %.",
        "",
    ]
    lines += ["| | " + " | ".join(f"W{w}A{a}" for w, a in bits) + " |", "|---|" + "---:|" * len(bits)]
    jobs = [Job(task=task, net=net, data=split, bits=b, seed=seed) for b in bits]
    for name in WAYS:
        lines.append(f"| {name} | " + " | ".join(cell(name, job) for job in jobs) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--bits", nargs="+", default=["8/8", "4/8", "8/16"], help="weights/activations")
    parser.add_argument("--data", default="mnist", help="mnist, fashion or a directory of idx files")
    parser.add_argument("--limit", type=int, help="training images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="a Markdown file; what follows its mark is replaced")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bits: list[Bits] = [(int(w), int(a)) for w, a in (text.split("/") for text in options.bits)]
    start = time.perf_counter()
    tables = [table(TASKS[name], bits, options.seed, options.data, options.limit) for name in options.tasks]
    command = "python -m benchmarks.accuracy " + " ".join(a for a in sys.argv[1:] if a)
    said = f"`{command.strip()}` in {time.perf_counter() - start:.0f} s on {machine()}."
    text = "\n".join([said, "", "0 integers differ in every cell.", "", *tables])
    print(text)
    if options.write:
        head = options.write.read_text("utf-8").partition(MARK)[0]
        options.write.write_text(f"{head}{MARK}\n\n{text}", "utf-8")


if __name__ == "__main__":
    main()
