"""The shape of every value of a file: what ONNX infers, and what the nodes of recurrent layers make, whose bodies loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from linger import runtime
from linger.errors import LingerError
from linger.onnx.writer import UNKNOWN
from linger.targets import known

RECURRENT = ("LSTMInt", "GRUInt", "RNNInt")
DTYPES = {8: TensorProto.INT8, 16: TensorProto.INT16, 32: TensorProto.INT32}


def is_recurrent(op: str) -> bool:
    """Whether this op is a recurrent layer; its name may have a suffix that says which operands it takes."""
    return op.partition("_")[0] in RECURRENT


Feed = Mapping[str, np.ndarray]


def inferred(proto: onnx.ModelProto, feed: Feed | None = None) -> onnx.ModelProto:
    """The model with the shape of every value that can be known; recurrent nodes one after the other.

    ``feed``: inputs on which the file is run where sizes follow from values (the lengths of a packed sequence).
    """
    shaped = _by_rules(proto)
    known = {v.name for v in (*shaped.graph.input, *shaped.graph.value_info, *shaped.graph.output) if _sizes(v)}
    unknown = [n for node in proto.graph.node for n in node.output if n and n not in known]
    if not unknown or not feed or any(i.domain == UNKNOWN for i in proto.opset_import):
        return shaped
    values = _run(proto, feed)
    found = [helper.make_tensor_value_info(n, _dtype(values[n]), values[n].shape) for n in unknown if n in values]
    kept = [v for v in shaped.graph.value_info if v.name not in unknown]
    del shaped.graph.value_info[:]
    shaped.graph.value_info.extend([*kept, *found])
    return shaped


def _dtype(x: np.ndarray) -> int:
    return helper.np_dtype_to_tensor_dtype(x.dtype)


def _run(proto: onnx.ModelProto, feed: Feed) -> Feed:
    """Every value of the file on these inputs; none where it does not run on them."""
    try:
        model = runtime.from_proto(proto)
        model(dict(feed))
    except LingerError:
        return {}
    return model.tensors


def _by_rules(proto: onnx.ModelProto) -> onnx.ModelProto:
    """What follows from shapes alone."""
    while True:
        shaped = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        graph = shaped.graph
        shapes = {v.name: _sizes(v) for v in (*graph.input, *graph.value_info, *graph.output)}
        shapes |= {i.name: tuple(i.dims) for i in graph.initializer}
        new = [
            v
            for node in graph.node
            if is_recurrent(node.op_type)
            for v in _made(node, shapes)
            if not shapes.get(v.name)
        ]
        if not new:
            return shaped
        made = {v.name for v in new}
        kept = [v for v in proto.graph.value_info if v.name not in made]
        del proto.graph.value_info[:]
        proto.graph.value_info.extend([*kept, *new])


def _sizes(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """() where one is not known."""
    sizes = value.type.tensor_type.shape.dim
    return tuple(d.dim_value for d in sizes) if all(d.HasField("dim_value") for d in sizes) else ()


def _made(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[onnx.ValueInfoProto]:
    """y (as x, but for the last axis) and the last states (1, N, size) of a node whose input is known."""
    attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    x, stored = shapes.get(node.input[0], ()), 4 + bool(attrs.get("scale_rw"))
    if len(x) != 3:
        return
    matrix = shapes[node.input[len(node.input) - stored + 1]]
    hidden, out = matrix[0] // {"L": 4, "G": 3, "R": 1}[node.op_type[0]], matrix[1]
    platform = attrs.get("platform", b"venus").decode()
    batch = x[0] if bool(attrs.get("batch_first")) != known(platform).time_swapped else x[1]
    bits = attrs.get("o_bits", 8)
    found = [((*x[:2], out), bits), ((1, batch, out), bits), ((1, batch, hidden), 32)]
    for name, (shape, width) in zip(node.output, found, strict=False):
        if name:
            yield helper.make_tensor_value_info(name, DTYPES[width], shape)
