"""Evaluating a test set in PyTorch, in ``linger.runtime`` and in ONNX Runtime, float and fixed point.

``python -m benchmarks.runtime [--images N] [--rounds N] [--json FILE]``: the demo's net on real digits, one thread,
seconds of the processor, batches of 100. The outputs in fixed point are compared: all of them have to be equal.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

import linger
from benchmarks._common import clock, fixed_of, interleaved, show, write
from linger.demo import ResidualNet
from linger.demo_data import images
from linger.verify import LEVELS

BATCH = 100
Way = Callable[[], np.ndarray]


def session(path: Path, level: str) -> ort.InferenceSession:
    """One thread on the CPU."""
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def in_torch(net: nn.Module, x: Tensor) -> Way:
    """The eval forward over all of ``x`` (N, ...)."""

    def way() -> np.ndarray:
        with torch.inference_mode():
            return np.concatenate([net(part).numpy() for part in x.split(BATCH)])

    return way


def in_onnx(path: Path, level: str, x: Tensor) -> Way:
    """One session for all batches."""
    runner = session(path, level)
    name = runner.get_inputs()[0].name
    return lambda: np.concatenate([runner.run(None, {name: part.numpy()})[0] for part in x.split(BATCH)])


def in_numpy(path: Path, x: Tensor) -> Way:
    """The reference of every op."""
    model = linger.runtime.load(path)

    def way() -> np.ndarray:
        return np.concatenate([np.asarray(model({model.inputs[0]: part.numpy()})) for part in x.split(BATCH)])

    return way


def files(net: nn.Module, fixed: nn.Module, x: Tensor, folder: Path) -> tuple[Path, Path]:
    """The float net's file as PyTorch writes it, and the fixed-point net's."""
    paths = folder / "float.onnx", folder / "fixed.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        torch.onnx.export(net, (x,), paths[0], dynamo=True, verbose=False)
    linger.onnx.export(fixed, (x,), paths[1])
    return paths


def ways_of(net: nn.Module, fixed: nn.Module, x: Tensor, folder: Path) -> dict[str, Way]:
    """Everything that is compared; ``x`` is whole batches."""
    float_file, fixed_file = files(net, fixed, x[:BATCH], folder)
    ways = {"PyTorch, float": in_torch(net, x), "PyTorch, fixed point": in_torch(fixed, x)}
    ways["linger.runtime, fixed point"] = in_numpy(fixed_file, x)
    for level in ("disable", "all"):
        ways[f"ONNX Runtime, float, {level}"] = in_onnx(float_file, level, x)
        ways[f"ONNX Runtime, fixed point, {level}"] = in_onnx(fixed_file, level, x)
    return ways


def measure(count: int, rounds: int) -> list[dict[str, Any]]:
    """One row per way: ms per 100 images, over PyTorch's float net, and outputs that differ from PyTorch's fixed point."""
    train, _, test, _ = images("mnist")
    x, net = test[:count], ResidualNet()
    fixed = fixed_of(net, x[:BATCH])
    linger.calibrate(fixed, train[: 4 * BATCH].split(BATCH))
    net.eval(), fixed.eval()
    with tempfile.TemporaryDirectory() as folder:
        ways = ways_of(net, fixed, x, Path(folder))
        expected = ways["PyTorch, fixed point"]()
        wrong = {way: int((run() != expected).sum()) for way, run in ways.items() if "fixed" in way}
        seconds = interleaved(ways, rounds, now=clock)
    base, per = seconds["PyTorch, float"], 1e3 * BATCH / len(x)
    return [
        {"way": way, "ms_per_100": per * seen, "over_float": seen / base, "differing": wrong.get(way)}
        for way, seen in seconds.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Print one row per way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000, help="whole hundreds, at most 1000")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    if given.images not in range(BATCH, 1001, BATCH):
        parser.error(f"found --images {given.images}, allowed are whole hundreds up to 1000; choose one of them")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = measure(given.images, given.rounds)
    rows = [
        (r["way"], f"{r['ms_per_100']:.1f}", f"{r['over_float']:.2f}", "" if r["differing"] is None else str(r["differing"]))
        for r in found
    ]  # fmt: skip
    columns = ("way", "ms per 100 images", "over PyTorch, float", "differing outputs")
    show(f"{given.images} digits, the demo's net, batch {BATCH}, one thread", columns, rows)
    write(given.json, found)


if __name__ == "__main__":
    main()
