"""Float calls that build, join, look up or resize tensors, as standard ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from torch.nn import functional as F

from linger.onnx.builder import ONNX_TYPES
from linger.onnx.emit import Emit, Row
from linger.onnx.float_nn import each
from linger.onnx.sizes import Dyn, is_dynamic
from linger.trace import Value


def cat(o: Emit, tensors: Sequence[Any], dim: int = 0) -> ir.Value:
    """Joined in the type of the result, which may be an integer's."""
    wanted = ONNX_TYPES.get(o.node.outputs[0].dtype, ir.DataType.FLOAT)
    parts = [o.operand(t) if wanted == ir.DataType.FLOAT else o.raw(t) for t in tensors]
    return o.Concat(*parts, axis=dim % len(o.node.outputs[0].shape))


def einsum(o: Emit, equation: str, *operands: Any) -> ir.Value:
    flat = operands[0] if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    return o.Einsum(*flat, equation=equation)


def embedding(
    o: Emit, input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, sparse: bool = False,
) -> ir.Value:  # fmt: skip
    if max_norm is not None:
        raise o.refuse("embedding with max_norm", "leave it out")
    return o.Gather(o.raw(weight), o.index(input), axis=0)


def one_hot(o: Emit, tensor: Any, num_classes: int = -1) -> ir.Value:
    if num_classes < 0:
        raise o.refuse("one_hot without num_classes", "give their number")
    classes = np.arange(num_classes, dtype=np.int64)
    return o.Equal(o.unsqueezed(o.index(tensor), len(tensor.shape)), classes)


def filled(value: float, given: str = "") -> Row:
    """zeros, ones, zeros_like, new_ones ...: one number in the shape of the result; ``given`` takes it from the call."""

    def row(o: Emit, *args: Any, fill_value: Any = None, size: Any = None, dtype: Any = None) -> ir.Value:
        number = fill_value if fill_value is not None else args[-1] if given else value
        if isinstance(number, Value):
            raise o.refuse(f"{o.node.op} with a tensor to fill in", "use expand")
        return o.expanded(o.operand(number), o.node.outputs[0].shape)

    return row


def arange(o: Emit, start: Any, end: Any = None, step: Any = 1) -> ir.Value:
    """With integer bounds; a bound may be a dynamic size."""
    if end is None:
        start, end = 0, start
    if not all(isinstance(v, int) for v in (start, end, step)):
        raise o.refuse("arange of numbers that are no integers", "register its result as a buffer")
    zero_d = o.ints([])
    ends = [o.Reshape(o.build.computed_size(o.node.name, v) if isinstance(v, Dyn) else o.ints([v]), zero_d)
            for v in (start, end, step)]  # fmt: skip
    return o.Range(*ends)


def triangle(upper: int) -> Row:
    """tril and triu of the last two axes."""

    def row(o: Emit, input: Any, diagonal: int = 0) -> ir.Value:
        rows, columns = input.shape[-2:]
        if is_dynamic([rows, columns]):
            raise o.refuse(f"{o.node.op} of a dynamic size", "fix those axes")
        ones = np.ones((int(rows), int(columns)), np.float32)
        return o.Mul(input, np.triu(ones, diagonal) if upper else np.tril(ones, diagonal))

    return row


# --- images


def interpolate(
    o: Emit, input: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest", align_corners: Any = None,
    recompute_scale_factor: Any = None, antialias: bool = False,
) -> ir.Value:  # fmt: skip
    modes = {"nearest": "nearest", "linear": "linear", "bilinear": "linear", "trilinear": "linear"}
    if mode not in modes or antialias:
        raise o.refuse(f"interpolate with mode {mode!r}", "use nearest, linear, bilinear or trilinear")
    source, out = input.shape, o.node.outputs[0].shape
    attrs: dict[str, Any] = {"mode": modes[mode], "coordinate_transformation_mode": _coordinates(mode, align_corners)}
    if mode == "nearest":
        attrs["nearest_mode"] = "floor"
    none = np.zeros(0, np.float32) if o.opset < 13 else None  # inputs became optional then
    scaled = scale_factor is not None and not recompute_scale_factor
    if scaled or is_dynamic(list(out)):
        factors = _factors(o, source, out, scale_factor)
        return o.Resize(input, none, np.array([1.0, 1.0, *factors], np.float32), **attrs)
    return o.Resize(input, none, none, o.ints([int(s) for s in out]), **attrs)


def _coordinates(mode: str, align_corners: Any) -> str:
    """How PyTorch maps an output's position to an input's."""
    return "asymmetric" if mode == "nearest" else "align_corners" if align_corners else "half_pixel"


def _factors(o: Emit, source: Sequence[int], out: Sequence[int], scale_factor: Any) -> list[float]:
    """Output size over input size per spatial axis, the same for every size."""
    rank = len(source) - 2
    if scale_factor is not None:
        many = isinstance(scale_factor, (tuple, list))
        return [float(f) for f in scale_factor] if many else [float(scale_factor)] * rank
    found: list[float] = []
    for s, t in zip(source[2:], out[2:], strict=True):
        ratios = {b / a for a, b in zip(getattr(s, "values", (s,)), getattr(t, "values", (t,)), strict=False)}
        if len(ratios) > 1 or isinstance(s, Dyn) != isinstance(t, Dyn):
            raise o.refuse("interpolate between dynamic sizes", "give scale_factor, or fix those axes")
        found.append(ratios.pop())
    return found


def unfold(o: Emit, input: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> ir.Value:
    """F.unfold: every element of a window by a convolution that picks it."""
    if not isinstance(input, Value) or len(input.shape) != 4 or o.node.func is not F.unfold:
        raise o.refuse("Tensor.unfold, or unfold without a batch axis", "use slices and torch.stack")
    kernel, channels = each(kernel_size, 2), int(input.shape[1])
    area = kernel[0] * kernel[1]
    picks = np.tile(np.eye(area, dtype=np.float32).reshape(area, 1, *kernel), (channels, 1, 1, 1))
    attrs = {"kernel_shape": kernel, "strides": each(stride, 2), "dilations": each(dilation, 2)}
    picked = o.Conv(input, picks, group=channels, pads=each(padding, 2) * 2, **attrs)
    return o.Reshape(picked, o.ints([0, channels * area, -1]))


def channel_shuffle(o: Emit, input: Any, groups: int) -> ir.Value:
    shape = input.shape
    split = (shape[0], groups, int(shape[1]) // groups, *shape[2:])
    order = [0, 2, 1, *range(3, len(split))]
    turned = o.Transpose(o.reshaped(input, split, shape), perm=order)
    return o.reshaped(turned, shape, [split[i] for i in order])


def max_pool(rank: int) -> Row:
    """max_pool3d, and max pools that return indices into the plane of each channel."""

    def row(
        o: Emit, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> Any:  # fmt: skip
        kernel = each(kernel_size, rank)
        if ceil_mode or len(input.shape) != rank + 2:
            raise o.refuse(f"{o.node.op} with ceil_mode or without a batch axis", "leave it out")
        strides = kernel if stride in (None, [], ()) else each(stride, rank)
        attrs = {"kernel_shape": kernel, "strides": strides, "pads": each(padding, rank) * 2,
                 "dilations": each(dilation, rank)}  # fmt: skip
        if len(o.node.outputs) == 1:
            return o.MaxPool(input, **attrs)
        plane = list(input.shape[2:])
        if is_dynamic(plane):
            raise o.refuse("indices of a max pool along a dynamic axis", "fix that axis")
        values, indices = o.nodes("MaxPool", [input], attrs, 2)
        indices.dtype = ir.DataType.INT64
        return values, o.Mod(indices, np.array(int(np.prod(plane)), np.int64))

    return row


TENSOR: dict[str, Row] = {
    "cat": cat, "concat": cat, "concatenate": cat, "einsum": einsum, "embedding": embedding, "one_hot": one_hot,
    "zeros": filled(0.0), "ones": filled(1.0), "empty": filled(0.0), "full": filled(0.0, "fill_value"),
    "zeros_like": filled(0.0), "ones_like": filled(1.0), "empty_like": filled(0.0),
    "full_like": filled(0.0, "fill_value"), "new_zeros": filled(0.0), "new_ones": filled(1.0),
    "new_empty": filled(0.0), "new_full": filled(0.0, "fill_value"), "arange": arange, "tril": triangle(0),
    "triu": triangle(1), "interpolate": interpolate, "upsample": interpolate, "unfold": unfold,
    "channel_shuffle": channel_shuffle, "max_pool3d": max_pool(3), "max_pool1d_with_indices": max_pool(1),
    "max_pool2d_with_indices": max_pool(2), "max_pool3d_with_indices": max_pool(3),
}  # fmt: skip
