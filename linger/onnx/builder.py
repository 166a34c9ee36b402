"""An ONNX graph under construction: values, shared constants, and the function bodies its nodes need."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx import numpy_helper, parser

from linger.errors import LingerError
from linger.onnx.sizes import Dyn, is_dynamic, same
from linger.ops import BY_NAME
from linger.targets import Target

THINKER = "thinker"
ONNX_TYPES = {  # float64 is written as float32
    torch.float32: ir.DataType.FLOAT, torch.float64: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT,
    torch.bool: ir.DataType.BOOL, torch.uint8: ir.DataType.UINT8, torch.int8: ir.DataType.INT8,
    torch.int16: ir.DataType.INT16, torch.int32: ir.DataType.INT32, torch.int64: ir.DataType.INT64,
}  # fmt: skip
DTYPES = {8: ir.DataType.INT8, 16: ir.DataType.INT16, 32: ir.DataType.INT32}
FUNCTION_IR, OVERLOAD_IR = 9, 10  # model-local functions; functions that differ by overload
OPEN_END = 2**31 - 1


class Builder:
    """Nodes, initializers and functions of one file. Values carry dtype and shape (``Dyn`` sizes become symbols)."""

    def __init__(self, opset: int, target: Target, symbols: Sequence[str]) -> None:
        self.opset, self.target, self.symbols = opset, target, symbols
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.inputs: list[tuple[ir.Value, tuple[int, ...]]] = []
        self.forms: dict[str, dict[str, list[ir.Node]]] = {}
        self.names: set[str] = set()
        self.computed: dict[tuple[int, ...], ir.Value] = {}

    # --- values

    def unique(self, name: str) -> str:
        new, n = name, 0
        while new in self.names:
            n += 1
            new = f"{name}_{n}"
        self.names.add(new)
        return new

    def shape(self, sizes: Iterable[int]) -> ir.Shape:
        return ir.Shape([self.symbol(s) if isinstance(s, Dyn) else int(s) for s in sizes])

    def symbol(self, size: Dyn) -> str | None:
        """The name of a dynamic axis where ``size`` is just that axis, else None (unknown)."""
        for value, sizes in self.inputs:
            for axis, s in enumerate(sizes):
                if isinstance(s, Dyn) and s.values == size.values:
                    assert value.shape is not None
                    return str(value.shape[axis])
        moved = [n for n, v in zip(self.symbols, size.values[1:], strict=True) if v != size.values[0]]
        return moved[0] if len(moved) == 1 and not self.inputs else None

    def value(self, name: str, dtype: ir.DataType, sizes: Iterable[int] | None) -> ir.Value:
        shape = None if sizes is None else self.shape(sizes)
        return ir.Value(name=self.unique(name), type=ir.TensorType(dtype), shape=shape)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """An initializer; the same name with the same contents is written once."""
        found = self.initializers.get(name)
        if found is not None and found.const_value is not None:
            old = found.const_value.numpy()
            if old.dtype == array.dtype and np.array_equal(old, array):
                return found
            name = self.unique(name)
        elif name in self.names:
            name = self.unique(name)
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
        self.names.add(name)
        made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.initializers[name] = made
        return made

    def ints(self, values: Sequence[int]) -> ir.Value:
        """A 1-D int64 constant."""
        return self.constant(
            "ints_" + "_".join(str(int(v)).replace("-", "m") for v in values), np.array(values, np.int64)
        )

    def scalar(self, value: float, name: str) -> ir.Value:
        return self.constant(name, np.array(value, np.float32))

    # --- nodes

    def add(
        self, name: str, op_type: str, inputs: Sequence[ir.Value | None], attrs: Mapping[str, Any], dtype: ir.DataType,
        sizes: Iterable[int] | None, *, domain: str = "", form: str | None = None, count: int = 1,
        more: Sequence[ir.DataType] = (),
    ) -> list[ir.Value]:  # fmt: skip
        """Append a node; ``form`` names its function body (domain ``thinker``).

        Returns its outputs: ``count`` of one kind, and one of each type in ``more``.
        """
        attrs = self.target.attributes(attrs) if domain == THINKER else attrs
        if is_dynamic(dict(attrs)):
            raise LingerError(f"{name}: an attribute of {op_type} changes with a dynamic axis; fix that axis")
        outputs = [self.value(name if count == 1 else f"{name}_{i}", dtype, sizes) for i in range(count)]
        outputs += [self.value(f"{name}_{i}", other, None) for i, other in enumerate(more, count)]
        node = ir.Node(
            domain,
            op_type,
            list(inputs),
            [attribute(k, v) for k, v in sorted(attrs.items())],
            outputs=outputs,
            name=outputs[0].name,
        )
        self.nodes.append(node)
        if domain == THINKER:
            self.forms.setdefault(op_type, {}).setdefault(form or "", []).append(node)
        return outputs

    def one(self, *args: Any, **kwargs: Any) -> ir.Value:
        return self.add(*args, **kwargs)[0]

    # --- sizes

    def sizes(self, name: str, wanted: Sequence[int], source: Sequence[int]) -> ir.Value:
        """The shape input of a Reshape from ``source`` to ``wanted``: constants, 0 (copied), one -1, else computed."""
        entries: list[int | ir.Value] = []
        for i, size in enumerate(wanted):
            if not isinstance(size, Dyn):
                entries.append(int(size))
            elif i < len(source) and same(size, source[i]):
                entries.append(0)
            elif -1 not in entries:
                entries.append(-1)
            else:
                entries.append(self.computed_size(name, size))
        dynamic = [i for i, size in enumerate(wanted) if isinstance(size, Dyn)]
        if len(dynamic) == 1:
            entries[dynamic[0]] = -1
        if all(isinstance(e, int) for e in entries):
            return self.ints([e for e in entries if isinstance(e, int)])
        parts = [self.ints([e]) if isinstance(e, int) else e for e in entries]
        return self.one(f"{name}.shape", "Concat", parts, {"axis": 0}, ir.DataType.INT64, (len(parts),))

    def computed_size(self, name: str, size: Dyn) -> ir.Value:
        """A dynamic size read from the input that has it, as a tensor of one int64."""
        if size.values in self.computed:
            return self.computed[size.values]
        for value, sizes in self.inputs:
            for axis, s in enumerate(sizes):
                if same(s, size):
                    shape = self.one(f"{value.name}.shape", "Shape", [value], {}, ir.DataType.INT64, (len(sizes),))
                    got = self.one(
                        f"{value.name}.size_{axis}",
                        "Gather",
                        [shape, self.ints([axis])],
                        {"axis": 0},
                        ir.DataType.INT64,
                        (1,),
                    )
                    self.computed[size.values] = got
                    return got
        raise LingerError(
            f"{name}: a size of {int(size)} changes with a dynamic axis but is no input's size; use -1 or fix the axis"
        )

    def dimensions(self, name: str, sizes: Sequence[int]) -> ir.Value:
        """Sizes as a 1-D int64 tensor, dynamic ones read from the inputs."""
        if not is_dynamic(list(sizes)):
            return self.ints(sizes)
        parts = [self.computed_size(name, s) if isinstance(s, Dyn) else self.ints([s]) for s in sizes]
        return self.one(f"{name}.shape", "Concat", parts, {"axis": 0}, ir.DataType.INT64, (len(parts),))

    def prune(self, results: Sequence[ir.Value]) -> None:
        """Drop what no result of the graph depends on: attention weights that nobody reads, for example."""
        needed = {id(v) for v in results}
        kept: list[ir.Node] = []
        for node in reversed(self.nodes):
            if any(id(v) in needed for v in node.outputs):
                kept.append(node)
                needed.update(id(v) for v in node.inputs if v is not None)
        self.nodes = kept[::-1]
        alive = {id(node) for node in kept}
        for op_type, forms in list(self.forms.items()):
            used = {form: [n for n in nodes if id(n) in alive] for form, nodes in forms.items()}
            self.forms[op_type] = {form: nodes for form, nodes in used.items() if nodes}
        self.initializers = {name: v for name, v in self.initializers.items() if id(v) in needed}

    # --- functions

    def functions(self, real: bool = False) -> tuple[list[ir.Function], int]:
        """A function per form in use (on floats with ``real``), set on its nodes, and the IR version this needs."""
        made, overloaded = [], any(len(forms) > 1 for forms in self.forms.values())
        for op_type, forms in sorted(self.forms.items()):
            for form, nodes in sorted(forms.items()):
                overload = form if len(forms) > 1 else ""
                for node in nodes:
                    node.overload = overload
                made.append(function(op_type, form, overload, self.opset, nodes[0], self.target.rounding, real))
        return made, OVERLOAD_IR if overloaded else FUNCTION_IR


def width(x: ir.Value) -> int:
    """Bits of a fixed-point value, 0 for any other."""
    return next((bits for bits, dtype in DTYPES.items() if dtype == x.dtype), 0)


def attribute(name: str, value: Any) -> ir.Attr:
    """A Python value as an ONNX attribute."""
    if isinstance(value, str):
        return ir.AttrString(name, value)
    if isinstance(value, (bool, int, np.integer)):
        return ir.AttrInt64(name, int(value))
    if isinstance(value, float):
        return ir.AttrFloat32(name, value)
    if isinstance(value, np.ndarray):
        return ir.AttrTensor(name, ir.tensor(value))
    return ir.AttrInt64s(name, [int(v) for v in value])


def function(
    op_type: str, form: str, overload: str, opset: int, node: ir.Node, rounding: str, real: bool = False
) -> ir.Function:
    """The body of ``op_type`` in this form as a model-local function with the attributes of ``node``."""
    op = BY_NAME[op_type]
    rounds = "rounding" in inspect.signature(op.body).parameters
    inputs, text = op.body(form, opset, **({"rounding": rounding} if rounds else {}))
    text = op.real(form, opset) if real else text
    attrs = ", ".join(sorted(node.attributes))
    named = f'overload: "{overload}", ' if overload else ""
    head = f'<domain: "{THINKER}", {named}opset_import: ["" : {opset}]>\n{op_type} '
    head += f"<{attrs}> " if attrs else ""
    body = "".join(f"    {line}\n" for line in text.strip().splitlines())
    parsed = parser.parse_function(f"{head}({inputs}) => ({op.outputs}) {{\n{body}}}")
    for held in (a.t for n in parsed.node for a in n.attribute if a.HasField("t")):
        held.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(held)))  # one byte per int8 instead of a varint
    return ir.serde.deserialize_function(parsed)
