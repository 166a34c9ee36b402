"""Float calls left in a net, as standard ONNX: one row per call, ``row(w, node)`` returns the output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from linger.errors import LingerError
from linger.onnx.moves import squeezed
from linger.onnx.sizes import is_dynamic
from linger.ops.groupnorm import INSTANCE
from linger.ops.pool import adaptive_window
from linger.ops.variance import said
from linger.trace import Node, Value

if TYPE_CHECKING:
    from linger.onnx.writer import Writer

FloatOp = Callable[["Writer", Node], ir.Value]
FLOAT = ir.DataType.FLOAT


def bind(node: Node, *names: str, **defaults: Any) -> dict[str, Any]:
    """The call's arguments by name."""
    return defaults | dict(zip(names, node.args, strict=False)) | node.kwargs


def emit(
    w: Writer,
    node: Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attrs: dict[str, Any] | None = None,
    tail: str = "",
) -> ir.Value:
    shape = node.outputs[0].shape if not tail else None
    return w.build.one(f"{node.name}{tail}", op_type, inputs, attrs or {}, FLOAT, shape)


def compare(op_type: str) -> FloatOp:
    def row(w: Writer, node: Node) -> ir.Value:
        inputs = [w.plain(v) for v in node.args[:2]]
        return w.build.one(node.name, op_type, inputs, {}, ir.DataType.BOOL, node.outputs[0].shape)

    return row


def unary(op_type: str, **attrs: Any) -> FloatOp:
    return lambda w, node: emit(w, node, op_type, [w.plain(node.args[0])], dict(attrs))


def binary(op_type: str) -> FloatOp:
    def row(w: Writer, node: Node) -> ir.Value:
        given = bind(node, "input", "other", alpha=1)
        if given.get("rounding_mode") is not None:
            raise LingerError(f"{node.name}: div with rounding_mode cannot be exported; divide, then use floor")
        a, b = w.plain(given["input"]), w.plain(given["other"])
        if given["alpha"] != 1:
            b = emit(w, node, "Mul", [b, w.build.scalar(given["alpha"], f"{node.name}.alpha")], tail=".scaled")
        name = getattr(node.func, "__name__", "")
        return emit(w, node, op_type, [b, a] if name.startswith("__r") or name == "rsub" else [a, b])

    return row


def _pads(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [t // 2 for t in total] + [t - t // 2 for t in total]
    padding = [0] * len(kernel) if padding == "valid" else _each(padding, len(kernel))
    return padding * 2


def _each(value: Any, rank: int) -> list[int]:
    return [int(v) for v in value] * (rank // len(value)) if isinstance(value, (tuple, list)) else [int(value)] * rank


def conv(w: Writer, node: Node) -> ir.Value:
    given = bind(
        node,
        "input",
        "weight",
        "bias",
        "stride",
        "padding",
        "dilation",
        "groups",
        bias=None,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
    )
    kernel = given["weight"].shape[2:]
    dilation = _each(given["dilation"], len(kernel))
    attrs = {
        "kernel_shape": kernel, "strides": _each(given["stride"], len(kernel)), "dilations": dilation,
        "pads": _pads(given["padding"], kernel, dilation), "group": given["groups"],
    }  # fmt: skip
    inputs = [w.plain(given["input"]), w.plain(given["weight"])] + (
        [] if given["bias"] is None else [w.plain(given["bias"])]
    )
    return emit(w, node, "Conv", inputs, attrs)


def conv_transpose(w: Writer, node: Node) -> ir.Value:
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    given = bind(node, *names, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1)
    rank = len(given["weight"].shape) - 2
    attrs = {
        "kernel_shape": given["weight"].shape[2:], "strides": _each(given["stride"], rank), "group": given["groups"],
        "pads": _each(given["padding"], rank) * 2, "output_padding": _each(given["output_padding"], rank),
        "dilations": _each(given["dilation"], rank),
    }  # fmt: skip
    inputs = [w.plain(given["input"]), w.plain(given["weight"])] + (
        [] if given["bias"] is None else [w.plain(given["bias"])]
    )
    return emit(w, node, "ConvTranspose", inputs, attrs)


def linear(w: Writer, node: Node) -> ir.Value:
    given = bind(node, "input", "weight", "bias", bias=None)
    turned = emit(w, node, "Transpose", [w.plain(given["weight"])], {"perm": [1, 0]}, ".weight")
    if given["bias"] is None:
        return emit(w, node, "MatMul", [w.plain(given["input"]), turned])
    product = emit(w, node, "MatMul", [w.plain(given["input"]), turned], tail=".product")
    return emit(w, node, "Add", [product, w.plain(given["bias"])])


def batch_norm(w: Writer, node: Node) -> ir.Value:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = bind(node, *names, weight=None, bias=None, eps=1e-5)
    if given["running_mean"] is None:
        raise LingerError(
            f"{node.name}: batch_norm without running statistics cannot be exported; set track_running_stats=True"
        )
    channels = given["input"].shape[1]
    fill = {"weight": np.ones, "bias": np.zeros}
    factors = [
        w.build.constant(f"{node.name}.{key}", make(channels, np.float32))
        if given[key] is None
        else w.plain(given[key])
        for key, make in fill.items()
    ]
    inputs = [w.plain(given["input"]), *factors, w.plain(given["running_mean"]), w.plain(given["running_var"])]
    return emit(w, node, "BatchNormalization", inputs, {"epsilon": float(given["eps"])})


def softmax(op_type: str) -> FloatOp:
    def row(w: Writer, node: Node) -> ir.Value:
        dim = bind(node, "input", "dim").get("dim")
        rank = len(node.outputs[0].shape)
        axis = int(dim) % rank if dim is not None else (0 if rank in (0, 1, 3) else 1)
        if w.build.opset < 13 and axis != rank - 1:
            raise LingerError(
                f"{node.name}: {op_type} over axis {axis} needs opset 13, found {w.build.opset}; raise opset_version"
            )
        return emit(w, node, op_type, [w.plain(node.args[0])], {"axis": axis})

    return row


def clip(w: Writer, node: Node) -> ir.Value:
    given = bind(node, "input", "min", "max") if node.op not in ("relu6", "iqrelu6") else {"min": 0.0, "max": 6.0}
    low = given.get("min", given.get("min_val", -1.0 if node.op == "hardtanh" else None))
    high = given.get("max", given.get("max_val", 1.0 if node.op == "hardtanh" else None))
    bounds = [
        None if v is None else w.build.scalar(float(v), f"{node.name}.{n}") for n, v in (("min", low), ("max", high))
    ]
    return emit(w, node, "Clip", [w.plain(node.args[0]), *bounds])


def slope(op_type: str, name: str, default: float) -> FloatOp:
    def row(w: Writer, node: Node) -> ir.Value:
        return emit(
            w, node, op_type, [w.plain(node.args[0])], {"alpha": float(bind(node, "input", name).get(name, default))}
        )

    return row


def gelu(w: Writer, node: Node) -> ir.Value:
    x, s = w.plain(node.args[0]), w.build.scalar
    if node.kwargs.get("approximate", "none") != "none":
        raise LingerError(f"{node.name}: gelu with approximate='tanh' cannot be exported in float; use the exact form")
    scaled = emit(w, node, "Mul", [x, s(2**-0.5, "sqrt_half")], tail=".scaled")
    erf = emit(w, node, "Erf", [scaled], tail=".erf")
    half = emit(w, node, "Mul", [x, s(0.5, "half")], tail=".half")
    return emit(w, node, "Mul", [half, emit(w, node, "Add", [erf, s(1.0, "one")], tail=".sum")])


def silu(w: Writer, node: Node) -> ir.Value:
    x = w.plain(node.args[0])
    return emit(w, node, "Mul", [x, emit(w, node, "Sigmoid", [x], tail=".sigmoid")])


def hardswish(w: Writer, node: Node) -> ir.Value:
    x = w.plain(node.args[0])
    return emit(w, node, "Mul", [x, emit(w, node, "HardSigmoid", [x], {"alpha": 1 / 6, "beta": 0.5}, ".gate")])


def reduce(op_type: str) -> FloatOp:
    def row(w: Writer, node: Node) -> ir.Value:
        given = bind(node, "input", "dim", "keepdim", keepdim=False)
        rank = len(node.inputs()[0].shape)
        dim = given.get("dim", given.get("axis"))
        dims = (
            list(range(rank))
            if dim is None or dim == ()
            else [int(d) % rank for d in (dim if isinstance(dim, (tuple, list)) else [dim])]
        )
        attrs: dict[str, Any] = {"keepdims": int(bool(given["keepdim"]))}
        x = w.plain(node.args[0])
        if w.build.opset >= (13 if op_type == "ReduceSum" else 18):
            return emit(w, node, op_type, [x, w.build.ints(dims)], attrs)
        return emit(w, node, op_type, [x], attrs | {"axes": dims})

    return row


def cat(w: Writer, node: Node) -> ir.Value:
    given = bind(node, "tensors", "dim", dim=0)
    parts, axis = [w.plain(t) for t in given["tensors"]], int(given.get("axis", given["dim"]))
    if node.func is torch.stack:
        axis %= len(node.outputs[0].shape)
        shape = [*node.outputs[0].shape[:axis], 1, *node.outputs[0].shape[axis + 1 :]]
        parts = [squeezed(w.build, f"{node.name}.{i}", x, "Unsqueeze", [axis], shape) for i, x in enumerate(parts)]
    return emit(w, node, "Concat", parts, {"axis": axis})


def average(w: Writer, node: Node) -> ir.Value:
    x: Value = node.args[0]
    rank = len(x.shape) - 2
    if node.op == "iqavgpool" and "adaptive" in getattr(node.func, "__name__", ""):
        kernel, stride, padding = adaptive_window(x.shape[2:], bind(node, "input", "output_size")["output_size"])
        include, ceil = 1, 0
    else:
        given = bind(node, "input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad",
                     stride=None, padding=0, ceil_mode=False, count_include_pad=True)  # fmt: skip
        kernel = tuple(_each(given["kernel_size"], rank))
        stride = kernel if given["stride"] in (None, []) else tuple(_each(given["stride"], rank))
        padding, include, ceil = (
            tuple(_each(given["padding"], rank)),
            int(given["count_include_pad"]),
            int(given["ceil_mode"]),
        )
    attrs = {
        "kernel_shape": kernel,
        "strides": stride,
        "pads": padding * 2,
        "count_include_pad": include,
        "ceil_mode": ceil,
    }
    return emit(w, node, "AveragePool", [w.plain(x)], attrs)


def layer_norm(w: Writer, node: Node) -> ir.Value:
    given = bind(node, "input", "normalized_shape", "weight", "bias", "eps", weight=None, bias=None, eps=1e-5)
    if w.build.opset < 17:
        raise LingerError(f"{node.name}: layer_norm needs opset 17, found {w.build.opset}; raise opset_version")
    shape = given["normalized_shape"]
    weight = (
        w.build.constant(f"{node.name}.weight", np.ones(shape, np.float32))
        if given["weight"] is None
        else w.plain(given["weight"])
    )
    inputs = [w.plain(given["input"]), weight] + ([] if given["bias"] is None else [w.plain(given["bias"])])
    return emit(w, node, "LayerNormalization", inputs, {"axis": -len(shape), "epsilon": float(given["eps"])})


def _per_channel(w: Writer, node: Node, given: dict[str, Any], channels: int, space: int) -> list[ir.Value]:
    """Weight and bias, ones and zeros where there are none, in a shape that meets (N, C, *space)."""
    made = []
    for key, fill in (("weight", np.ones), ("bias", np.zeros)):
        value = given.get(key)
        x = w.build.constant(f"{node.name}.{key}", fill(channels, np.float32)) if value is None else w.plain(value)
        made.append(emit(w, node, "Reshape", [x, w.build.ints([channels, *[1] * space])], tail=f".{key}"))
    return made


def group_norm(w: Writer, node: Node) -> ir.Value:
    """Group and instance normalization: rows as channels of an InstanceNormalization, then factor and term per channel."""
    instance = node.op == "iqinstancenorm"
    names = INSTANCE[node.func] if instance else ("num_groups", "weight", "bias", "eps")
    given = bind(node, "input", *names, eps=1e-5)
    if instance and not given.get("use_input_stats", True):
        raise LingerError(
            f"{node.name}: instance_norm with running statistics cannot be exported in float; "
            "set track_running_stats=False or use nn.BatchNorm"
        )
    x: Value = given["input"]
    groups = int(x.shape[1]) if instance else int(given["num_groups"])
    size = sizes_of(node, x.shape[2:]) * (int(x.shape[1]) // groups)
    plain = w.plain(x)
    rows = emit(w, node, "Reshape", [plain, w.build.ints([0, groups, size])], tail=".rows")
    one, zero = (
        w.build.constant(f"{n}_{groups}", make(groups, np.float32))
        for n, make in (("ones", np.ones), ("zeros", np.zeros))
    )
    y = emit(w, node, "InstanceNormalization", [rows, one, zero], {"epsilon": float(given["eps"])}, ".normal")
    y = emit(w, node, "Reshape", [y, w.build.ints([0, *(int(n) for n in x.shape[1:])])], tail=".back")
    weight, bias = _per_channel(w, node, given, int(x.shape[1]), len(x.shape) - 2)
    return emit(w, node, "Add", [emit(w, node, "Mul", [y, weight], tail=".scaled"), bias])


def sizes_of(node: Node, sizes: Sequence[int]) -> int:
    """The product of sizes that the file must know."""
    if is_dynamic(tuple(sizes)):
        raise LingerError(f"{node.name}: {node.op} over a dynamic axis cannot be exported; fix that axis")
    return int(np.prod([int(n) for n in sizes]))


def _mean(w: Writer, node: Node, x: ir.Value, dims: list[int], keepdim: bool, tail: str) -> ir.Value:
    attrs = {"keepdims": int(keepdim)}
    if w.build.opset >= 18:
        return emit(w, node, "ReduceMean", [x, w.build.ints(dims)], attrs, tail)
    return emit(w, node, "ReduceMean", [x], attrs | {"axes": dims}, tail)


def rms_norm(w: Writer, node: Node) -> ir.Value:
    given = bind(node, "input", "normalized_shape", "weight", "eps", weight=None, eps=None)
    eps = float(np.finfo(np.float32).eps) if given["eps"] is None else float(given["eps"])
    x = w.plain(given["input"])
    square = emit(w, node, "Mul", [x, x], tail=".square")
    mean = _mean(w, node, square, list(range(-len(given["normalized_shape"]), 0)), True, ".mean")
    shifted = emit(w, node, "Add", [mean, w.build.scalar(eps, f"{node.name}.eps")], tail=".shifted")
    root = emit(w, node, "Sqrt", [shifted], tail=".root")
    if given["weight"] is None:
        return emit(w, node, "Div", [x, root])
    return emit(w, node, "Mul", [emit(w, node, "Div", [x, root], tail=".normal"), w.plain(given["weight"])])


def spread(w: Writer, node: Node) -> ir.Value:
    """Variance and standard deviation."""
    given = bind(node, "input", "dim", "unbiased", "keepdim")
    source: Value = given.pop("input")
    given["dim"] = given.pop("axis", given.get("dim"))
    asked = said(source.shape, **given)
    dims, x = list(asked.dims), w.plain(source)
    centred = emit(w, node, "Sub", [x, _mean(w, node, x, dims, True, ".mean")], tail=".centred")
    biased = _mean(w, node, emit(w, node, "Mul", [centred, centred], tail=".square"), dims, asked.keepdim, ".biased")
    n = sizes_of(node, [source.shape[d] for d in dims]) if asked.correction else 1
    factor = w.build.scalar(n / max(n - asked.correction, 0) if n > asked.correction else np.inf, f"{node.name}.factor")
    if node.op == "iqvar":
        return emit(w, node, "Mul", [biased, factor])
    return emit(w, node, "Sqrt", [emit(w, node, "Mul", [biased, factor], tail=".unbiased")])


def embedding(w: Writer, node: Node) -> ir.Value:
    given = bind(node, "input", "weight")
    return emit(w, node, "Gather", [w.plain(given["weight"]), w.as_is(given["input"])], {"axis": 0})


FLOAT_OPS: dict[str, FloatOp] = {
    "iqadd": binary("Add"), "iqsub": binary("Sub"), "iqmul": binary("Mul"), "iqdiv": binary("Div"), "iqcat": cat,
    "iqsum": reduce("ReduceSum"), "iqmean": reduce("ReduceMean"), "iqavgpool": average, "iqrelu6": clip, "relu6": clip,
    "matmul": binary("MatMul"), "bmm": binary("MatMul"), "__matmul__": binary("MatMul"), "pow": binary("Pow"),
    "maximum": binary("Max"), "minimum": binary("Min"), "gt": compare("Greater"), "lt": compare("Less"),
    "ge": compare("GreaterOrEqual"), "le": compare("LessOrEqual"), "eq": compare("Equal"),
    "conv1d": conv, "conv2d": conv, "conv_transpose1d": conv_transpose, "conv_transpose2d": conv_transpose,
    "linear": linear, "batch_norm": batch_norm, "iqlayernorm": layer_norm, "iqgroupnorm": group_norm,
    "iqinstancenorm": group_norm, "iqrmsnorm": rms_norm, "iqvar": spread, "iqstd": spread, "embedding": embedding,
    "softmax": softmax("Softmax"), "log_softmax": softmax("LogSoftmax"),
    "sigmoid": unary("Sigmoid"), "tanh": unary("Tanh"), "sin": unary("Sin"), "cos": unary("Cos"), "exp": unary("Exp"), "log": unary("Log"), "sqrt": unary("Sqrt"),
    "abs": unary("Abs"), "neg": unary("Neg"), "__neg__": unary("Neg"), "sign": unary("Sign"), "floor": unary("Floor"),
    "reciprocal": unary("Reciprocal"), "erf": unary("Erf"), "softplus": unary("Softplus"), "softsign": unary("Softsign"),
    "hardtanh": clip, "clamp": clip, "clip": clip, "gelu": gelu, "silu": silu, "hardswish": hardswish,
    "hardsigmoid": unary("HardSigmoid", alpha=1 / 6, beta=0.5), "leaky_relu": slope("LeakyRelu", "negative_slope", 0.01),
    "elu": slope("Elu", "alpha", 1.0),
}  # fmt: skip
