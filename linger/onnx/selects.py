"""Calls that pick values of one tensor, as standard ONNX on its integers (or floats): values, and indices as int64.

Equal values: ArgMax takes the first, TopK the lower index, as the calls do on a grid (``linger.selects``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch.utils import _pytree as pytree

from linger.errors import LingerError
from linger.onnx.builder import DTYPES, THINKER
from linger.onnx.sizes import Dyn, is_dynamic
from linger.ops.pool import adaptive_window
from linger.trace import Node, Value

if TYPE_CHECKING:
    from linger.onnx.writer import Writer

Select = Callable[["Writer", Node, ir.Value], list[ir.Value]]
INT64, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT
NATIVE_INT8 = 13  # the opset from which runtimes reduce int8


def _given(node: Node, *names: str) -> dict[str, Any]:
    given = dict(zip(("input", *names), node.args, strict=False)) | node.kwargs
    if "axis" in given:
        given["dim"] = given.pop("axis")
    if given.get("out") is not None:
        raise LingerError(f"{node.name}: {node.op} with out= cannot be exported; assign the result instead")
    return given


def _dims(node: Node, dim: Any) -> list[int]:
    rank = len(node.inputs()[0].shape)
    if dim is None or dim == ():
        return list(range(rank))
    return [int(d) % max(rank, 1) for d in pytree.tree_leaves(dim)]


def _as_float(w: Writer, node: Node, x: ir.Value) -> ir.Value:
    """Integers as floats, which hold each of them: they were floats on a grid."""
    if x.dtype == FLOAT:
        return x
    return w.build.one(f"{node.name}.float", "Cast", [x], {"to": 1}, FLOAT, node.inputs()[0].shape)


def _back(w: Writer, node: Node, y: ir.Value, dtype: ir.DataType | None, shape: Sequence[int]) -> ir.Value:
    if y.dtype == dtype or dtype is None:
        return y
    return w.build.one(node.name, "Cast", [y], {"to": int(dtype)}, dtype, shape)


def _native(w: Writer, x: ir.Value) -> bool:
    return x.dtype == FLOAT or (x.dtype == ir.DataType.INT8 and w.build.opset >= NATIVE_INT8)


def _reduced(w: Writer, node: Node, x: ir.Value, op_type: str, dims: list[int], keepdim: bool) -> ir.Value:
    """ReduceMax or ReduceMin over ``dims``, in the type of ``x``."""
    if not dims:  # a scalar
        return x
    source = x if _native(w, x) else _as_float(w, node, x)
    assert source.dtype is not None
    shape, attrs = node.outputs[0].shape, {"keepdims": int(keepdim)}
    name = node.name if source is x else f"{node.name}.{op_type}"
    if w.build.opset >= 18:
        y = w.build.one(name, op_type, [source, w.build.ints(dims)], attrs, source.dtype, shape)
    else:
        y = w.build.one(name, op_type, [source], attrs | {"axes": dims}, source.dtype, shape)
    return _back(w, node, y, x.dtype, shape)


def _index(w: Writer, node: Node, x: ir.Value, op_type: str, dim: Any, keepdim: bool, out: Value) -> ir.Value:
    """ArgMax or ArgMin: the first extreme value, over everything where ``dim`` is None."""
    source = x if _native(w, x) else _as_float(w, node, x)
    name = node.name if out is node.outputs[0] else f"{node.name}.indices"
    if dim is None:
        assert source.dtype is not None
        source = w.build.one(f"{node.name}.flat", "Reshape", [source, w.build.ints([-1])], {}, source.dtype, None)
        y = w.build.one(f"{node.name}.one", op_type, [source], {"axis": 0, "keepdims": 0}, INT64, ())
        return w.build.one(name, "Reshape", [y, w.build.ints([1] * len(out.shape))], {}, INT64, out.shape)
    return w.build.one(
        name, op_type, [source], {"axis": _dims(node, dim)[0], "keepdims": int(keepdim)}, INT64, out.shape
    )


def extreme(kind: str) -> Select:
    """torch.max, torch.min: of everything, over one dimension with indices, or of two plain tensors."""

    def row(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
        given = _given(node, "dim", "keepdim")
        other = given.get("other", given.get("dim"))
        if isinstance(other, Value):
            pair = [w.plain(node.inputs()[0]), w.plain(other)]
            return [w.build.one(node.name, kind, pair, {}, FLOAT, node.outputs[0].shape)]
        dim, keepdim = given.get("dim"), bool(given.get("keepdim", False))
        values = _reduced(w, node, x, f"Reduce{kind}", _dims(node, dim), keepdim)
        if dim is None:
            return [values]
        return [values, _index(w, node, x, f"Arg{kind}", dim, keepdim, node.outputs[1])]

    return row


def values_only(kind: str) -> Select:
    """torch.amax, torch.amin."""

    def row(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
        given = _given(node, "dim", "keepdim")
        return [_reduced(w, node, x, f"Reduce{kind}", _dims(node, given.get("dim")), bool(given.get("keepdim", False)))]

    return row


def index_only(kind: str) -> Select:
    """torch.argmax, torch.argmin."""

    def row(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
        given = _given(node, "dim", "keepdim")
        keepdim = bool(given.get("keepdim", False))
        return [_index(w, node, x, f"Arg{kind}", given.get("dim"), keepdim, node.outputs[0])]

    return row


def _top(w: Writer, node: Node, x: ir.Value, k: int, dim: int, largest: bool) -> list[ir.Value]:
    """Values and indices of the ``k`` first of a stable sort; all of them where ``k`` is dynamic."""
    count = w.build.computed_size(node.name, k) if isinstance(k, Dyn) else w.build.ints([k])
    source, shape = _as_float(w, node, x), node.outputs[0].shape
    attrs = {"axis": dim, "largest": int(largest), "sorted": 1}
    values, indices = w.build.add(f"{node.name}.top", "TopK", [source, count], attrs, FLOAT, shape, count=2)
    indices.type = ir.TensorType(INT64)
    return [_back(w, node, values, x.dtype, shape), indices]


def topk(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
    given = {"dim": -1, "largest": True} | _given(node, "k", "dim", "largest", "sorted")
    if is_dynamic((given["k"],)):
        raise LingerError(f"{node.name}: k of topk changes with a dynamic axis; fix that axis")
    return _top(w, node, x, int(given["k"]), _dims(node, given["dim"])[0], bool(given["largest"]))


def sort(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
    """torch.sort, torch.argsort; torch.msort is the former along the first axis."""
    given = {"dim": -1, "descending": False} | _given(node, "dim", "descending")
    axis = 0 if node.op == "msort" else _dims(node, given["dim"])[0]
    both = _top(w, node, x, node.inputs()[0].shape[axis], axis, bool(given["descending"]))
    return {"sort": both, "msort": both[:1], "argsort": both[1:]}[node.op]


def adaptive_max_pool(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
    given = _given(node, "output_size", "return_indices")
    shape = node.inputs()[0].shape
    rank = 2 if node.func is torch.nn.functional.adaptive_max_pool2d else 1
    if given.get("return_indices") or len(node.outputs) > 1:
        raise LingerError(f"{node.name}: found return_indices, allowed are the values alone; drop the indices")
    if len(shape) != rank + 2:
        raise LingerError(f"{node.name}: adaptive_max_pool without a batch axis cannot be exported; add one")
    kernel, stride, padding = adaptive_window(shape[2:], given["output_size"])
    attrs = {"kernel_shape": kernel, "strides": stride, "pads": padding * 2, "dilations": (1,) * rank, "ceil_mode": 0}
    assert x.dtype is not None
    bits = next((b for b, t in DTYPES.items() if t == x.dtype), 0)
    if bits in (0, 8):
        return [w.build.one(node.name, "MaxPool", [x], attrs, x.dtype, node.outputs[0].shape)]
    return [
        w.build.one(node.name, "MaxPool", [x], attrs, x.dtype, node.outputs[0].shape, domain=THINKER, form=str(bits))
    ]


SELECTED: dict[str, Select] = {
    "max": extreme("Max"), "min": extreme("Min"), "amax": values_only("Max"), "amin": values_only("Min"),
    "argmax": index_only("Max"), "argmin": index_only("Min"), "topk": topk, "sort": sort, "msort": sort, "argsort": sort,
    "adaptive_max_pool": adaptive_max_pool,
}  # fmt: skip
