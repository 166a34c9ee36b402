"""Calls that only move values, as standard ONNX on integers or floats: ``move(w, node, x)`` returns the outputs.

``w`` is the ``Writer`` (its ``build`` adds nodes), ``node`` the recorded call, ``x`` the value its first operand has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from linger.errors import LingerError
from linger.onnx.builder import DTYPES, ONNX_TYPES, OPEN_END, THINKER, Builder
from linger.onnx.sizes import Dyn, is_dynamic, same
from linger.ops.pad import lowered as lowered_pad
from linger.trace import Node, Value

Move = Callable[[Builder, Node, ir.Value], list[ir.Value]]


def _bits(x: ir.Value) -> int:
    return next((bits for bits, dtype in DTYPES.items() if dtype == x.dtype), 0)


def _out(
    b: Builder, node: Node, op_type: str, inputs: Sequence[ir.Value], attrs: dict[str, Any], **more: Any
) -> ir.Value:
    dtype = inputs[0].dtype
    assert dtype is not None
    return b.one(node.name, op_type, inputs, attrs, dtype, node.outputs[0].shape, **more)


def reshape(b: Builder, node: Node, x: ir.Value) -> list[ir.Value]:
    source, wanted = node.inputs()[0].shape, node.outputs[0].shape
    if source == wanted and all(same(s, t) for s, t in zip(source, wanted, strict=True)):
        return [x]
    return [_out(b, node, "Reshape", [x, b.sizes(node.name, wanted, source)], {})]


def flatten(b: Builder, node: Node, x: ir.Value) -> list[ir.Value]:
    source, out = node.inputs()[0].shape, node.outputs[0].shape
    if len(out) == 2 and len(source) > 2 and same(source[0], out[0]):
        return [_out(b, node, "Flatten", [x], {"axis": 1})]
    return reshape(b, node, x)


def transpose(b: Builder, node: Node, x: ir.Value) -> list[ir.Value]:
    """permute, transpose, t, movedim, swapaxes: the order is read off a probe with distinct sizes."""
    rank = len(node.inputs()[0].shape)
    probe = torch.empty(tuple(range(1, rank + 1)), device="meta")
    assert node.func is not None
    moved = node.func(probe, *node.args[1:], **node.kwargs)
    return [_out(b, node, "Transpose", [x], {"perm": [s - 1 for s in moved.shape]})]


def _axes(node: Node, op_type: str) -> list[int]:
    source, out = node.inputs()[0].shape, node.outputs[0].shape
    dim: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if op_type == "Unsqueeze":
        return [int(dim) % len(out)]
    if dim is None:
        return [i for i, s in enumerate(source) if s == 1 and not isinstance(s, Dyn)]
    dims = dim if isinstance(dim, (tuple, list)) else [dim]
    return sorted(int(d) % len(source) for d in dims if source[int(d)] == 1)


def squeeze(op_type: str) -> Move:
    def move(b: Builder, node: Node, x: ir.Value) -> list[ir.Value]:
        axes = _axes(node, op_type)
        return [squeezed(b, node.name, x, op_type, axes, node.outputs[0].shape)] if axes else [x]

    return move


def squeezed(b: Builder, name: str, x: ir.Value, op_type: str, axes: Sequence[int], shape: Sequence[int]) -> ir.Value:
    """The chip reads ``axes`` as an attribute: on integers the node is ours, with a body; on floats it is standard."""
    assert x.dtype is not None
    if _bits(x):
        return b.one(name, op_type, [x], {"axes": axes}, x.dtype, shape, domain=THINKER)
    if b.opset < 13:
        return b.one(name, op_type, [x], {"axes": axes}, x.dtype, shape)
    return b.one(name, op_type, [x, b.ints(axes)], {}, x.dtype, shape)


def _slice(
    b: Builder, name: str, x: ir.Value, axis: int, start: int, end: int, step: int, shape: Sequence[int]
) -> ir.Value:
    assert x.dtype is not None
    inputs = [x, b.ints([start]), b.ints([end]), b.ints([axis]), b.ints([step])]
    return b.one(name, "Slice", inputs, {}, x.dtype, shape)


def _bound(name: str, value: int, size: int) -> int:
    """A slice bound as a constant: a dynamic one only where it is the size itself or a fixed distance from its end."""
    if not isinstance(value, Dyn):
        return min(int(value), OPEN_END)
    if same(value, size):
        return OPEN_END
    gaps = {v - s for v, s in zip(value.values, getattr(size, "values", (size,) * len(value.values)), strict=True)}
    if len(gaps) == 1 and max(gaps) < 0:
        return gaps.pop()
    raise LingerError(
        f"{name}: the slice bound {int(value)} changes with a dynamic axis; count it from the end or fix the axis"
    )


def getitem(b: Builder, node: Node, x: ir.Value) -> list[ir.Value]:
    """Integers, slices, None and Ellipsis."""
    given = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if any(isinstance(i, (Value, list, bool)) for i in given):
        raise LingerError(
            f"{node.name}: indexing with a tensor cannot be exported; use slices, or torch.gather in a later version"
        )
    sizes = list(node.inputs()[0].shape)
    used = sum(i is not None and i is not Ellipsis for i in given)
    full: list[Any] = []
    for i in given if Ellipsis in given else (*given, Ellipsis):
        full += [slice(None)] * (len(sizes) - used) if i is Ellipsis else [i]
    axis, n = 0, 0
    drop: list[int] = []
    grow: list[int] = []
    for position, i in enumerate(full):
        if i is None:
            grow.append(position - len(drop))
            continue
        size = sizes[axis]
        if isinstance(i, slice):
            start, stop = i.start or 0, OPEN_END if i.stop is None else i.stop
            if (start, stop, i.step or 1) != (0, OPEN_END, 1):
                kept = len(range(*slice(int(start), min(int(stop), OPEN_END), i.step).indices(int(size))))
                sizes[axis] = _kept(size, i, kept)
                x = _slice(
                    b,
                    f"{node.name}.{n}",
                    x,
                    axis,
                    _bound(node.name, start, size),
                    _bound(node.name, stop, size),
                    i.step or 1,
                    sizes,
                )
                n += 1
        else:
            sizes[axis] = 1
            start = _bound(node.name, i, size)
            x = _slice(b, f"{node.name}.{n}", x, axis, start, OPEN_END if start == -1 else start + 1, 1, sizes)
            drop.append(axis)
            n += 1
        axis += 1
    if drop:
        sizes = [s for k, s in enumerate(sizes) if k not in drop]
        x = squeezed(b, f"{node.name}.squeeze", x, "Squeeze", drop, sizes)
    if grow:
        x = squeezed(b, f"{node.name}.unsqueeze", x, "Unsqueeze", grow, node.outputs[0].shape)
    return [x]


def _kept(size: int, index: slice, kept: int) -> int:
    """The size after slicing, in every recording."""
    if not isinstance(size, Dyn) and not is_dynamic((index.start, index.stop)):
        return kept
    count = max(len(getattr(v, "values", ())) for v in (size, index.start, index.stop))
    each = []
    for k in range(count):
        at = [getattr(v, "values", (v,) * count)[k] for v in (index.start, index.stop)]
        each.append(len(range(*slice(at[0], at[1], index.step).indices(getattr(size, "values", (size,) * count)[k]))))
    return Dyn(tuple(each)) if len(set(each)) > 1 else each[0]


def pieces(b: Builder, node: Node, x: ir.Value) -> list[ir.Value]:
    """split, chunk, unbind: one Slice per output."""
    source = node.inputs()[0].shape
    unbind = node.op == "unbind"
    position = 1 if unbind else 2
    dim = int(node.kwargs.get("dim", node.args[position] if len(node.args) > position else 0)) % len(source)
    outputs, start = [], 0
    for i, out in enumerate(node.outputs):
        size = 1 if unbind else out.shape[dim]
        if isinstance(size, Dyn):
            raise LingerError(f"{node.name}: {node.op} along a dynamic axis; fix that axis")
        shape = [*source[:dim], size, *source[dim + 1 :]]
        part = _slice(b, f"{node.name}.{i}", x, dim, start, start + int(size), 1, shape)
        outputs.append(squeezed(b, f"{node.name}.{i}.squeeze", part, "Squeeze", [dim], out.shape) if unbind else part)
        start += int(size)
    return outputs


def flip(b: Builder, node: Node, x: ir.Value) -> list[ir.Value]:
    given = node.kwargs.get("dims", node.args[1:] if len(node.args) > 1 else ())
    dims = pytree_ints(given)
    shape = node.outputs[0].shape
    for n, dim in enumerate(dims):
        x = _slice(b, f"{node.name}.{n}", x, dim % len(shape), -1, -OPEN_END, -1, shape)
    return [x]


def pytree_ints(tree: Any) -> list[int]:
    """The ints of nested tuples, in order."""
    return [int(v) for v in torch.utils._pytree.tree_leaves(tree)]


def expand(b: Builder, node: Node, x: ir.Value) -> list[ir.Value]:
    source, wanted = node.inputs()[0].shape, node.outputs[0].shape
    padded = (1,) * (len(wanted) - len(source)) + tuple(source)
    sizes = [1 if same(w, s) else w for w, s in zip(wanted, padded, strict=True)]
    parts = [b.computed_size(node.name, s) if isinstance(s, Dyn) else int(s) for s in sizes]
    if all(isinstance(p, int) for p in parts):
        shape = b.ints([p for p in parts if isinstance(p, int)])
    else:
        values = [b.ints([p]) if isinstance(p, int) else p for p in parts]
        shape = b.one(f"{node.name}.shape", "Concat", values, {"axis": 0}, ir.DataType.INT64, (len(values),))
    return [_out(b, node, "Expand", [x, shape], {})]


def repeat(b: Builder, node: Node, x: ir.Value) -> list[ir.Value]:
    times = pytree_ints((node.args[1:], list(node.kwargs.values())))
    source, rank = node.inputs()[0].shape, len(node.outputs[0].shape)
    if len(source) < rank:
        padded = (1,) * (rank - len(source)) + tuple(source)
        assert x.dtype is not None
        x = b.one(f"{node.name}.unsqueezed", "Reshape", [x, b.sizes(node.name, padded, source)], {}, x.dtype, padded)
    times = [1] * (rank - len(times)) + times
    if is_dynamic((node.args, node.kwargs)):
        raise LingerError(f"{node.name}: the number of repeats changes with a dynamic axis; use expand or fix the axis")
    return [_out(b, node, "Tile", [x, b.ints(times)], {})]


def narrow(b: Builder, node: Node, x: ir.Value) -> list[ir.Value]:
    """narrow(dim, start, length) and select(dim, index)."""
    names = ("dim", "start", "length") if node.op == "narrow" else ("dim", "index")
    given: dict[str, Any] = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    source = node.inputs()[0].shape
    dim = int(given["dim"]) % len(source)
    start = _bound(node.name, given["index" if node.op == "select" else "start"], source[dim])
    if node.op == "select":
        shape = [*source[:dim], 1, *source[dim + 1 :]]
        part = _slice(b, f"{node.name}.0", x, dim, start, OPEN_END if start == -1 else start + 1, 1, shape)
        return [squeezed(b, node.name, part, "Squeeze", [dim], node.outputs[0].shape)]
    length = given["length"]
    if isinstance(length, Dyn):
        gap = {
            s - v
            for s, v in zip(
                getattr(source[dim], "values", (source[dim],) * len(length.values)), length.values, strict=True
            )
        }
        if len(gap) > 1:
            raise LingerError(f"{node.name}: the length {int(length)} changes with a dynamic axis; fix that axis")
        tail = gap.pop() - start
        return [_slice(b, node.name, x, dim, start, -tail if tail else OPEN_END, 1, node.outputs[0].shape)]
    return [_slice(b, node.name, x, dim, start, start + int(length), 1, node.outputs[0].shape)]


def identity(b: Builder, node: Node, x: ir.Value) -> list[ir.Value]:
    """clone, detach, to: nothing, or a Cast where a plain tensor changes its type."""
    wanted = ONNX_TYPES.get(node.outputs[0].dtype, x.dtype)
    if (_bits(x) and node.inputs()[0].scale is not None) or wanted == x.dtype or wanted is None:
        return [x]
    return [b.one(node.name, "Cast", [x], {"to": int(wanted)}, wanted, node.outputs[0].shape)]


def dropout(b: Builder, node: Node, x: ir.Value) -> list[ir.Value]:
    """Nothing in eval; one that drops in eval too has no place in a file."""
    given: dict[str, Any] = dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
    if given.get("training", True) and given.get("p", 0.5):
        raise LingerError(f"{node.name}: dropout that is active in eval; pass training=self.training")
    return [x]


def relu(b: Builder, node: Node, x: ir.Value) -> list[ir.Value]:
    bits = _bits(x)
    if not bits or (bits in (8, 32) and b.opset >= 14):
        return [_out(b, node, "Relu", [x], {})]
    return [_out(b, node, "Relu", [x], {}, domain=THINKER, form=str(bits))]


POOL_NAMES = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


def max_pool(b: Builder, node: Node, x: ir.Value) -> list[ir.Value]:
    given = dict(zip(POOL_NAMES, node.args, strict=False)) | node.kwargs
    rank = len(node.inputs()[0].shape) - 2
    if rank < 1:
        raise LingerError(f"{node.name}: max_pool without a batch axis cannot be exported; add one")

    def each(key: str, default: Any) -> list[int]:
        value = given.get(key)
        value = default if value is None or value == [] else value
        return pytree_ints(value) if isinstance(value, (tuple, list)) else [int(value)] * rank

    kernel = each("kernel_size", 1)
    stride, padding, dilation = each("stride", kernel), each("padding", 0), each("dilation", 1)
    ends = padding
    if given.get("ceil_mode", False):  # as explicit padding: ONNX keeps windows that begin in it, PyTorch drops them
        source, out = node.inputs()[0].shape[2:], node.outputs[0].shape[2:]
        if is_dynamic((source, out)):
            raise LingerError(f"{node.name}: max_pool with ceil_mode along a dynamic axis; fix that axis")
        sizes = zip(source, out, kernel, stride, padding, dilation, strict=True)
        ends = [max(0, (o - 1) * s + d * (k - 1) + 1 - n - p) for n, o, k, s, p, d in sizes]
    attrs = {"kernel_shape": kernel, "strides": stride, "pads": padding + ends, "dilations": dilation, "ceil_mode": 0}
    bits = _bits(x)
    if bits in (0, 8):
        return [_out(b, node, "MaxPool", [x], attrs)]
    return [_out(b, node, "MaxPool", [x], attrs, domain=THINKER, form=str(bits))]


def pad(b: Builder, node: Node, x: ir.Value) -> list[ir.Value]:
    """F.pad of every mode; on integers with zeros or existing values."""
    given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
    widths, rank = pytree_ints(given["pad"]), len(node.outputs[0].shape)
    mode = given.get("mode", "constant")
    n = len(widths) // 2
    begins, ends = [widths[2 * (n - 1 - i)] for i in range(n)], [widths[2 * (n - 1 - i) + 1] for i in range(n)]
    front = (0,) * (rank - n)
    lowered = lowered_pad(mode, front, (*begins, *ends), _bits(x))
    amounts = b.ints([int(v) for v in lowered.params["pads"]])
    if _bits(x):
        return [_out(b, node, "iqPad", [x, amounts], dict(lowered.attrs), domain=THINKER, form=lowered.form)]
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    if mode not in modes:
        raise LingerError(f"{node.name}: padding mode {mode} on floats cannot be exported; use reflect or replicate")
    assert x.dtype is not None
    value = np.array(given.get("value") or 0.0, x.dtype.numpy())
    return [_out(b, node, "Pad", [x, amounts, b.constant(f"{node.name}.value", value)], {"mode": modes[mode]})]


MOVES: dict[str, Move] = {
    "view": reshape, "reshape": reshape, "flatten": flatten, "permute": transpose, "transpose": transpose,
    "squeeze": squeeze("Squeeze"), "unsqueeze": squeeze("Unsqueeze"), "getitem": getitem, "split": pieces, "chunk": pieces,
    "unbind": pieces, "flip": flip, "expand": expand, "repeat": repeat, "identity": identity, "narrow": narrow,
    "select": narrow, "relu": relu, "max_pool": max_pool, "pad": pad, "dropout": dropout,
}  # fmt: skip
