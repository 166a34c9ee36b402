"""Evaluating a test set in PyTorch, in ``linger.runtime`` and in ONNX Runtime, float and fixed point.

``python -m benchmarks.runtime [--net NAME] [--images N] [--rounds N] [--json FILE]``: the demo's net on real digits, or a
net of ``train_step`` on noise, one thread, seconds of the processor, batches of 100. The outputs in fixed point are
compared: all of them have to be equal. Below, where ``linger.runtime`` spends its time.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

import linger
from benchmarks._common import clock, fixed_of, interleaved, show, write
from benchmarks.train_step import MAKERS
from linger.demo import ResidualNet
from linger.demo_data import images
from linger.verify import LEVELS

BATCH = 100
DEMO = "demo"
FIXED = "fixed.onnx"
RUNTIME = "linger.runtime, fixed point"
SLOWEST = 5  # op types that are listed
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
    paths = folder / "float.onnx", folder / FIXED
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        torch.onnx.export(net, (x,), paths[0], dynamo=True, verbose=False)
    linger.onnx.export(fixed, (x,), paths[1])
    return paths


def ways_of(net: nn.Module, fixed: nn.Module, x: Tensor, folder: Path) -> dict[str, Way]:
    """Everything that is compared; ``x`` is whole batches."""
    float_file, fixed_file = files(net, fixed, x[:BATCH], folder)
    ways = {"PyTorch, float": in_torch(net, x), "PyTorch, fixed point": in_torch(fixed, x)}
    ways[RUNTIME] = in_numpy(fixed_file, x)
    for level in ("disable", "all"):
        ways[f"ONNX Runtime, float, {level}"] = in_onnx(float_file, level, x)
        ways[f"ONNX Runtime, fixed point, {level}"] = in_onnx(fixed_file, level, x)
    return ways


def by_op(path: Path, x: Tensor) -> dict[str, float]:
    """Seconds of ``linger.runtime`` on all of ``x`` by op type, the slowest first."""
    model, spent = linger.runtime.load(path), Counter[str]()

    def timed(op: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            start = clock()
            made = step(*given)
            spent[op] += clock() - start  # type: ignore[assignment]
            return made

        return run

    model.steps = [(node, timed(node.op_type, step)) for node, step in model.steps]
    for part in x.split(BATCH):
        model({model.inputs[0]: part.numpy()})
    return dict(spent.most_common())


def net_and_data(name: str, count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The net, what to calibrate with, and what to evaluate."""
    if name == DEMO:
        train, _, test, _ = images("mnist")
        return ResidualNet(), train[: 4 * BATCH], test[:count]
    make, shape = MAKERS[name]
    return make(), torch.randn(4 * BATCH, *shape), torch.randn(count, *shape)


def measure(name: str, count: int, rounds: int) -> list[dict[str, Any]]:
    """One row per way: ms per 100 inputs, over PyTorch's float net, and outputs that differ from PyTorch's fixed point."""
    net, train, x = net_and_data(name, count)
    fixed = fixed_of(net, x[:BATCH])
    linger.calibrate(fixed, train.split(BATCH))
    net.eval(), fixed.eval()
    with tempfile.TemporaryDirectory() as folder:
        ways = ways_of(net, fixed, x, Path(folder))
        expected = ways["PyTorch, fixed point"]()
        wrong = {way: int((run() != expected).sum()) for way, run in ways.items() if "fixed" in way}
        seconds = interleaved(ways, rounds, now=clock)
        ops = by_op(Path(folder) / FIXED, x)
    base, per = seconds["PyTorch, float"], 1e3 * BATCH / len(x)
    rows: list[dict[str, Any]] = [
        {"net": name, "way": way, "ms_per_100": per * seen, "over_float": seen / base, "differing": wrong.get(way)}
        for way, seen in seconds.items()
    ]
    next(r for r in rows if r["way"] == RUNTIME)["ops"] = {op: per * spent for op, spent in ops.items()}
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Print one row per way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--net", choices=[DEMO, *MAKERS], default=DEMO)
    parser.add_argument("--images", type=int, default=1000, help="inputs: whole hundreds, at most 1000")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    if given.images not in range(BATCH, 1001, BATCH):
        parser.error(f"found --images {given.images}, allowed are whole hundreds up to 1000; choose one of them")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = measure(given.net, given.images, given.rounds)
    rows = [
        (r["way"], f"{r['ms_per_100']:.1f}", f"{r['over_float']:.2f}", "" if r["differing"] is None else str(r["differing"]))
        for r in found
    ]  # fmt: skip
    columns = ("way", "ms per 100", "over PyTorch, float", "differing outputs")
    show(f"{given.net}, {given.images} inputs, batch {BATCH}, one thread", columns, rows)
    ops = next(r["ops"] for r in found if r["way"] == RUNTIME)
    print("linger.runtime:", ", ".join(f"{op} {ms:.2f} ms" for op, ms in [*ops.items()][:SLOWEST]))
    write(given.json, found)


if __name__ == "__main__":
    main()
