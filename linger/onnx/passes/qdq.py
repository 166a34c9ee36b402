"""Dialect "qdq": float ops between QuantizeLinear and DequantizeLinear, for tool chains that fuse such pairs themselves.

The grids and the stored integers are those of the chip's dialect. QuantizeLinear rounds ties to even and the chip rounds
them up, so this dialect is not exact on ties. A 32-bit value has no QuantizeLinear and stays in float.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from linger.errors import LingerError
from linger.onnx.passes.inline import inlined
from linger.ops import BY_NAME

INTEGERS = {TensorProto.INT8, TensorProto.INT16, TensorProto.INT32}
INT16_OPSET = 21  # the first in which QuantizeLinear knows int16


class _Rewriter:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.graph = model, model.graph
        self.opset = next(i.version for i in model.opset_import if i.domain == "")
        self.stored = {i.name: i for i in model.graph.initializer if i.data_type in INTEGERS}
        self.nodes: list[onnx.NodeProto] = []
        self.added: dict[str, TensorProto] = {}
        self.real: dict[tuple[str, float], str] = {}
        self.grids: dict[str, tuple[float, int]] = {}
        values = [*self.graph.value_info, *self.graph.output]
        self.plain = {v.name for v in values if v.type.tensor_type.elem_type not in INTEGERS}

    def constant(self, name: str, array: np.ndarray) -> str:
        self.added.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def grid(self, node: str, scale: float, dtype: np.dtype[Any]) -> list[str]:
        """Names of the scale (the step, 1 / scale) and the zero point."""
        if dtype == np.int16 and self.opset < INT16_OPSET:
            raise LingerError(
                f"{node}: found 16-bit values, allowed in dialect 'qdq' at opset {self.opset} are 8 bits; "
                f"use opset_version={INT16_OPSET} or more, or another dialect"
            )
        step = self.constant(f"step_{1 / scale!r}", np.array(1 / scale, np.float32))
        return [step, self.constant(f"zero_{dtype}", np.zeros((), dtype))]

    def pair(self, source: str, result: str, scale: float, bits: int) -> None:
        grid = self.grid(result, scale, np.dtype(f"int{bits}"))
        self.nodes.append(helper.make_node("QuantizeLinear", [source, *grid], [f"{result}.q"], name=f"{result}.q"))
        self.nodes.append(helper.make_node("DequantizeLinear", [f"{result}.q", *grid], [result], name=f"{result}.dq"))

    def dequantized(self, name: str, scale: float) -> str:
        """A stored integer tensor as floats."""
        key = (name, scale)
        if key not in self.real:
            dtype = numpy_helper.to_array(self.stored[name]).dtype
            made = f"{name}.dq" if name not in {n for n, _ in self.real} else f"{name}.dq_{len(self.real)}"
            self.nodes.append(
                helper.make_node("DequantizeLinear", [name, *self.grid(name, scale, dtype)], [made], name=made)
            )
            self.real[key] = made
        return self.real[key]

    def rewrite(self, node: onnx.NodeProto) -> None:
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.domain and node.op_type == "Quant":
            self.grids[node.output[0]] = attrs["scale_x"], attrs["data_bits"]
            if attrs["data_bits"] < 32:
                self.pair(node.input[0], node.output[0], attrs["scale_x"], attrs["data_bits"])
                return
        if node.domain and node.op_type in ("Quant", "Dequant"):
            self.nodes.append(helper.make_node("Identity", node.input, node.output, name=node.name))
            return
        for i, name in enumerate(node.input):
            if name in self.stored:
                data = self.grids.get(node.input[0], (1.0, 8))[0]
                node.input[i] = self.dequantized(name, _stored_scale(node.op_type, attrs, i, data))
        self.nodes.append(node)
        before = self.grids.get(node.input[0] if node.input else "")
        grid = (attrs["scale_o"], attrs["o_bits"]) if "scale_o" in attrs else before
        for i, result in enumerate(node.output):
            if grid is not None and grid[1] < 32 and (result not in self.plain or "scale_o" in attrs):
                self.grids[result] = grid
                node.output[i] = f"{result}.real"
                self.pair(f"{result}.real", result, *grid)


def _stored_scale(op_type: str, attrs: Mapping[str, Any], position: int, data: float) -> float:
    """The scale of an integer parameter by its position: operand, weight (or second operand), bias; else the data's."""
    weight = attrs.get("scale_w", attrs.get("scale_y"))
    if weight is None:
        return data
    if "scale_x" not in attrs:  # a table
        return float(weight)
    op = BY_NAME.get(op_type)
    product = op.bias_at if op is not None and op.bias_at else attrs["scale_x"]
    return float((attrs["scale_x"], weight, product * weight)[position])


def qdq(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with bodies on floats, its grids written as QuantizeLinear and DequantizeLinear.

    Raises:
        LingerError: a 16-bit tensor at an opset whose QuantizeLinear has 8 bits only.
    """
    r = _Rewriter(model)
    for node in list(model.graph.node):
        r.rewrite(node)
    del model.graph.node[:]
    model.graph.node.extend(r.nodes)
    model.graph.initializer.extend(r.added.values())
    for info in model.graph.value_info:
        if info.type.tensor_type.elem_type in INTEGERS and info.name not in r.stored:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    return inlined(model)
