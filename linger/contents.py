"""What is in a file: its signature, ops and grids, parameters, the certificate of its accumulators, what it says of itself."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Group
from rich.table import Table

from linger import runtime
from linger.check._words import readable
from linger.errors import LingerError, during
from linger.onnx.golden import damaged, stored
from linger.plain import text_of
from linger.targets._words import bytes_text

INTEGERS = {TensorProto.INT8: 8, TensorProto.INT16: 16, TensorProto.INT32: 32}


@dataclass(frozen=True, kw_only=True)
class Value:
    """A tensor of the file. ``shape``: sizes, or names of dynamic ones. ``scale``: real = integer / scale, None off a grid."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    scale: float | None = None
    bits: int = 0


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A node: what it reads and makes; ``sum_bits``: width that its accumulator needs at most, 0 where it has none."""

    name: str
    op: str
    inputs: tuple[str, ...]
    output: Value
    parameters: int
    sum_bits: int
    attributes: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """All of it. ``golden``: shape by name of the golden inputs, None where the file holds none."""

    path: str
    producer: str
    target: str
    dialect: str
    opset: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    operations: tuple[Operation, ...]
    ops: Mapping[str, int]
    parameters: tuple[Value, ...]
    parameter_bytes: int
    float_islands: tuple[str, ...]
    golden: Mapping[str, tuple[int, ...]] | None
    damaged: tuple[str, ...]

    def __str__(self) -> str:
        return text_of(lambda console: console.print(self.rendered()))

    def rendered(self) -> Group:
        """A table of the nodes between two paragraphs."""
        head = f"{self.path}: {self.producer}, target {self.target}, dialect {self.dialect}, opset {self.opset}\n"
        head += f"takes {_listed(self.inputs)}, returns {_listed(self.outputs)}"
        table = Table("node", "op", "output", "type", "grid")
        for title in ("sum", "parameters"):
            table.add_column(title, justify="right")
        for o in self.operations:
            table.add_row(
                _plain(readable(o.name)), o.op, "x".join(map(str, o.output.shape)), o.output.dtype, _grid(o.output),
                f"{o.sum_bits} bits" if o.sum_bits else "", f"{o.parameters:,}" if o.parameters else "",
            )  # fmt: skip
        return Group(_plain(head), table, _plain("\n".join(self._foot())))

    def _foot(self) -> list[str]:
        lines = [f"{bytes_text(self.parameter_bytes)} in {len(self.parameters)} stored tensors"]
        lines += [f"in float: {', '.join(self.float_islands)}"] if self.float_islands else []
        if self.golden is not None:
            shapes = ", ".join(f"{k} {'x'.join(map(str, v))}" for k, v in self.golden.items())
            lines.append(f"holds golden inputs ({shapes}); linger verify compares them")
        lines += [f"damaged since export: {', '.join(self.damaged)}"] if self.damaged else []
        return lines


def _plain(text: str) -> str:
    return text.replace("[", "\\[")


def _grid(v: Value) -> str:
    mantissa, n = np.frexp(v.scale or 1.0)
    step = f"2^{1 - int(n)}" if mantissa == 0.5 else f"{1 / (v.scale or 1.0):g}"
    return "" if v.scale is None else f"{v.bits} bits, step {step}"


def _listed(values: tuple[Value, ...]) -> str:
    return ", ".join(f"{v.name} {v.dtype} {'x'.join(map(str, v.shape))}" for v in values)


def contents(path: str | os.PathLike[str] | onnx.ModelProto) -> Contents:
    """Read a file that linger exported, of any dialect; nothing of it is run.

    Raises:
        LingerError: it is missing, truncated, or not an ONNX file.
    """
    with during("inspect"):
        proto = path if isinstance(path, onnx.ModelProto) else runtime.read(path)
        name = "the model" if isinstance(path, onnx.ModelProto) else os.fspath(path)
        if not proto.graph.node:
            raise LingerError(f"{name!r} is truncated or empty: it has no nodes; export it again")
        try:
            return _contents(proto, name)
        except LingerError:
            raise
        except runtime.BROKEN as error:
            raise LingerError(f"{name!r} is damaged ({error}); export it again") from None


def _contents(proto: onnx.ModelProto, name: str) -> Contents:
    props = {p.key: p.value for p in proto.metadata_props}
    values, sums = _values(proto), _sums(props.get("accumulators", "{}"))
    sizes = {i.name: int(np.prod(i.dims, dtype=np.int64)) for i in proto.graph.initializer}
    operations = tuple(
        Operation(
            name=n.name or n.output[0], op=n.op_type, inputs=tuple(n.input),
            output=values.get(n.output[0], Value(name=n.output[0], dtype="", shape=())),
            parameters=sum(sizes.get(i, 0) for i in n.input), sum_bits=sums.get(n.name, 0), attributes=attributes(n),
        )
        for n in proto.graph.node
    )  # fmt: skip
    parts = damaged(proto)
    golden = None if "golden" in parts else stored(proto)
    return Contents(
        path=name, producer=f"{proto.producer_name} {proto.producer_version}".strip() or "unknown",
        target=props.get("target", "unknown"), dialect=props.get("dialect", "unknown"),
        opset=next((i.version for i in proto.opset_import if i.domain in ("", "ai.onnx")), 0),
        inputs=tuple(values[i.name] for i in proto.graph.input if i.name not in sizes),
        outputs=tuple(values[o.name] for o in proto.graph.output), operations=operations,
        ops=dict(sorted(Counter(n.op_type for n in proto.graph.node).items())),
        parameters=tuple(_stored(i) for i in proto.graph.initializer),
        parameter_bytes=sum(numpy_helper.to_array(i).nbytes for i in proto.graph.initializer),
        float_islands=tuple(json.loads(props.get("float_islands", "[]"))),
        golden=None if golden is None else {k: a.shape for k, a in golden.inputs.items()}, damaged=parts,
    )  # fmt: skip


def _sums(text: str) -> dict[str, int]:
    return {name: int(said["bits"]) for name, said in json.loads(text).items()}


def _stored(tensor: TensorProto) -> Value:
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type).name
    return Value(name=tensor.name, dtype=dtype, shape=tuple(tensor.dims))


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a node as plain Python values; those that the chip ignores are left out."""
    found = {}
    for a in node.attribute:
        value = helper.get_attribute_value(a)
        if isinstance(value, bytes):
            value = value.decode()
        elif isinstance(value, TensorProto):
            value = numpy_helper.to_array(value).tolist()
        elif not isinstance(value, (int, float, str)):
            value = list(value)
        found[a.name] = value
    return found


def _values(proto: onnx.ModelProto) -> dict[str, Value]:
    """Every value of the graph whose type is known, with its grid."""
    grid = grids(proto)
    found = {}
    for v in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        t = v.type.tensor_type
        dtype = helper.tensor_dtype_to_np_dtype(t.elem_type).name if t.elem_type else ""
        shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in t.shape.dim)
        scale, bits = grid.get(v.name, (None, 0))
        found[v.name] = Value(name=v.name, dtype=dtype, shape=shape, scale=scale, bits=bits)
    return found


def grids(proto: onnx.ModelProto) -> dict[str, tuple[float, int]]:
    """Scale and bits of every integer tensor that a node makes, by name; what only moves values keeps their grid."""
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*proto.graph.value_info, *proto.graph.output)}
    found: dict[str, tuple[float, int]] = {}
    for node in proto.graph.node:
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name.startswith("scale_")}
        scale = attrs.get("scale_x") if node.op_type == "Quant" else attrs.get("scale_o")
        before = next((found[i] for i in node.input if i in found), None)
        for name in node.output if node.op_type != "Dequant" else ():
            bits = INTEGERS.get(kinds.get(name, TensorProto.UNDEFINED), 0)
            if bits and scale is not None:
                found[name] = float(scale), bits
            elif bits and before is not None:
                found[name] = before
    return found
