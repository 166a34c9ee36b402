"""Time to convert and to export a net, and to evaluate the file in ONNX Runtime and in ``linger.runtime``.

``python -m benchmarks.export [names] [--json FILE]``
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import torch

import linger
from benchmarks._common import interleaved, one_of, show, write
from linger.verify import session
from tests.nets import NETS

BATCH, ROUNDS = 8, 7


def row(name: str, folder: Path) -> dict[str, Any]:
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
    found: dict[str, Any] = {"net": name, "convert_s": converted - start, "export_s": exported - begun}
    return found | {key: seconds[key] / seconds["float"] for key in ("eval", "onnx", "runtime")}


def main(arguments: list[str] | None = None) -> None:
    """Print one row per net."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", type=one_of(NETS), default=list(NETS))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        found = [row(name, Path(folder)) for name in given.names]
    rows = [
        (r["net"], f"{r['convert_s']:.2f} s", f"{r['export_s']:.2f} s", *(f"{r[k]:.2f}" for k in ("eval", "onnx", "runtime")))
        for r in found
    ]  # fmt: skip
    columns = ("net", "convert", "export", "PyTorch eval / float", "ONNX Runtime / float", "linger.runtime / float")
    show(f"export and evaluation, batch {BATCH}; float is PyTorch's float net", columns, rows)
    write(given.json, found)


if __name__ == "__main__":
    main()
