"""Packed sequences in a file: the padded tensor and its lengths stand for the rows and the batch sizes.

Only a recurrent layer reads and makes them; what it makes is 0 behind the end of a sequence, as unpacking wants it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from linger.errors import LingerError
from linger.onnx.sizes import Dyn, same
from linger.trace import Node, Value

if TYPE_CHECKING:
    from linger.onnx.writer import Writer

PACK, UNPACK = "pack_padded_sequence", "pad_packed_sequence"


@dataclass(frozen=True, kw_only=True)
class Padded:
    """How the rows of a packed sequence lie in the file. ``clean``: 0 behind every end."""

    shape: tuple[int, ...]
    batch_first: bool
    clean: bool = False


def _arguments(node: Node, names: tuple[str, ...]) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def pack(w: Writer, node: Node) -> None:
    """The rows are the padded tensor as it is."""
    said = _arguments(node, ("input", "lengths", "batch_first"))
    source, lengths = said["input"], said["lengths"]
    data, sizes = node.outputs
    held = w.exact if data.scale is not None and source.id in w.exact else w.floats
    held[data.id] = w.exact[source.id] if held is w.exact else w.as_is(source)
    w.floats[sizes.id] = w.integer(lengths)
    w.packed[data.id] = Padded(shape=source.shape, batch_first=bool(said["batch_first"]))


def unpack(w: Writer, node: Node) -> None:
    """The padded tensor, cut to the longest sequence or to ``total_length``."""
    data, sizes, first, value, total = node.args
    padded = w.packed.get(data.id)
    if padded is None or not padded.clean or value != 0:
        found = f"padding_value {value}" if value != 0 else "a packed sequence that no recurrent layer made"
        raise LingerError(
            f"{node.name}: found {found}, allowed in a file are the outputs of a recurrent layer, padded with 0; unpack those"
        )
    out, lengths = node.outputs
    exact = data.id in w.exact
    x = w.exact[data.id] if exact else w.floats[data.id]
    x = _cut(w, node, x, padded, w.floats[sizes.id], total)
    if bool(first) != padded.batch_first:
        x = w.build.one(f"{node.name}.swap", "Transpose", [x], {"perm": (1, 0, 2)}, _dtype(x), None)
    (w.exact if exact else w.floats)[out.id] = x
    w.floats[lengths.id] = w.floats[sizes.id]


def _dtype(x: ir.Value) -> ir.DataType:
    assert x.dtype is not None
    return x.dtype


def _cut(w: Writer, node: Node, x: ir.Value, padded: Padded, lengths: ir.Value, total: int | None) -> ir.Value:
    axis = int(padded.batch_first)
    steps = padded.shape[axis]
    if total is not None:
        if same(total, steps):
            return x
        if isinstance(total, Dyn) or isinstance(steps, Dyn) or total > steps:
            raise LingerError(
                f"{node.name}: found total_length {int(total)} behind a padded input of {int(steps)} steps, allowed is up to that; "
                "pass input.size of the time axis"
            )
        end = w.build.ints([total])
    else:
        attrs: dict[str, Any] = {"keepdims": 1}
        given = [lengths]
        if w.build.opset >= 18:
            given.append(w.build.ints([0]))
        else:
            attrs["axes"] = (0,)
        end = w.build.one(f"{node.name}.longest", "ReduceMax", given, attrs, ir.DataType.INT64, (1,))
    parts = [x, w.build.ints([0]), end, w.build.ints([axis])]
    return w.build.one(f"{node.name}.cut", "Slice", parts, {}, _dtype(x), None)


def entered(w: Writer, values: list[Value]) -> tuple[list[Value], Padded | None]:
    """The operands of a recurrent layer, a packed one in its padded shape."""
    padded = w.packed.get(values[0].id) if values else None
    if padded is None:
        return values, None
    return [replace(values[0], shape=padded.shape), *values[1:]], padded


def refuse(w: Writer, node: Node) -> None:
    """Raise where anything but a recurrent layer reads packed rows, which are not there."""
    if any(v.id in w.packed for v in node.inputs()):
        raise LingerError(
            f"{node.name}: found {node.op} on the data of a PackedSequence, allowed in a file are recurrent layers and "
            "pad_packed_sequence; unpack it before"
        )
