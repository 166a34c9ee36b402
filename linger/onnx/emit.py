"""How a float call is written: ``Emit`` turns ``o.Mul(x, o.Sigmoid(x))`` into nodes of the file.

A row of the float tables is a function of ``o`` and of the call's own arguments: ``row(o, input, dim=-1)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from linger.errors import LingerError
from linger.onnx.builder import ONNX_TYPES
from linger.onnx.sizes import Dyn, same
from linger.trace import Node, Value

if TYPE_CHECKING:
    from linger.onnx.writer import Writer

Row = Callable[..., Any]
BOOLEAN = {"Greater", "Less", "Equal", "GreaterOrEqual", "LessOrEqual", "And", "Or", "Not", "Xor", "IsNaN", "IsInf"}
INTEGER = {"ArgMax", "ArgMin", "Shape", "Size"}
SECOND = {"Where"}  # ops whose result has the type of the second input
IGNORED = ("inplace", "dtype", "_stacklevel", "memory_format", "device", "layout", "pin_memory", "requires_grad")
AXES_AS_INPUT = {"ReduceSum": 13}  # the opset from which the axes of a reduction are an input; 18 for the others


class Emit:
    """Writes the nodes of one call. An operand may be a Value, a number, an array, an ``ir.Value`` or None."""

    def __init__(self, writer: Writer, node: Node) -> None:
        self.writer, self.node, self.build = writer, node, writer.build
        self.opset = writer.build.opset

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        if not op_type[:1].isupper():
            raise AttributeError(op_type)
        return lambda *inputs, **attrs: self.nodes(op_type, inputs, attrs, 1)[0]

    def nodes(self, op_type: str, inputs: Sequence[Any], attrs: dict[str, Any], count: int) -> list[ir.Value]:
        """A node with ``count`` outputs of one type: truth values, indices, or that of the first tensor."""
        values = [self.operand(x) for x in inputs]
        while values and values[-1] is None:  # an optional input at the end is left out: ONNX Runtime crashes on ""
            values.pop()
        dtype = values[1 if op_type in SECOND else 0].dtype  # type: ignore[union-attr]
        if op_type in BOOLEAN or op_type in INTEGER:
            dtype = ir.DataType.BOOL if op_type in BOOLEAN else ir.DataType.INT64
        if op_type == "Cast":
            dtype = ir.DataType(attrs["to"])
        name = f"{self.node.name}.{op_type.lower()}"
        assert dtype is not None
        return self.build.add(name, op_type, values, attrs, dtype, None, count=count)

    # --- operands

    def operand(self, x: Any) -> ir.Value | None:
        """Anything a row passes, as a value of the file; tensors in their float form."""
        if x is None or isinstance(x, ir.Value):
            return x
        if isinstance(x, Value):
            return self.writer.plain(x)
        if isinstance(x, np.ndarray):
            return self.build.constant(f"{self.node.name}.constant", x)
        return self.number(x)

    def number(self, x: Any) -> ir.Value:
        """A Python number as a float32 scalar; a size that changes is read from the input that has it."""
        if isinstance(x, Dyn):
            size = self.build.computed_size(self.node.name, x)
            return self.Cast(self.Reshape(size, self.ints([])), to=1)
        return self.build.scalar(float(x), f"number_{float(x)!r}")

    def raw(self, v: Any) -> ir.Value:
        """A tensor in its own type: indices, truth values."""
        return self.writer.as_is(v) if isinstance(v, Value) else v

    def truth(self, v: Any) -> ir.Value:
        """A tensor as truth values."""
        x = self.raw(v)
        return x if x.dtype == ir.DataType.BOOL else self.Cast(x, to=ir.DataType.BOOL)

    def index(self, v: Any) -> ir.Value:
        """A tensor as int64."""
        x = self.raw(v)
        return x if x.dtype == ir.DataType.INT64 else self.Cast(x, to=ir.DataType.INT64)

    def ints(self, values: Sequence[int]) -> ir.Value:
        """A 1-D int64 constant."""
        return self.build.ints(values)

    def shape_of(self, v: Any) -> tuple[int, ...]:
        """Sizes of a tensor operand."""
        return v.shape if isinstance(v, Value) else ()

    # --- ops whose axes are an attribute in old opsets and an input in new ones

    def reduced(self, op_type: str, x: Any, axes: Sequence[int] | None, keepdim: bool = False) -> ir.Value:
        """A reduction over ``axes``, all of them for None."""
        attrs: dict[str, Any] = {"keepdims": int(keepdim)}
        if axes is None:
            return self.nodes(op_type, [x], attrs, 1)[0]
        if self.opset >= AXES_AS_INPUT.get(op_type, 18):
            return self.nodes(op_type, [x, self.ints(axes)], attrs, 1)[0]
        return self.nodes(op_type, [x], attrs | {"axes": list(axes)}, 1)[0]

    def unsqueezed(self, x: Any, *axes: int) -> ir.Value:
        """New axes of size 1 at these positions of the result."""
        return self._with_axes("Unsqueeze", x, axes)

    def squeezed(self, x: Any, *axes: int) -> ir.Value:
        """Without these axes of size 1."""
        return self._with_axes("Squeeze", x, axes)

    def _with_axes(self, op_type: str, x: Any, axes: Sequence[int]) -> ir.Value:
        if self.opset < 13:
            return self.nodes(op_type, [x], {"axes": list(axes)}, 1)[0]
        return self.nodes(op_type, [x, self.ints(axes)], {}, 1)[0]

    def sliced(self, x: Any, axis: int, start: int, end: int) -> ir.Value:
        """x[start:end] along one axis."""
        return self.Slice(x, self.ints([start]), self.ints([end]), self.ints([axis]))

    # --- shapes

    def reshaped(self, x: Any, wanted: Sequence[int], source: Sequence[int]) -> ir.Value:
        """``x`` of shape ``source`` in another shape; either may hold dynamic sizes."""
        return self.Reshape(x, self.build.sizes(self.node.name, wanted, source))

    def expanded(self, x: Any, wanted: Sequence[int], source: Sequence[int] = ()) -> ir.Value:
        """``x`` of shape ``source`` broadcast to ``wanted``."""
        padded = (1,) * (len(wanted) - len(source)) + tuple(source)
        sizes = [1 if same(w, s) else w for w, s in zip(wanted, padded, strict=True)]
        return self.Expand(x, self.build.dimensions(self.node.name, sizes))

    def refuse(self, what: str, way_out: str) -> LingerError:
        """The error of a call that has no form."""
        return LingerError(f"{self.node.name}: found {what}, which has no form in the file; {way_out}")


def axes_of(dim: Any, rank: int) -> list[int]:
    """The dimensions that a reduction names, non-negative; all of them for None and ()."""
    if dim is None or dim in ((), []):
        return list(range(rank))
    return [int(d) % rank for d in (dim if isinstance(dim, (tuple, list)) else [dim])]


def written(writer: Writer, node: Node, row: Row) -> list[ir.Value]:
    """The outputs of a call, by its row: named as the call, with its shapes and types."""
    o = Emit(writer, node)
    bound = _bound(node, row, o)
    made = row(*bound.args, **bound.kwargs)
    made = [*made] if isinstance(made, (tuple, list)) else [made]
    return [
        _finished(o, x, v, f"{node.name}" if len(made) == 1 else f"{node.name}_{i}")
        for i, (x, v) in enumerate(zip(made, node.outputs, strict=False))
    ]


def _bound(node: Node, row: Row, o: Emit) -> inspect.BoundArguments:
    """The call's arguments by the names of the row's parameters; one that the row does not know is an error."""
    parameters = list(inspect.signature(row).parameters)[1:]
    unknown = [k for k, v in node.kwargs.items() if k not in parameters and (v is None or k in IGNORED)]
    kwargs = {k: v for k, v in node.kwargs.items() if k not in unknown}
    for old, new in (("axis", "dim"), ("keepdims", "keepdim"), ("self", "input")):
        if old in kwargs and old not in parameters:
            kwargs[new] = kwargs.pop(old)
    try:
        return inspect.signature(row).bind(o, *_known(node.args, parameters), **kwargs)
    except TypeError as error:
        raise LingerError(
            f"{node.name}: found {node.op} with arguments that have no form in the file ({error}); leave them out"
        ) from None


def _known(args: tuple[Any, ...], parameters: Sequence[str]) -> tuple[Any, ...]:
    """The positional arguments without flags at their end (``inplace``) that change nothing here."""
    while len(args) > len(parameters) and (args[-1] is None or isinstance(args[-1], (bool, torch.dtype))):
        args = args[:-1]
    return args


def _finished(o: Emit, x: ir.Value, v: Value, name: str) -> ir.Value:
    """An output in the type that PyTorch gives it; a node of its own where it is an operand or another output."""
    wanted = ONNX_TYPES.get(v.dtype, ir.DataType.FLOAT)
    if x.dtype != wanted:
        x = o.Cast(x, to=int(wanted))
    producer = x.producer()
    if producer is None or not str(x.name).startswith(f"{o.node.name}."):
        return x
    x.name = producer.name = o.build.unique(name)
    x.shape = o.build.shape(v.shape)
    return x
