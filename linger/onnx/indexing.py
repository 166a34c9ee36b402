"""Parts of tensors, as standard ONNX on integers or floats: slices, indices, pieces, and assignment to a part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from linger.errors import LingerError
from linger.onnx.builder import OPEN_END, Builder
from linger.onnx.moves import Move, expanded, pytree_ints, squeezed
from linger.onnx.sizes import Dyn, is_dynamic, same
from linger.trace import Node, Value

if TYPE_CHECKING:
    from linger.onnx.writer import Writer

Bound = int | ir.Value


def _slice(
    b: Builder, name: str, x: ir.Value, axis: int, start: Bound, end: Bound, step: int, shape: Sequence[int] | None
) -> ir.Value:
    assert x.dtype is not None
    ends = [v if isinstance(v, ir.Value) else b.ints([v]) for v in (start, end)]
    return b.one(name, "Slice", [x, *ends, b.ints([axis]), b.ints([step])], {}, x.dtype, shape)


def _bound(b: Builder, name: str, value: int, size: int) -> Bound:
    """A slice bound: a constant, a fixed distance from the end, or the size of an input."""
    if not isinstance(value, Dyn):
        return min(int(value), OPEN_END)
    if same(value, size):
        return OPEN_END
    gaps = {v - s for v, s in zip(value.values, getattr(size, "values", (size,) * len(value.values)), strict=True)}
    if len(gaps) == 1 and max(gaps) < 0:
        return gaps.pop()
    return b.computed_size(name, value)


def _picked(b: Builder, name: str, x: ir.Value, axis: int, index: int, sizes: Sequence[int]) -> ir.Value:
    """The slice of one element at ``index``; ``sizes`` are those of ``x``."""
    start = _bound(b, name, index, sizes[axis])
    if not isinstance(start, int):
        raise LingerError(f"{name}: the index {int(index)} changes with a dynamic axis; count it from the end")
    shape = [*sizes[:axis], 1, *sizes[axis + 1 :]]
    return _slice(b, name, x, axis, start, OPEN_END if start == -1 else start + 1, 1, shape)


# --- x[...]


def _parts(name: str, index: Any, rank: int) -> list[Any]:
    """The index as one entry per axis and per None; lists, ranges and arrays become int64 arrays."""
    given = [_as_array(i) for i in (index if isinstance(index, tuple) else (index,))]
    if any(isinstance(i, bool) for i in given):
        raise LingerError(
            f"{name}: found a truth value as an index, allowed are integers, slices and tensors; use None"
        )
    used = sum(_axes_taken(i) for i in given)
    rest = [slice(None)] * (rank - used)
    at = next((k for k, i in enumerate(given) if i is Ellipsis), len(given))
    return [*given[:at], *rest, *given[at + 1 :]]


def _as_array(i: Any) -> Any:
    if isinstance(i, (list, range, np.ndarray)):
        return np.asarray(i)
    return int(i) if isinstance(i, np.integer) else i


def _axes_taken(i: Any) -> int:
    """How many axes of the tensor an entry of the index stands for."""
    if i is None or i is Ellipsis:
        return 0
    return len(i.shape) if isinstance(i, Value) and i.dtype in (torch.bool, torch.uint8) else 1


def getitem(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
    """Integers, slices, None, Ellipsis, and one tensor or list of indices."""
    b, sizes = w.build, list(node.inputs()[0].shape)
    parts = _parts(node.name, node.args[1], len(sizes))
    _require_one_tensor(node, parts)
    axis = 0
    drop: list[int] = []
    grow: list[int] = []
    look: tuple[int, Any] | None = None
    for n, i in enumerate(parts):
        if i is None:
            grow.append(n - len(drop))
            continue
        if isinstance(i, slice):
            x, sizes = _sliced(b, f"{node.name}.{n}", x, axis, i, sizes)
        elif isinstance(i, (np.ndarray, Value)):
            look = axis - len(drop), i
        else:
            x = _picked(b, f"{node.name}.{n}", x, axis, i, sizes)
            sizes[axis] = 1
            drop.append(axis)
        axis += 1
    if drop:
        sizes = [s for k, s in enumerate(sizes) if k not in drop]
        x = squeezed(b, f"{node.name}.squeeze", x, "Squeeze", drop, sizes)
    if look is not None:
        return [_looked_up(w, node, x, *look)]
    if grow:
        x = squeezed(b, f"{node.name}.unsqueeze", x, "Unsqueeze", grow, node.outputs[0].shape)
    return [x]


def _require_one_tensor(node: Node, parts: Sequence[Any]) -> None:
    """More than one tensor of indices, or a slice between one and an integer, moves axes about."""
    looked = [n for n, i in enumerate(parts) if isinstance(i, (np.ndarray, Value))]
    numbers = [n for n, i in enumerate(parts) if isinstance(i, int)]
    both = sorted(looked + numbers)
    apart = bool(looked) and bool(numbers) and both != list(range(both[0], both[-1] + 1))
    if len(looked) > 1 or apart or (looked and any(i is None for i in parts)):
        raise LingerError(
            f"{node.name}: found an index of several tensors, or of a tensor beside None or integers, allowed are "
            "integers, slices, None and one tensor; index step by step"
        )


def _sliced(b: Builder, name: str, x: ir.Value, axis: int, i: slice, sizes: list[int]) -> tuple[ir.Value, list[int]]:
    size = sizes[axis]
    start, stop, step = i.start or 0, OPEN_END if i.stop is None else i.stop, i.step or 1
    if (start, stop, step) == (0, OPEN_END, 1):
        return x, sizes
    kept = len(range(*slice(int(start), min(int(stop), OPEN_END), step).indices(int(size))))
    sizes = [*sizes[:axis], _kept(size, i, kept), *sizes[axis + 1 :]]
    return _slice(b, name, x, axis, _bound(b, name, start, size), _bound(b, name, stop, size), step, sizes), sizes


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


def _looked_up(w: Writer, node: Node, x: ir.Value, axis: int, index: Any) -> ir.Value:
    """Elements along one axis by a tensor of indices, or by a constant mask of that axis."""
    assert x.dtype is not None
    return w.build.one(
        node.name, "Gather", [x, _indices(w, node, index)], {"axis": axis}, x.dtype, node.outputs[0].shape
    )


def _indices(w: Writer, node: Node, index: Any) -> ir.Value:
    if isinstance(index, np.ndarray):
        if index.dtype == bool:
            index = np.flatnonzero(index)
        return w.build.constant(f"{node.name}.index", index.astype(np.int64))
    if index.dtype in (torch.bool, torch.uint8):
        mask = w.constant_of(index)
        if mask is None or mask.ndim != 1:
            raise LingerError(
                f"{node.name}: found a mask as an index, so that the size of the result is not known, allowed are "
                "constant masks of one axis; use torch.where"
            )
        return w.build.constant(f"{node.name}.index", np.flatnonzero(mask).astype(np.int64))
    return w.integer(index)


def index_select(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
    """index_select(dim, index) and gather(dim, index)."""
    given: dict[str, Any] = dict(zip(("dim", "index"), node.args[1:], strict=False)) | node.kwargs
    op_type = "Gather" if node.op == "index_select" else "GatherElements"
    inputs = [x, w.integer(given["index"])]
    axis = int(given["dim"]) % len(node.inputs()[0].shape)
    assert x.dtype is not None
    return [w.build.one(node.name, op_type, inputs, {"axis": axis}, x.dtype, node.outputs[0].shape)]


# --- pieces


def pieces(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
    """split, chunk, unbind and their like: one Slice per output."""
    source = node.inputs()[0].shape
    unbind = node.op == "unbind"
    if unbind:
        dim = int(node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)) % len(source)
    else:
        cut = [d for d in range(len(source)) if any(not same(v.shape[d], source[d]) for v in node.outputs)]
        if not cut:
            return [x]
        dim = cut[0]
    outputs, start = [], 0
    for i, out in enumerate(node.outputs):
        size = 1 if unbind else out.shape[dim]
        if isinstance(size, Dyn) or (unbind and isinstance(source[dim], Dyn)):
            raise LingerError(f"{node.name}: {node.op} along a dynamic axis; fix that axis")
        shape = [*source[:dim], size, *source[dim + 1 :]]
        part = _slice(w.build, f"{node.name}.{i}", x, dim, start, start + int(size), 1, shape)
        name = f"{node.name}.{i}.squeeze"
        outputs.append(squeezed(w.build, name, part, "Squeeze", [dim], out.shape) if unbind else part)
        start += int(size)
    return outputs


def narrow(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
    """narrow(dim, start, length) and select(dim, index)."""
    names = ("dim", "start", "length") if node.op == "narrow" else ("dim", "index")
    given: dict[str, Any] = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    b, source, out = w.build, node.inputs()[0].shape, node.outputs[0].shape
    dim = int(given["dim"]) % len(source)
    if node.op == "select":
        part = _picked(b, f"{node.name}.0", x, dim, given["index"], source)
        return [squeezed(b, node.name, part, "Squeeze", [dim], out)]
    start, length = _bound(b, node.name, given["start"], source[dim]), given["length"]
    if not isinstance(length, Dyn) and isinstance(start, int):
        end = start + int(length)
        return [_slice(b, node.name, x, dim, start, end if end or start >= 0 else OPEN_END, 1, out)]
    if isinstance(length, Dyn) and start == 0:
        return [_slice(b, node.name, x, dim, 0, _bound(b, node.name, length, source[dim]), 1, out)]
    raise LingerError(
        f"{node.name}: the part of an axis changes with a dynamic one; use slices that count from the end"
    )


def flip(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
    shape = node.outputs[0].shape
    given = node.kwargs.get("dims", node.args[1:] if len(node.args) > 1 else ())
    dims = {"fliplr": [1], "flipud": [0]}.get(getattr(node.func, "__name__", ""), pytree_ints(given))
    for n, dim in enumerate(dims):
        x = _slice(w.build, f"{node.name}.{n}", x, dim % len(shape), -1, -OPEN_END, -1, shape)
    return [x]


def roll(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
    """What leaves one end of an axis enters at the other."""
    given: dict[str, Any] = dict(zip(("shifts", "dims"), node.args[1:], strict=False)) | node.kwargs
    shape, b = node.outputs[0].shape, w.build
    shifts, dims = (_several(given.get(key)) for key in ("shifts", "dims"))
    if not dims or is_dynamic([*shifts, *(shape[d] for d in dims)]):
        raise LingerError(f"{node.name}: roll without dims or along a dynamic axis; name the dims, or fix that axis")
    for n, (shift, d) in enumerate(zip(shifts, dims, strict=True)):
        axis, size = int(d) % len(shape), int(shape[d])
        cut = size - int(shift) % size
        last = _slice(b, f"{node.name}.{n}.last", x, axis, cut, OPEN_END, 1, _resized(shape, axis, size - cut))
        first = _slice(b, f"{node.name}.{n}.first", x, axis, 0, cut, 1, _resized(shape, axis, cut))
        assert x.dtype is not None
        x = b.one(f"{node.name}.{n}", "Concat", [last, first], {"axis": axis}, x.dtype, shape)
    return [x]


def _several(v: Any) -> list[int]:
    return [] if v is None else list(v) if isinstance(v, (tuple, list)) else [v]


def _resized(shape: Sequence[int], axis: int, size: int) -> list[int]:
    return [*shape[:axis], size, *shape[axis + 1 :]]


def repeat_interleave(w: Writer, node: Node, x: ir.Value) -> list[ir.Value]:
    """Every element of an axis a fixed number of times."""
    given: dict[str, Any] = dict(zip(("repeats", "dim"), node.args[1:], strict=False)) | node.kwargs
    source, repeats, dim = node.inputs()[0].shape, given["repeats"], given.get("dim")
    if dim is None or isinstance(repeats, Value) or is_dynamic([repeats, source[dim]]):
        raise LingerError(
            f"{node.name}: repeat_interleave without dim, by a tensor, or along a dynamic axis; name the dim, or fix the axis"
        )
    index = np.repeat(np.arange(int(source[dim]), dtype=np.int64), int(repeats))
    inputs = [x, w.build.constant(f"{node.name}.index", index)]
    assert x.dtype is not None
    axis = int(dim) % len(source)
    return [w.build.one(node.name, "Gather", inputs, {"axis": axis}, x.dtype, node.outputs[0].shape)]


# --- x[...] = value


def assigned(w: Writer, node: Node) -> ir.Value:
    """The tensor after ``x[index] = value``: what stays around the part, joined with the value; a mask chooses."""
    target, index, value = node.args
    x = w.as_is(target)
    assert x.dtype is not None
    if isinstance(index, Value) and index.dtype == torch.bool and index.shape == target.shape:
        inputs = [w.as_is(index), _typed(w, node, value, x.dtype), x]
        return w.build.one(node.name, "Where", inputs, {}, x.dtype, target.shape)
    parts = _parts(node.name, index, len(target.shape))
    if any(not isinstance(i, (int, slice)) or (isinstance(i, slice) and (i.step or 1) != 1) for i in parts):
        raise LingerError(
            f"{node.name}: found an assignment to an index of tensors or steps, allowed are integers, slices and a mask of "
            "the tensor's shape; use torch.where or torch.cat"
        )
    cuts = [_cut(w.build, node.name, i, size) for i, size in zip(parts, target.shape, strict=True)]
    region = [kept for _, _, kept in cuts]
    dropped = [axis for axis, i in enumerate(parts) if isinstance(i, int)]
    made = _spread(w, node, value, x.dtype, region, dropped)
    edges = [(axis, start, stop) for axis, (start, stop, _) in enumerate(cuts) if (start, stop) != (0, OPEN_END)]
    result = _around(w.build, node.name, x, made, edges)
    result.shape = w.build.shape(target.shape)
    return result


def _cut(b: Builder, name: str, i: Any, size: int) -> tuple[int, int, int]:
    """(start, stop, kept) of one axis; stop is ``OPEN_END`` at its end."""
    i = slice(i, i + 1 if i != -1 else None) if isinstance(i, int) else i
    start, stop = _bound(b, name, i.start or 0, size), _bound(b, name, OPEN_END if i.stop is None else i.stop, size)
    if not isinstance(start, int) or not isinstance(stop, int):
        raise LingerError(f"{name}: the part that is assigned to changes with a dynamic axis; fix that axis")
    if not isinstance(size, Dyn):
        start, stop, _ = slice(start, stop).indices(int(size))
        stop = OPEN_END if stop >= size else stop
    return start, stop, _kept(size, i, len(range(*i.indices(int(size)))))


def _typed(w: Writer, node: Node, value: Any, dtype: ir.DataType) -> ir.Value:
    """The assigned value in the type of the tensor."""
    if not isinstance(value, Value):
        return w.build.constant(f"{node.name}.value", np.array(value, dtype.numpy()))
    v = w.as_is(value)
    return (
        v if v.dtype == dtype else w.build.one(f"{node.name}.cast", "Cast", [v], {"to": int(dtype)}, dtype, value.shape)
    )


def _spread(
    w: Writer, node: Node, value: Any, dtype: ir.DataType, region: Sequence[int], dropped: Sequence[int]
) -> ir.Value:
    """The value broadcast to the part it is assigned to; ``dropped`` axes of the part are not in the value."""
    v = _typed(w, node, value, dtype)
    shape = list(value.shape) if isinstance(value, Value) else []
    if dropped and shape:
        axes = _missing(region, dropped, len(shape))
        for axis in axes:
            shape.insert(axis, 1)
        v = squeezed(w.build, f"{node.name}.aligned", v, "Unsqueeze", axes, shape)
    return expanded(w.build, f"{node.name}.spread", v, shape, region)


def _missing(region: Sequence[int], dropped: Sequence[int], rank: int) -> list[int]:
    """Positions of the axes that a value of ``rank`` axes lacks: the dropped ones and those in front."""
    kept = [axis for axis in range(len(region)) if axis not in dropped]
    return sorted([*dropped, *kept[: len(kept) - rank]])


def _around(b: Builder, name: str, x: ir.Value, part: ir.Value, edges: Sequence[tuple[int, int, int]]) -> ir.Value:
    """``x`` with ``part`` between the ``edges`` (axis, start, stop)."""
    if not edges:
        return part
    (axis, start, stop), *rest = edges
    assert x.dtype is not None
    pieces = []
    if start:
        pieces.append(_slice(b, f"{name}.before", x, axis, 0, start, 1, None))
    inside = _slice(b, f"{name}.inside", x, axis, start, stop, 1, None) if rest else x
    pieces.append(_around(b, name, inside, part, rest))
    if stop != OPEN_END:
        pieces.append(_slice(b, f"{name}.behind", x, axis, stop, OPEN_END, 1, None))
    return b.one(name, "Concat", pieces, {"axis": axis}, x.dtype, None)


INDEXING: dict[str, Move] = {
    "getitem": getitem, "split": pieces, "unbind": pieces, "narrow": narrow, "select": narrow, "flip": flip,
    "roll": roll, "index_select": index_select, "gather": index_select, "repeat_interleave": repeat_interleave,
}  # fmt: skip
