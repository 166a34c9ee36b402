"""An exported file as facts: every node with the shapes, widths and attributes that limits ask for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from linger.check._net import Origin
from linger.check._shapes import inferred
from linger.check._words import op_name, readable
from linger.errors import LingerError
from linger.onnx.writer import UNKNOWN
from linger.targets import Facts

ENGINE_NAMES = {"x_bits": "data_bits", "w_bits": "parameter_bits", "stride": "strides"}
RENAMED = {"QConv1d": "Conv1dInt", "QConv2d": "Conv2dInt", "QConvBN2d": "Conv2dInt", "QLinear": "LinearInt",
           "QConvTranspose2d": "ConvTranspose2dInt", "QBatchNorm2d": "BatchNorm2dInt", "QAvgPool2d": "AvgPool2dInt",
           "QBmm": "BmmInt", "QAdd": "iqAdd", "QMul": "iqMul", "QCat": "iqCat", "QSigmoid": "iqSigmoid", "QTanh": "iqTanh",
           "QSoftmax": "SoftmaxInt", "QLSTM": "LSTMInt", "QGRU": "GRUInt", "QLayerNorm2d": "LayerNormInt"}  # fmt: skip
FEW = 16
WIDTHS = {"int8": 8, "int16": 16, "int32": 32}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A value of the file: its name, shape, NumPy type, whether the file stores it, and a few sizes or indices it holds."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: bool = False
    values: tuple[int, ...] = ()

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bytes(self) -> int:
        """Its size as the file has it."""
        return self.elements * np.dtype(self.dtype).itemsize

    @property
    def bits(self) -> int:
        """Width of a fixed-point value, 0 for any other."""
        return WIDTHS.get(self.dtype, 0)


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node.

    Attributes:
        name: its name in the file.
        layer: the dotted name that the user knows it by.
        op: op type; ``called`` is what the user called.
        domain: "" for standard ONNX.
        module: whether it is a layer of the net, not a call.
        source: file and line of a call.
        why: why it has no form, "" where it has one.
    """

    name: str
    layer: str
    op: str
    called: str
    module: bool
    source: str
    why: str
    domain: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attrs: Mapping[str, Any]

    @property
    def unknown(self) -> bool:
        """Whether it has no form in a file."""
        return self.domain == UNKNOWN

    @property
    def facts(self) -> Facts:
        """What limits are measured on."""
        return Facts(
            op=self.op, shapes=tuple(t.shape for t in self.inputs), out=self.outputs[0].shape, attrs=self.attrs,
            bits=tuple(t.bits for t in self.inputs), constant=tuple(t.stored for t in self.inputs),
            out_bits=self.outputs[0].bits, values=tuple(t.values for t in self.inputs),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class File:
    """A file as nodes in order. ``accumulators``: layer -> the largest |sum| that any input can make, in LSB."""

    nodes: tuple[Node, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    accumulators: Mapping[str, int]
    target: str


def facts_of(
    proto: onnx.ModelProto, sizes: Mapping[str, int] | None = None, origins: Mapping[str, Origin] | None = None,
    inputs: Sequence[np.ndarray] = (),
) -> File:  # fmt: skip
    """Read a model. ``sizes``: name of a dynamic axis -> its size. ``origins``: node -> where it comes from.

    ``inputs``: one for every input, where sizes may follow from values.

    Raises:
        LingerError: the shape of a value is not known.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    _fix(fixed, sizes or {})
    names = [i.name for i in proto.graph.input]
    graph = inferred(fixed, dict(zip(names, inputs, strict=False))).graph
    values = {v.name: _declared(v) for v in (*graph.input, *graph.value_info, *graph.output)}
    stored = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    values |= {
        n: Tensor(name=n, shape=a.shape, dtype=str(a.dtype), stored=True, values=_few(a)) for n, a in stored.items()
    }
    nodes = tuple(_node(n, values, (origins or {}).get(n.name)) for n in graph.node)
    meta = {m.key: m.value for m in proto.metadata_props}
    sums = json.loads(meta.get("accumulators", "{}"))
    return File(
        nodes=nodes, inputs=_tensors([i.name for i in graph.input if i.name not in stored], values),
        outputs=_tensors([o.name for o in graph.output], values),
        accumulators={readable(name): int(said["peak"]) for name, said in sums.items()}, target=meta.get("target", ""),
    )  # fmt: skip


def _few(array: np.ndarray) -> tuple[int, ...]:
    """The sizes or indices in a short array."""
    return tuple(map(int, array.reshape(-1))) if array.dtype == np.int64 and array.size <= FEW else ()


def _fix(proto: onnx.ModelProto, sizes: Mapping[str, int]) -> None:
    """Give every named axis of the inputs a size, and forget what was said of the values inside."""
    named = {d.dim_param for v in proto.graph.input for d in v.type.tensor_type.shape.dim if d.dim_param}
    unknown = sorted(named - sizes.keys())
    if unknown:
        raise LingerError(
            f"found the dynamic axis {unknown[0]!r}, allowed are fixed sizes; pass an input, whose sizes are then taken"
        )
    for value in (*proto.graph.input, *proto.graph.value_info, *proto.graph.output):
        for d in value.type.tensor_type.shape.dim:
            if d.dim_param in sizes:
                d.dim_value = sizes[d.dim_param]


def _declared(value: onnx.ValueInfoProto) -> Tensor | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or any(not d.HasField("dim_value") for d in tensor.shape.dim):
        return None
    dtype = str(np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)))
    return Tensor(name=value.name, shape=tuple(d.dim_value for d in tensor.shape.dim), dtype=dtype)


def _node(node: onnx.NodeProto, values: Mapping[str, Tensor | None], origin: Origin | None) -> Node:
    attrs = {ENGINE_NAMES.get(a.name, a.name): _attribute(a) for a in node.attribute}
    for name in (*node.input, *node.output):
        if name and values.get(name) is None:
            raise LingerError(
                f"{node.name}: the shape of {name!r} is not known; export with fixed sizes, or pass the net itself"
            )
    op = RENAMED.get(node.op_type, node.op_type)
    own = origin is not None and not node.name.endswith((".quant", ".dequant", ".requant"))
    return Node(
        name=node.name, layer=readable(origin.name if origin and own else node.name), op=op,
        called=origin.op if origin and own else op_name(op), module=origin.module if origin and own else bool(node.input[1:]),
        source=origin.source if origin and own else "", why=origin.why if origin and own else "",
        domain=node.domain if node.domain != "ai.onnx" else "",
        inputs=_tensors(node.input, values), outputs=_tensors(node.output, values), attrs=attrs,
    )  # fmt: skip


def _tensors(names: Sequence[str], values: Mapping[str, Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(t for t in (values[n] for n in names if n) if t is not None)


def _attribute(a: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(a)
    if isinstance(value, bytes):
        return value.decode()
    return tuple(value) if isinstance(value, (list, tuple)) or hasattr(value, "append") else value
