"""Float layers left in a net, as standard ONNX: activations, normalizations, products, pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from linger.onnx.emit import Emit, Row
from linger.onnx.float_math import clamp, unary
from linger.onnx.sizes import is_dynamic
from linger.ops.pool import divides

# --- activations


def _default_axis(rank: int) -> int:
    return 0 if rank in (0, 1, 3) else 1


def softmax(o: Emit, input: Any, dim: Any = None) -> ir.Value:
    """Before opset 13, Softmax flattens what follows its axis: only the last one means the same."""
    rank = len(input.shape)
    axis = _default_axis(rank) if dim is None else int(dim) % rank
    if o.opset >= 13 or axis == rank - 1:
        return o.Softmax(input, axis=axis)
    power = o.Exp(o.Sub(input, o.reduced("ReduceMax", input, [axis], True)))
    return o.Div(power, o.reduced("ReduceSum", power, [axis], True))


def log_softmax(o: Emit, input: Any, dim: Any = None) -> ir.Value:
    rank = len(input.shape)
    axis = _default_axis(rank) if dim is None else int(dim) % rank
    if o.opset >= 13 or axis == rank - 1:
        return o.LogSoftmax(input, axis=axis)
    return o.Sub(input, o.reduced("ReduceLogSumExp", input, [axis], True))


def softmin(o: Emit, input: Any, dim: Any = None) -> ir.Value:
    axis = _default_axis(len(input.shape)) if dim is None else int(dim) % len(input.shape)
    power = o.Exp(o.Sub(o.reduced("ReduceMin", input, [axis], True), input))
    return o.Div(power, o.reduced("ReduceSum", power, [axis], True))


def gelu(o: Emit, input: Any, approximate: str = "none") -> ir.Value:
    half = o.Mul(input, 0.5)
    if approximate == "none":
        return o.Mul(half, o.Add(o.Erf(o.Mul(input, 2**-0.5)), 1.0))
    cube = o.Mul(o.Mul(o.Mul(input, input), input), 0.044715)
    return o.Mul(half, o.Add(o.Tanh(o.Mul(o.Add(input, cube), (2 / np.pi) ** 0.5)), 1.0))


def softplus(o: Emit, input: Any, beta: float = 1.0, threshold: float = 20.0) -> ir.Value:
    scaled = o.Mul(input, beta)
    return o.Where(o.Greater(scaled, threshold), o.operand(input), o.Div(o.Softplus(scaled), beta))


def hardswish(o: Emit, input: Any) -> ir.Value:
    return o.Div(o.Mul(input, clamp(o, o.Add(input, 3.0), 0.0, 6.0)), 6.0)


def hardsigmoid(o: Emit, input: Any) -> ir.Value:
    return o.Div(clamp(o, o.Add(input, 3.0), 0.0, 6.0), 6.0)


def prelu(o: Emit, input: Any, weight: Any) -> ir.Value:
    count, rank = weight.shape[0] if weight.shape else 1, len(input.shape)
    if count == 1:
        return o.PRelu(input, o.Reshape(weight, o.ints([1])))
    return o.PRelu(input, o.Reshape(weight, o.ints([count] + [1] * (rank - 2))))


def glu(o: Emit, input: Any, dim: int = -1) -> ir.Value:
    axis, size = dim % len(input.shape), input.shape[dim]
    if is_dynamic([size]):
        raise o.refuse("glu along a dynamic axis", "fix that axis")
    x = o.operand(input)
    return o.Mul(o.sliced(x, axis, 0, size // 2), o.Sigmoid(o.sliced(x, axis, size // 2, size)))


def hardshrink(o: Emit, input: Any, lambd: float = 0.5) -> ir.Value:
    return o.Where(o.Greater(o.Abs(input), lambd), o.operand(input), 0.0)


def softshrink(o: Emit, input: Any, lambd: float = 0.5) -> ir.Value:
    return o.Mul(o.Sign(input), o.Max(o.Sub(o.Abs(input), lambd), 0.0))


def threshold(o: Emit, input: Any, threshold: float, value: float) -> ir.Value:
    return o.Where(o.Greater(input, threshold), o.operand(input), value)


def rrelu(o: Emit, input: Any, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False) -> ir.Value:
    return o.LeakyRelu(input, alpha=(lower + upper) / 2)


# --- normalizations


def _per_channel(o: Emit, x: Any, rank: int) -> ir.Value:
    """A vector over the channels, to be broadcast over an input of ``rank`` axes."""
    return o.Reshape(x, o.ints([-1] + [1] * (rank - 2)))


def batch_norm(
    o: Emit, input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: Any = 0.1, eps: float = 1e-5,
) -> ir.Value:  # fmt: skip
    if running_mean is None or training:
        x = _normalized(o, input, [0, *range(2, len(input.shape))], eps)
        return _affine(o, x, weight, bias, len(input.shape))
    ones, zeros = np.ones(input.shape[1], np.float32), np.zeros(input.shape[1], np.float32)
    scale, shift = ones if weight is None else weight, zeros if bias is None else bias
    return o.BatchNormalization(input, scale, shift, running_mean, running_var, epsilon=float(eps))


def _normalized(o: Emit, input: Any, axes: Sequence[int], eps: float) -> ir.Value:
    """(x - mean) / sqrt(var + eps); statistics over ``axes`` of the input itself."""
    off = o.Sub(input, o.reduced("ReduceMean", input, axes, True))
    return o.Div(off, o.Sqrt(o.Add(o.reduced("ReduceMean", o.Mul(off, off), axes, True), float(eps))))


def _affine(o: Emit, x: ir.Value, weight: Any, bias: Any, rank: int) -> ir.Value:
    x = x if weight is None else o.Mul(x, _per_channel(o, weight, rank))
    return x if bias is None else o.Add(x, _per_channel(o, bias, rank))


def instance_norm(
    o: Emit, input: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> ir.Value:  # fmt: skip
    if not use_input_stats:
        return batch_norm(o, input, running_mean, running_var, weight, bias, eps=eps)
    return _affine(o, _normalized(o, input, range(2, len(input.shape)), eps), weight, bias, len(input.shape))


def group_norm(o: Emit, input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    shape = input.shape
    if is_dynamic(list(shape[2:])):
        raise o.refuse("group_norm with a dynamic axis behind the channels", "fix that axis")
    x = _normalized(o, o.Reshape(input, o.ints([0, num_groups, -1])), [2], eps)
    return _affine(o, o.Reshape(x, o.ints([0, *(int(s) for s in shape[1:])])), weight, bias, len(shape))


def layer_norm(
    o: Emit, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> ir.Value:  # fmt: skip
    rank, count = len(input.shape), len(normalized_shape)
    if o.opset >= 17:
        scale = np.ones([int(n) for n in normalized_shape], np.float32) if weight is None else weight
        return o.LayerNormalization(input, scale, bias, axis=-count, epsilon=float(eps))
    x = _normalized(o, input, range(rank - count, rank), eps)
    x = x if weight is None else o.Mul(x, weight)
    return x if bias is None else o.Add(x, bias)


def rms_norm(o: Emit, input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> ir.Value:
    rank, count = len(input.shape), len(normalized_shape)
    mean = o.reduced("ReduceMean", o.Mul(input, input), range(rank - count, rank), True)
    x = o.Div(input, o.Sqrt(o.Add(mean, float(np.finfo(np.float32).eps if eps is None else eps))))
    return x if weight is None else o.Mul(x, weight)


def normalize(o: Emit, input: Any, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> ir.Value:
    if p not in (1, 2):
        raise o.refuse(f"normalize with p={p}", "use p=1 or p=2")
    axis = [dim % len(input.shape)]
    if p == 1:
        length = o.reduced("ReduceSum", o.Abs(input), axis, True)
    else:
        length = o.Sqrt(o.reduced("ReduceSum", o.Mul(input, input), axis, True))
    return o.Div(input, o.Max(length, float(eps)))


def local_response_norm(
    o: Emit, input: Any, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> ir.Value:
    """x / (k + alpha * mean of the squares of ``size`` channels) ^ beta; before the first and behind the last are zeros."""
    channels, rank = int(input.shape[1]), len(input.shape)
    pads = [0, size // 2, *[0] * (rank - 2), 0, (size - 1) // 2, *[0] * (rank - 2)]
    squares = o.Pad(o.Mul(input, input), o.ints(pads))
    total = o.sliced(squares, 1, 0, channels)
    for i in range(1, size):
        total = o.Add(total, o.sliced(squares, 1, i, i + channels))
    return o.Div(input, o.Pow(o.Add(o.Mul(total, alpha / size), float(k)), o.operand(float(beta))))


# --- products


def each(value: Any, rank: int) -> list[int]:
    """One number per spatial axis."""
    return [int(v) for v in value] * (rank // len(value)) if isinstance(value, (tuple, list)) else [int(value)] * rank


def conv(
    o: Emit, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> ir.Value:  # fmt: skip
    kernel = [int(k) for k in weight.shape[2:]]
    rank = len(kernel)
    _require_batch(o, input, rank)
    dilations = each(dilation, rank)
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        pads = (each(padding, rank) if padding != "valid" else [0] * rank) * 2
    attrs = {"kernel_shape": kernel, "strides": each(stride, rank), "dilations": dilations, "pads": pads}
    return o.Conv(input, weight, *([] if bias is None else [bias]), group=groups, **attrs)


def _require_batch(o: Emit, input: Any, rank: int) -> None:
    if len(input.shape) != rank + 2:
        raise o.refuse(f"an input of shape {tuple(int(s) for s in input.shape)} without a batch axis", "add one")


def conv_transpose(
    o: Emit, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> ir.Value:  # fmt: skip
    kernel = [int(k) for k in weight.shape[2:]]
    rank = len(kernel)
    _require_batch(o, input, rank)
    attrs = {
        "kernel_shape": kernel, "strides": each(stride, rank), "group": groups, "pads": each(padding, rank) * 2,
        "output_padding": each(output_padding, rank), "dilations": each(dilation, rank),
    }  # fmt: skip
    return o.ConvTranspose(input, weight, *([] if bias is None else [bias]), **attrs)


def linear(o: Emit, input: Any, weight: Any, bias: Any = None) -> ir.Value:
    turned = o.Transpose(weight, perm=[1, 0]) if len(weight.shape) == 2 else o.operand(weight)
    product = o.MatMul(input, turned)
    return product if bias is None else o.Add(product, bias)


def addmm(o: Emit, input: Any, mat1: Any, mat2: Any, beta: float = 1, alpha: float = 1) -> ir.Value:
    product = o.MatMul(mat1, mat2)
    product = product if alpha == 1 else o.Mul(product, alpha)
    return o.Add(input if beta == 1 else o.Mul(input, beta), product)


def attention(
    o: Emit, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> ir.Value:  # fmt: skip
    rank, length, width = len(query.shape), query.shape[-2], query.shape[-1]
    if dropout_p or enable_gqa or is_dynamic([width]) or (is_causal and is_dynamic([length, key.shape[-2]])):
        raise o.refuse("attention with active dropout, grouped heads or a causal mask of dynamic size", "fix the sizes")
    order = [*range(rank - 2), rank - 1, rank - 2]
    factor = int(width) ** -0.5 if scale is None else float(scale)
    scores = o.Mul(o.MatMul(query, o.Transpose(key, perm=order)), factor)
    if is_causal:
        scores = o.Add(scores, np.triu(np.full((length, key.shape[-2]), -np.inf, np.float32), 1))
    if attn_mask is not None:
        hidden = o.raw(attn_mask).dtype == ir.DataType.BOOL
        scores = o.Where(o.raw(attn_mask), scores, -float("inf")) if hidden else o.Add(scores, attn_mask)
    return o.MatMul(o.Softmax(scores, axis=rank - 1), value)


def masked(o: Emit, x: Any, *masks: Any, causal: bool = False, kept: bool = False, moved: bool = False) -> ir.Value:
    """The masks of attention: bool ones hide, float ones are added."""
    scores: Any = o.operand(x)
    for mask in masks:
        hides = o.raw(mask).dtype == ir.DataType.BOOL
        hidden = o.Not(o.raw(mask)) if hides and kept else o.raw(mask)
        scores = o.Where(hidden, o.number(-np.inf), scores) if hides else o.Add(scores, mask)
    if causal and is_dynamic(x.shape[-2:]):
        raise o.refuse("attention with a causal mask of dynamic size", "fix the sizes")
    later = np.triu(np.ones([int(n) for n in x.shape[-2:]], bool), 1)
    return o.Where(later, o.number(-np.inf), scores) if causal else scores


# --- pools


def average(
    o: Emit, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: Any = None, rank: int = 2,
) -> ir.Value:  # fmt: skip
    _require_batch(o, input, rank)
    kernel = each(kernel_size, rank)
    strides = kernel if stride in (None, [], ()) else each(stride, rank)
    attrs = {"kernel_shape": kernel, "strides": strides, "pads": each(padding, rank) * 2, "ceil_mode": int(ceil_mode)}
    if not divisor_override:
        return o.AveragePool(input, count_include_pad=int(count_include_pad), **attrs)
    if ceil_mode:
        raise o.refuse("avg_pool with divisor_override and ceil_mode", "leave one of them out")
    mean = o.AveragePool(input, count_include_pad=1, **attrs)
    return o.Mul(mean, float(np.prod(kernel)) / divisor_override)


def average_of(rank: int) -> Row:
    """avg_pool over ``rank`` spatial axes."""

    def row(
        o: Emit, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
        count_include_pad: bool = True, divisor_override: Any = None,
    ) -> ir.Value:  # fmt: skip
        return average(o, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, rank)

    return row


def adaptive(rank: int, largest: bool = False) -> Row:
    """adaptive_avg_pool and adaptive_max_pool: equal windows, or a matrix per axis whose rows are the windows."""

    def row(o: Emit, input: Any, output_size: Any, return_indices: bool = False) -> ir.Value:
        _require_batch(o, input, rank)
        sizes = input.shape[2:]
        wanted = [s if w is None else w for s, w in zip(sizes, _wanted(output_size, rank), strict=True)]
        if is_dynamic(list(sizes)):
            if all(w == 1 for w in wanted):
                return o.GlobalMaxPool(input) if largest else o.GlobalAveragePool(input)
            raise o.refuse("an adaptive pool along a dynamic axis", "use output_size 1, or fix that axis")
        if divides(sizes, tuple(wanted)):
            kernel = [int(s) // int(w) for s, w in zip(sizes, wanted, strict=True)]
            pool = o.MaxPool if largest else o.AveragePool
            return pool(input, kernel_shape=kernel, strides=kernel)
        if largest:
            raise o.refuse(f"adaptive_max_pool to {wanted} of {list(map(int, sizes))}", "choose sizes that divide")
        return _by_matrices(o, input, [int(s) for s in sizes], [int(w) for w in wanted])

    return row


def _wanted(output_size: Any, rank: int) -> list[Any]:
    return list(output_size) if isinstance(output_size, (tuple, list)) else [output_size] * rank


def _by_matrices(o: Emit, input: Any, sizes: Sequence[int], wanted: Sequence[int]) -> ir.Value:
    """Each spatial axis times the matrix of its windows: (..., s) @ (s, w)."""
    x, rank = o.operand(input), len(input.shape)
    for i, (size, out) in enumerate(zip(sizes, wanted, strict=True)):
        windows = np.zeros((size, out), np.float32)
        for j in range(out):
            start, end = j * size // out, -(-(j + 1) * size // out)
            windows[start:end, j] = 1 / (end - start)
        order = list(range(rank))
        order[2 + i], order[-1] = order[-1], order[2 + i]
        x = o.Transpose(o.MatMul(o.Transpose(x, perm=order), windows), perm=order)
    return x  # type: ignore[return-value]


NN: dict[str, Row] = {
    "softmax": softmax, "log_softmax": log_softmax, "softmin": softmin, "gelu": gelu, "softplus": softplus,
    "silu": lambda o, input: o.Mul(input, o.Sigmoid(input)), "hardswish": hardswish, "hardsigmoid": hardsigmoid,
    "mish": lambda o, input: o.Mul(input, o.Tanh(o.Softplus(input))), "selu": unary("Selu"), "relu": unary("Relu"),
    "leaky_relu": lambda o, input, negative_slope=0.01: o.LeakyRelu(input, alpha=float(negative_slope)),
    "elu": lambda o, input, alpha=1.0: o.Elu(input, alpha=float(alpha)),
    "celu": lambda o, input, alpha=1.0: o.Celu(input, alpha=float(alpha)), "prelu": prelu, "rrelu": rrelu, "glu": glu,
    "tanhshrink": lambda o, input: o.Sub(input, o.Tanh(input)), "hardshrink": hardshrink, "softshrink": softshrink,
    "threshold": threshold, "log_sigmoid": lambda o, input: o.Neg(o.Softplus(o.Neg(input))),
    "logsigmoid": lambda o, input: o.Neg(o.Softplus(o.Neg(input))),
    "batch_norm": batch_norm, "instance_norm": instance_norm, "group_norm": group_norm, "layer_norm": layer_norm,
    "rms_norm": rms_norm, "normalize": normalize, "local_response_norm": local_response_norm,
    "conv1d": conv, "conv2d": conv, "conv3d": conv, "conv_transpose1d": conv_transpose,
    "conv_transpose2d": conv_transpose, "conv_transpose3d": conv_transpose, "linear": linear, "addmm": addmm,
    "baddbmm": lambda o, input, batch1, batch2, beta=1, alpha=1: addmm(o, input, batch1, batch2, beta, alpha),
    "matmul": lambda o, input, other: o.MatMul(input, other), "rmatmul": lambda o, input, other: o.MatMul(other, input),
    "bmm": lambda o, input, mat2: o.MatMul(input, mat2), "mm": lambda o, input, mat2: o.MatMul(input, mat2),
    "mv": lambda o, input, vec: o.MatMul(input, vec), "dot": lambda o, input, tensor: o.MatMul(input, tensor),
    "product": lambda o, x, y=None, left=None, right=None: o.MatMul(*((x, right or y) if left is None else (left, x))),
    "masked": masked, "scaled_dot_product_attention": attention, "avg_pool1d": average_of(1), "avg_pool2d": average_of(2),
    "avg_pool3d": average_of(3), "adaptive_avg_pool1d": adaptive(1), "adaptive_avg_pool2d": adaptive(2),
    "adaptive_avg_pool3d": adaptive(3), "adaptive_max_pool1d": adaptive(1, True),
    "adaptive_max_pool2d": adaptive(2, True), "adaptive_max_pool3d": adaptive(3, True),
}  # fmt: skip
