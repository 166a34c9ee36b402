"""Float calls left in a net, as standard ONNX: one row per call, ``row(w, node)`` returns the output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from linger.errors import LingerError
from linger.onnx.moves import squeezed
from linger.ops import BY_CALL, ROWS
from linger.ops._unary import UnarySite
from linger.ops.pool import adaptive_window
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
    """A clamp by numbers, or by tensors that broadcast: then a Max and a Min."""
    op = BY_CALL[node.func]  # type: ignore[index]
    given = dict(zip(op.names[node.func], node.args[1:], strict=False)) | node.kwargs  # type: ignore[index]
    default = {"iqrelu6": (0.0, 6.0), "iqhardtanh": (-1.0, 1.0)}.get(op.site, (None, None))
    low, high = (given.get(n, given.get(f"{n}_val", d)) for n, d in zip(("min", "max"), default, strict=True))
    y = w.plain(node.args[0])
    if not any(isinstance(v, Value) for v in (low, high)):
        names = ((low, f"{node.name}.min"), (high, f"{node.name}.max"))
        return emit(w, node, "Clip", [y, *(None if v is None else w.build.scalar(float(v), n) for v, n in names)])
    for bound, op_type, tail in ((low, "Max", ".above" if high is not None else ""), (high, "Min", "")):
        y = y if bound is None else emit(w, node, op_type, [y, w.plain(bound)], tail=tail)
    return y


def function(w: Writer, node: Node) -> ir.Value:
    """A function of one tensor in the standard ops that its row gives."""
    op = BY_CALL[node.func]  # type: ignore[index]
    call = dict(zip(op.names[node.func], node.args[1:], strict=False)) | node.kwargs  # type: ignore[index]
    meant, said = op.integer.meant(call)  # type: ignore[union-attr,operator]
    return w.build.inline(node.name, meant.real, w.plain(node.args[0]), said, node.outputs[0].shape)


def glu(w: Writer, node: Node) -> ir.Value:
    x: Value = node.args[0]
    axis = int(bind(node, "input", "dim", dim=-1)["dim"]) % len(x.shape)
    a, b = (
        w.build.one(f"{node.name}{tail}", "Slice", [w.plain(x), *map(w.build.ints, ([begin], [end], [axis]))], {}, FLOAT, None)
        for tail, begin, end in ((".a", 0, x.shape[axis] // 2), (".b", x.shape[axis] // 2, x.shape[axis]))
    )  # fmt: skip
    return emit(w, node, "Mul", [a, emit(w, node, "Sigmoid", [b], tail=".gate")])


def prelu(w: Writer, node: Node) -> ir.Value:
    x, weight = bind(node, "input", "weight").values()
    slopes, rank = w.plain(weight), len(x.shape)
    if rank > 2 and weight.shape != (1,):
        slopes = squeezed(
            w.build,
            f"{node.name}.slopes",
            slopes,
            "Unsqueeze",
            list(range(1, rank - 1)),
            (weight.shape[0], *[1] * (rank - 2)),
        )
    return emit(w, node, "PRelu", [w.plain(x), slopes])


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


def embedding(w: Writer, node: Node) -> ir.Value:
    given = bind(node, "input", "weight")
    return emit(w, node, "Gather", [w.plain(given["weight"]), w.as_is(given["input"])], {"axis": 0})


FLOAT_OPS: dict[str, FloatOp] = {
    op.site: function for op in ROWS if isinstance(op.integer, type) and issubclass(op.integer, UnarySite)
} | {
    "iqadd": binary("Add"), "iqsub": binary("Sub"), "iqmul": binary("Mul"), "iqdiv": binary("Div"), "iqcat": cat,
    "iqsum": reduce("ReduceSum"), "iqmean": reduce("ReduceMean"), "iqavgpool": average, "iqpow": binary("Pow"),
    "iqclamp": clip, "iqhardtanh": clip, "iqrelu6": clip, "iqabs": unary("Abs"), "iqneg": unary("Neg"), "iqsign": unary("Sign"),
    "iqglu": glu, "prelu": prelu, "matmul": binary("MatMul"), "bmm": binary("MatMul"), "__matmul__": binary("MatMul"),
    "maximum": binary("Max"), "minimum": binary("Min"), "gt": compare("Greater"), "lt": compare("Less"),
    "ge": compare("GreaterOrEqual"), "le": compare("LessOrEqual"), "eq": compare("Equal"),
    "conv1d": conv, "conv2d": conv, "conv_transpose1d": conv_transpose, "conv_transpose2d": conv_transpose,
    "linear": linear, "batch_norm": batch_norm, "layer_norm": layer_norm, "embedding": embedding,
    "softmax": softmax("Softmax"), "log_softmax": softmax("LogSoftmax"), "floor": unary("Floor"),
}  # fmt: skip
