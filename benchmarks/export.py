"""Time to convert and to export a net, and to evaluate the file in ONNX Runtime and in ``linger.runtime``."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import torch

import linger
from benchmarks._common import interleaved, show
from linger.verify import session
from tests.nets import NETS

BATCH, ROUNDS = 8, 7


def row(name: str, folder: Path) -> tuple[str, ...]:
    """One net of ``tests/nets.py``: seconds to convert and export, then evaluation against the float net in PyTorch."""
    make, shape = NETS[name]
    x = torch.randn(BATCH, *shape)
    net, plain = make(), make().eval()
    start = time.perf_counter()
    linger.trace_layers(net, net, x)
    linger.init(net)
    converted = time.perf_counter()
    net(x)
    net.eval()
    begun = time.perf_counter()
    model: onnx.ModelProto = linger.onnx.export(net, (x,), folder / "net.onnx")
    exported = time.perf_counter()
    runner, reference = session(model, "all"), linger.runtime.load(folder / "net.onnx")
    feed: dict[str, Any] = {reference.inputs[0]: x.numpy()}
    with torch.no_grad():
        seconds = interleaved(
            {
                "float": lambda: plain(x),
                "eval": lambda: net(x),
                "onnx": lambda: runner.run(None, feed),
                "runtime": lambda: reference(feed),
            },
            ROUNDS,
        )
    ratios = [f"{seconds[key] / seconds['float']:.2f}" for key in ("eval", "onnx", "runtime")]
    return name, f"{converted - start:.2f} s", f"{exported - begun:.2f} s", *ratios


def main() -> None:
    """Print one row per net."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(name, Path(folder)) for name in NETS]
    columns = ("net", "convert", "export", "PyTorch eval / float", "ONNX Runtime / float", "linger.runtime / float")
    show(f"export and evaluation, batch {BATCH}; float is PyTorch's float net", columns, rows)


if __name__ == "__main__":
    main()
