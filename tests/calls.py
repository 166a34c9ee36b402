"""A net that is one functional call, and what its tests do with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import linger
from linger.verify import LEVELS

DIALECTS = ("thinker", "standard")


class Calls(nn.Module):
    """``function(net, *inputs)`` on inputs with a grid (bool ones are passed as they are)."""

    def __init__(
        self, function: Callable[..., Any], *parameters: tuple[int, ...], bits: int = 8, **buffers: Tensor
    ) -> None:
        super().__init__()
        self.function, self.bits = function, bits
        for i, shape in enumerate(parameters):
            self.register_parameter(f"w{i}", nn.Parameter(torch.randn(shape) / 2))
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, a: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> Any:
        given = [t for t in (a, b, c) if t is not None]
        return self.function(self, *(self.gridded(t, i) for i, t in enumerate(given)))

    def gridded(self, x: Tensor, i: int) -> Tensor:
        return linger.quant_tensor(self, x, f"in{i}", bits=self.bits) if x.is_floating_point() else x


def samples(shapes: tuple[tuple[int, ...], ...], seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=g) * 2 for s in shapes)


def trained(net: nn.Module, inputs: tuple[Tensor, ...], traced: bool = True, **options: Any) -> nn.Module:
    """The net in fixed point after a few forwards, in eval mode."""
    if traced:
        linger.trace_layers(net, net, inputs)
    net = linger.init(net, **options)
    for _ in range(3):
        net(*inputs)
    return net.eval()


def export(
    net: nn.Module, inputs: tuple[Tensor, ...], path: Path, batch: bool = True, **options: Any
) -> onnx.ModelProto:
    """The file with a dynamic first axis of every input; float islands are an error, as every warning."""
    names = ["a", "b", "c"][: len(inputs)]
    axes = {n: {0: "batch"} for n in names} if batch else None
    return linger.onnx.export(net, inputs, path, input_names=names, dynamic_axes=axes, **options)


def islands(net: nn.Module, inputs: tuple[Tensor, ...], path: Path, **options: Any) -> list[str]:
    """The ops that the export names as float."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        export(net, inputs, path, **options)
    text = " ".join(str(w.message) for w in seen)
    return [part.partition(")")[0] for part in text.split("(")[1:]]


def assert_equal(net: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> int:
    """No differing integer in the runtime (where the file is ours) and in ONNX Runtime at its four levels."""
    report = linger.verify(net, path, inputs, quiet=True)
    assert report.equal, str(report)
    assert set(LEVELS) <= set(report.differing)
    return report.elements


def ops(model: onnx.ModelProto) -> list[str]:
    """The ops that compute, in order: no moves, no Quant and Dequant."""
    quiet = ("Quant", "Dequant", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Expand", "Flatten", "Shape",
             "Gather", "Concat", "Identity", "Tile")  # fmt: skip
    return [n.op_type for n in model.graph.node if n.op_type not in quiet]


def stored(model: onnx.ModelProto) -> Mapping[str, np.ndarray]:
    return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
