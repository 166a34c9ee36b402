"""Calls that only move values, as standard ONNX on integers or floats: ``move(w, node, x)`` returns the outputs.

``w`` is the ``Writer`` (its ``build`` adds nodes), ``node`` the recorded call, ``x`` the value its first operand has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from linger.errors import LingerError
from linger.onnx.builder import ONNX_TYPES, OPEN_END, THINKER, Builder, width
from linger.onnx.sizes import Dyn, is_dynamic, same
from linger.ops.pad import lowered as lowered_pad
from linger.trace import Node

if TYPE_CHECKING:
    from linger.onnx.writer import Writer

Move = Callable[["Writer", Node, ir.Value], list[ir.Value]]


def _out(
    b: Builder, node: Node, op_type: str, inputs: Sequence[ir.Value], attrs: dict[str, Any], **more: Any
) -> ir.Value:
    dtype = inputs[0].dtype
    assert dtype is not None
    return b.one(node.name, op_type, inputs, attrs, dtype, node.outputs[0].shape, **more)


def reshape(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
    source, wanted = node.inputs()[0].shape, node.outputs[0].shape
    if len(source) == len(wanted) and all(same(s, t) for s, t in zip(source, wanted, strict=True)):
        return [x]
    return [_out(w.build, node, "Reshape", [x, w.build.sizes(node.name, wanted, source)], {})]


def flatten(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
    source, out = node.inputs()[0].shape, node.outputs[0].shape
    if len(out) == 2 and len(source) > 2 and same(source[0], out[0]):
        return [_out(w.build, node, "Flatten", [x], {"axis": 1})]
    return reshape(w, node, x)


def transpose(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
    """permute, transpose, t, movedim, swapaxes: the order is read off a probe with distinct sizes."""
    rank = len(node.inputs()[0].shape)
    probe = torch.empty(tuple(range(1, rank + 1)), device="meta")
    assert node.func is not None
    moved = node.func(probe, *node.args[1:], **node.kwargs)
    return [_out(w.build, node, "Transpose", [x], {"perm": [s - 1 for s in moved.shape]})]


def _axes(node: Node, op_type: str) -> list[int]:
    source, out = node.inputs()[0].shape, node.outputs[0].shape
    dim: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if op_type == "Unsqueeze":
        return [int(dim) % len(out)]
    if dim is None:
        return [i for i, s in enumerate(source) if s == 1 and not isinstance(s, Dyn)]
    dims = dim if isinstance(dim, (tuple, list)) else [dim]
    return sorted(int(d) % len(source) for d in dims if source[int(d)] == 1 and not isinstance(source[int(d)], Dyn))


def squeeze(op_type: str) -> Move:
    def move(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
        axes = _axes(node, op_type)
        return [squeezed(w.build, node.name, x, op_type, axes, node.outputs[0].shape)] if axes else [x]

    return move


def squeezed(b: Builder, name: str, x: ir.Value, op_type: str, axes: Sequence[int], shape: Sequence[int]) -> ir.Value:
    """The chip reads ``axes`` as an attribute: on integers the node is ours, with a body; on floats it is standard."""
    assert x.dtype is not None
    if width(x):
        return b.one(name, op_type, [x], {"axes": axes}, x.dtype, shape, domain=THINKER)
    if b.opset < 13:
        return b.one(name, op_type, [x], {"axes": axes}, x.dtype, shape)
    return b.one(name, op_type, [x, b.ints(axes)], {}, x.dtype, shape)


def pytree_ints(tree: Any) -> list[int]:
    """The ints of nested tuples, in order."""
    return [int(v) for v in pytree.tree_leaves(tree)]


def expand(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
    source, wanted = node.inputs()[0].shape, node.outputs[0].shape
    return [expanded(w.build, node.name, x, source, wanted)]


def expanded(b: Builder, name: str, x: ir.Value, source: Sequence[int], wanted: Sequence[int]) -> ir.Value:
    """``x`` of shape ``source`` broadcast to ``wanted``; sizes that change are read from the inputs."""
    padded = (1,) * (len(wanted) - len(source)) + tuple(source)
    sizes = [1 if same(t, s) else t for t, s in zip(wanted, padded, strict=True)]
    assert x.dtype is not None
    return b.one(name, "Expand", [x, b.dimensions(name, sizes)], {}, x.dtype, wanted)


def repeat(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
    if is_dynamic((node.args, node.kwargs)):
        raise LingerError(f"{node.name}: the number of repeats changes with a dynamic axis; use expand or fix the axis")
    b, times = w.build, pytree_ints((node.args[1:], list(node.kwargs.values())))
    source, rank = node.inputs()[0].shape, len(node.outputs[0].shape)
    if len(source) < rank:
        padded = (1,) * (rank - len(source)) + tuple(source)
        assert x.dtype is not None
        x = b.one(f"{node.name}.unsqueezed", "Reshape", [x, b.sizes(node.name, padded, source)], {}, x.dtype, padded)
    times = [1] * (rank - len(times)) + times
    return [_out(b, node, "Tile", [x, b.ints(times)], {})]


def identity(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
    """clone, detach, to: nothing, or a Cast where a plain tensor changes its type; half floats only lose digits."""
    b, dtype, shape = w.build, node.outputs[0].dtype, node.outputs[0].shape
    wanted = ONNX_TYPES.get(dtype, x.dtype)
    if width(x) and node.inputs()[0].scale is not None:
        return [x]
    if dtype in HALF and node.inputs()[0].dtype != dtype:
        short = b.one(f"{node.name}.short", "Cast", [x], {"to": int(HALF[dtype])}, HALF[dtype], shape)
        return [b.one(node.name, "Cast", [short], {"to": int(ir.DataType.FLOAT)}, ir.DataType.FLOAT, shape)]
    if wanted == x.dtype or wanted is None:
        return [x]
    return [b.one(node.name, "Cast", [x], {"to": int(wanted)}, wanted, shape)]


HALF = {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}


def dropout(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
    """Nothing in eval; one that drops in eval too has no place in a file."""
    given: dict[str, Any] = dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
    if given.get("training", True) and given.get("p", 0.5):
        raise LingerError(f"{node.name}: dropout that is active in eval; pass training=self.training")
    return [x]


def relu(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
    bits = width(x)
    if not bits or (bits in (8, 32) and w.build.opset >= 14):
        return [_out(w.build, node, "Relu", [x], {})]
    return [_out(w.build, node, "Relu", [x], {}, domain=THINKER, form=str(bits))]


def pixel_shuffle(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
    """(n, c r r, h, w) -> (n, c, r, r, h, w) -> (n, c, h, r, w, r) -> (n, c, h r, w r), and back."""
    source, out, b = node.inputs()[0].shape, node.outputs[0].shape, w.build
    r = int(node.args[1] if len(node.args) > 1 else next(iter(node.kwargs.values())))
    if len(source) != 4 or is_dynamic(list(source[1:])):
        raise LingerError(f"{node.name}: pixel_shuffle without a batch axis or along a dynamic axis; fix those axes")
    n, (_, c, h, v) = source[0], (0, *(int(s) for s in source[1:]))
    up = node.op == "pixel_shuffle"
    apart = (n, c // r**2, r, r, h, v) if up else (n, c, h // r, r, v // r, r)
    order = [0, 1, 4, 2, 5, 3] if up else [0, 1, 3, 5, 2, 4]
    assert x.dtype is not None
    x = b.one(f"{node.name}.apart", "Reshape", [x, b.sizes(node.name, apart, source)], {}, x.dtype, apart)
    turned = tuple(apart[i] for i in order)
    x = b.one(f"{node.name}.turned", "Transpose", [x], {"perm": order}, x.dtype, turned)
    return [_out(b, node, "Reshape", [x, b.sizes(node.name, out, turned)], {})]


POOL_NAMES = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


def max_pool(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
    given = dict(zip(POOL_NAMES, node.args, strict=False)) | node.kwargs
    rank = 2 if node.func in (F.max_pool2d, torch.max_pool2d) else 1
    if len(node.inputs()[0].shape) != rank + 2:
        raise LingerError(f"{node.name}: max_pool without a batch axis cannot be exported; add one")
    if is_dynamic((node.args, node.kwargs)):
        raise LingerError(f"{node.name}: an argument of max_pool changes with a dynamic axis; fix that axis")

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
        if any(end >= k for end, k in zip(ends, kernel, strict=True)):
            raise LingerError(
                f"{node.name}: max_pool with ceil_mode and dilation reaches {max(ends)} places beyond the input, allowed are "
                f"fewer than the kernel's {min(kernel)}; leave ceil_mode or dilation out"
            )
    attrs = {"kernel_shape": kernel, "strides": stride, "pads": padding + ends, "dilations": dilation, "ceil_mode": 0}
    bits = width(x)
    if bits in (0, 8):
        return [_out(w.build, node, "MaxPool", [x], attrs)]
    return [_out(w.build, node, "MaxPool", [x], attrs, domain=THINKER, form=str(bits))]


def pad(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
    """F.pad of every mode; on integers with zeros or existing values."""
    names = ("input", "pad", "value") if node.func is torch.constant_pad_nd else ("input", "pad", "mode", "value")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    if is_dynamic(given["pad"]):
        raise LingerError(f"{node.name}: the amount of padding changes with a dynamic axis; fix that axis")
    widths, rank = pytree_ints(given["pad"]), len(node.outputs[0].shape)
    mode, n = given.get("mode", "constant"), len(widths) // 2
    begins, ends = [widths[2 * (n - 1 - i)] for i in range(n)], [widths[2 * (n - 1 - i) + 1] for i in range(n)]
    lowered = lowered_pad(mode, (0,) * (rank - n), (*begins, *ends), width(x))
    amounts = w.build.ints([int(v) for v in lowered.params["pads"]])
    if width(x):
        return [_out(w.build, node, "iqPad", [x, amounts], dict(lowered.attrs), domain=THINKER, form=lowered.form)]
    if mode == "circular":
        return [_wrapped(w.build, node, x, lowered.params["pads"].tolist())]
    if min(widths, default=0) < 0:  # what is cropped first; a Pad by less than nothing is not known everywhere
        x, amounts = _cropped(w.build, node, x, lowered.params["pads"])
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    assert x.dtype is not None
    value = w.build.constant(f"{node.name}.value", np.array(given.get("value") or 0.0, x.dtype.numpy()))
    return [_out(w.build, node, "Pad", [x, amounts, value], {"mode": modes[mode]})]


def _cropped(b: Builder, node: Node, x: ir.Value, pads: np.ndarray) -> tuple[ir.Value, ir.Value]:
    """The tensor without what negative amounts cut off, and the other amounts."""
    rank = len(pads) // 2
    starts, ends = [max(0, -int(v)) for v in pads[:rank]], [int(v) if v < 0 else OPEN_END for v in pads[rank:]]
    assert x.dtype is not None
    bounds = [b.ints(starts), b.ints(ends), b.ints(list(range(rank)))]
    x = b.one(f"{node.name}.cropped", "Slice", [x, *bounds], {}, x.dtype, None)
    return x, b.ints([max(0, int(v)) for v in pads])


def _wrapped(b: Builder, node: Node, x: ir.Value, pads: Sequence[int]) -> ir.Value:
    """Circular padding of floats: the end of each axis before it, its beginning behind it."""
    rank, dtype = len(pads) // 2, x.dtype
    last = max((axis for axis in range(rank) if pads[axis] or pads[rank + axis]), default=0)
    assert dtype is not None
    for axis in range(rank):
        begin, end = pads[axis], pads[rank + axis]
        if begin or end:
            step, along = b.ints([1]), b.ints([axis])
            front = [x, b.ints([-begin]), b.ints([OPEN_END]), along, step]
            back = [x, b.ints([0]), b.ints([end]), along, step]
            sides = [
                b.one(f"{node.name}.{axis}", "Slice", v, {}, dtype, None) for v, n in ((front, begin), (back, end)) if n
            ]
            parts = [sides[0], x, *sides[1:]] if begin else [x, *sides]
            x = b.one(f"{node.name}.{axis}", "Concat", parts, {"axis": axis}, dtype, None)
            x.shape = b.shape(node.outputs[0].shape) if axis == last else None
    return x


MOVES: dict[str, Move] = {
    "view": reshape, "reshape": reshape, "flatten": flatten, "permute": transpose, "transpose": transpose,
    "squeeze": squeeze("Squeeze"), "unsqueeze": squeeze("Unsqueeze"), "expand": expand, "repeat": repeat,
    "identity": identity, "relu": relu, "max_pool": max_pool, "pad": pad, "dropout": dropout,
    "pixel_shuffle": pixel_shuffle, "pixel_unshuffle": pixel_shuffle,
}  # fmt: skip
