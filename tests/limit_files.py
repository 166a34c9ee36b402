"""Limits that no net of torch reaches alone, or only a large one: files of one node, row by row as in ``limit_nets``."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from limit_nets import ALL, SECOND, Row
from onnx import TensorProto, helper, numpy_helper

Shape = tuple[int, ...]

DTYPES = {0: TensorProto.FLOAT, 8: TensorProto.INT8, 16: TensorProto.INT16, 32: TensorProto.INT32}


def file(
    op: str, *shapes: Shape, out: Shape | None = None, bits: int = 8, out_bits: int = 8, stored: bool = True, **attrs: Any
) -> onnx.ModelProto:  # fmt: skip
    """A file of one node. Its operands but the first are constants where ``stored``; a width of 0 is float."""
    names = [f"x{i}" for i in range(len(shapes))]
    inputs = [helper.make_tensor_value_info(n, DTYPES[bits], s) for n, s in zip(names, shapes, strict=True)]
    constants = [numpy_helper.from_array(np.zeros(s, np.int8), n) for n, s in zip(names, shapes, strict=True)]
    fed = 1 if stored else len(shapes)
    output = helper.make_tensor_value_info("y", DTYPES[out_bits], shapes[0] if out is None else out)
    node = helper.make_node(op, names, ["y"], name="node", domain="thinker", **attrs)
    graph = helper.make_graph([node], "graph", inputs[:fed], [output], constants[fed:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("thinker", 1)])


def scaled(op: str, shape: Shape, x: int = 0, o: int = 0, **attrs: Any) -> onnx.ModelProto:
    """Scales are powers of two with these exponents, all others 1."""
    scales = {"scale_x": 2.0**x, "scale_o": 2.0**o, "scale_w": 1.0, "scale_y": 1.0}
    return file(op, shape, shape, **scales | attrs)


def window(
    op: str, size: int = 32, kernel: int = 3, channels: int = 8, outputs: int = 4, **attrs: Any
) -> onnx.ModelProto:
    """A convolution of an image, or of a sequence; ``attrs`` with one number for all axes."""
    axes = 1 if op == "Conv1dInt" else 2
    each = {"strides": axes, "dilations": axes, "pads": 2 * axes}
    said = {n: [v] * each[n] if n in each else v for n, v in attrs.items()}
    shape = said.pop("x", (1, channels, *[size] * axes))
    weight = (outputs, channels // said.get("group", 1), *[kernel] * axes)
    return file(op, shape, weight, kernel_shape=[kernel] * axes, **{"out": (1, outputs, *[4] * axes), **said})


def pool(op: str, kernel: int = 2, rank: int = 4, **attrs: Any) -> onnx.ModelProto:
    """Of 8 channels of 4 x 4."""
    said = {n: v if n == "bits" else [v] * 2 for n, v in attrs.items()}
    return file(op, (1, 8, 4, 4)[:rank], kernel_shape=[kernel] * 2, **said)


def matrix(op: str, rows: int, columns: int, **options: Any) -> onnx.ModelProto:
    """One row of the left side."""
    weight = (rows, columns) if op == "LinearInt" else (rows, columns, 1)
    return file(op, (1, columns) if op == "LinearInt" else (1, columns, 1), weight, out=(1, rows), **options)


def recurrent(op: str, shape: Shape = (1, 5, 8), **attrs: Any) -> onnx.ModelProto:
    """4 states."""
    gates = 4 * (4 if op == "LSTMInt" else 3)
    weights = ((gates, 8), (gates, 4), (gates,), (gates,))
    return file(op, shape, *weights, out=(*shape[:-1], 4), **{"batch_first": 1, "hidden_size": 4, **attrs})


CONVS = ("Conv1dInt", "Conv2dInt", "ConvTranspose2dInt")
VENUS, ARCS, VENUSA = ("venus",), ("arcs",), ("venusa",)


def windows() -> tuple[Row, ...]:
    """What convolutions and pools share."""
    made: list[Row] = []
    for op in CONVS:
        made += [
            (op, "stride", "", "error", ALL, lambda n, op=op: window(op, kernel=5, strides=n), 4, 5),
            (op, "pad", "", "error", VENUS, lambda n, op=op: window(op, kernel=5, pads=n), 4, 5),
            (op, "pad", "", "error", SECOND, lambda n, op=op: window(op, kernel=12, pads=n), 11, 12),
            (op, "kernel_over_stride", "", "error", ALL, lambda n, op=op: window(op, kernel=2, strides=n), 2, 4),
            (op, "kernel_over_pad", "", "error", ALL, lambda n, op=op: window(op, kernel=2, pads=n), 2, 3),
            (op, "input_bits", "", "error", ALL, lambda n, op=op: window(op, bits=n), 8, 16),
            (op, "weight_bits", "", "wrong", SECOND, lambda n, op=op: window(op, parameter_bits=n), 8, 4),
            (
                op,
                "batch",
                "",
                "wrong",
                SECOND,
                lambda n, op=op: window(op, x=(n, 8, 16, 16)[: 3 if "1d" in op else 4]),
                1,
                2,
            ),
        ]
    for op in ("AvgPool2dInt", "MaxPool"):
        made += [
            (op, "kernel_over_stride", "", "error", ALL, lambda n, op=op: pool(op, strides=n), 2, 3),
            (op, "kernel_over_pad", "", "error", ALL, lambda n, op=op: pool(op, pads=n), 2, 3),
            (op, "rank", "", "error", ALL, lambda n, op=op: pool(op, rank=n), 4, 3),
            (op, "input_bits", "", "error", ALL, lambda n, op=op: pool(op, bits=n), 8, 16),
        ]
    return tuple(made)


def scales() -> tuple[Row, ...]:
    """Shifts go right only, sums and pools have no finer output."""
    weighted = ("Conv1dInt", "Conv2dInt", "ConvTranspose2dInt", "LinearInt", "BatchNorm2dInt")
    return (
        *((op, "shift", "8-bit output", "error", ALL, lambda n, op=op: scaled(op, (8, 8, 8, 8), o=n), 0, 1) for op in weighted),
        *((op, "product_shift", "", "error", ALL, lambda n, op=op: scaled(op, (8, 8), o=n), 0, 1) for op in ("iqMul", "BmmInt")),
        *((op, "finer_output", "", "error", ALL, lambda n, op=op: scaled(op, (8, 8), o=n), 0, 1) for op in ("iqAdd", "iqSub")),
        ("AvgPool2dInt", "finer_output", "power of two", "error", ALL, lambda n: averaged(2, n), 0, 1),
        ("AvgPool2dInt", "finer_output", "power of two", "error", ALL, lambda n: averaged(2, n), 0, -1),
        ("AvgPool2dInt", "finer_output", "not a power of two", "error", ALL, lambda n: averaged(3, n), 0, -1),
        ("iqSigmoid", "scale_x", "", "error", VENUS, lambda n: scaled("iqSigmoid", (8,), x=n, bits=16), 11, 10),
        ("iqTanh", "scale_x", "", "error", VENUS, lambda n: scaled("iqTanh", (8,), x=n, bits=16), 11, 10),
        ("iqSigmoid", "scale_o", "", "wrong", SECOND, lambda n: scaled("iqSigmoid", (8,), o=n), 7, 8),
        ("iqSigmoid", "scale_o", "", "wrong", SECOND, lambda n: scaled("iqSigmoid", (8,), o=n), 7, 6),
        ("iqCat", "finer_input", "", "wrong", VENUSA, lambda n: file("iqCat", (8,), (8,), scale_x_0=1.0, scale_x_1=2.0**n, scale_o=1.0), 0, 1),
    )  # fmt: skip


def averaged(kernel: int, finer: int) -> onnx.ModelProto:
    """A mean of 12 x 12, whose output has 2^finer times the scale of its input."""
    return file("AvgPool2dInt", (1, 8, 12, 12), kernel_shape=[kernel] * 2, scale_x=1.0, scale_o=2.0**finer)


def widths() -> tuple[Row, ...]:
    """Of inputs and outputs: 0 is a float operand, where every width is allowed."""
    read = (
        *((op, ALL, 8, 16) for op in ("LinearInt", "BatchNorm2dInt", "SoftmaxInt", "LogSoftmaxInt", "LayerNormInt", "Requant")),
        ("BmmInt", ("venus", "arcs"), 8, 16), ("BmmInt", VENUSA, 16, 32), ("iqAdd", VENUS, 8, 16), ("iqAdd", ARCS, 32, 16),
        ("iqAdd", VENUSA, 32, 0), ("iqMul", ("venus", "venusa"), 32, 0), ("iqMul", ARCS, 8, 16), ("iqCat", VENUS, 32, 0),
        ("iqCat", SECOND, 32, 16), ("iqSigmoid", VENUS, 16, 8), ("iqSigmoid", SECOND, 8, 16), ("iqTanh", VENUS, 16, 32),
        ("Relu", ARCS, 32, 16),
    )  # fmt: skip
    made = (
        ("LinearInt", VENUS, 16, 0), ("LinearInt", SECOND, 32, 16), ("BmmInt", VENUS, 8, 16), ("BmmInt", ARCS, 32, 16),
        ("BmmInt", VENUSA, 32, 0),
    )  # fmt: skip
    shape = (1, 8, 8, 8)
    return (
        *((op, "input_bits", "", "error", chips, lambda n, op=op: file(op, shape, bits=n), most, least) for op, chips, most, least in read),
        *((op, "output_bits", "", "error", chips, lambda n, op=op: file(op, shape, out_bits=n), most, least) for op, chips, most, least in made),
        ("Conv2dInt", "output_bits", "", "wrong", ALL, lambda n: window("Conv2dInt", out_bits=n), 8, 16),
        ("Dequant", "input_bits", "", "wrong", ALL, lambda n: file("Dequant", shape, bits=n, out_bits=0), 8, 16),
        ("LinearInt", "weight_bits", "", "wrong", SECOND, lambda n: matrix("LinearInt", 8, 8, parameter_bits=n), 8, 4),
    )  # fmt: skip


FILES: tuple[Row, ...] = (
    *windows(), *scales(), *widths(),
    ("Conv1dInt", "kernel", "not dilated", "error", VENUSA, lambda n: window("Conv1dInt", kernel=n), 12, 13),
    ("Conv1dInt", "dilation", "", "error", ALL, lambda n: window("Conv1dInt", dilations=n), 1, 2),
    ("Conv1dInt", "groups", "grouped", "split", ALL, lambda n: window("Conv1dInt", group=n), 1, 2),
    ("Conv1dInt", "groups", "depthwise", "wrong", ALL, lambda n: window("Conv1dInt", outputs=8, group=n), 1, 8),
    ("Conv1dInt", "row_bytes", "", "error", ("venus", "venusa"), lambda n: window("Conv1dInt", kernel=4, channels=8 * n), 256, 257),
    ("Conv1dInt", "row_bytes", "", "error", ARCS, lambda n: window("Conv1dInt", kernel=4, channels=8 * n), 128, 129),
    ("Conv1dInt", "input_bytes", "", "error", VENUS, lambda n: window("Conv1dInt", size=n), 1024, 1025),
    ("Conv1dInt", "kernel_bytes", "not depthwise", "split", VENUS, lambda n: window("Conv1dInt", kernel=1, channels=64, outputs=n), 512, 513),
    *((op, "kernel_bytes", "not depthwise", "split", SECOND, lambda n, op=op: window(op, kernel=1, channels=1024, outputs=n), 640, 641)
      for op in ("Conv1dInt", "Conv2dInt")),
    ("Conv2dInt", "kernel_bytes", "depthwise", "error", VENUSA,
     lambda n: window("Conv2dInt", kernel=5, channels=8 * n, outputs=8 * n, group=8 * n), 2730, 2731),
    ("Conv2dInt", "output_bytes", "", "split", ALL, lambda n: window("Conv2dInt", kernel=1, out=(1, n, 32, 32)), 640, 641),
    ("LinearInt", "weight_bytes", "", "split", ALL, lambda n: matrix("LinearInt", n, 1024), 640, 641),
    ("BmmInt", "rank", "", "error", ALL, lambda n: file("BmmInt", (1,) * n), 3, 4),
    ("BatchNorm2dInt", "rank", "", "error", ALL, lambda n: file("BatchNorm2dInt", (1,) * n), 4, 3),
    ("BatchNorm2dInt", "rank", "", "error", ALL, lambda n: file("BatchNorm2dInt", (1,) * n), 4, 5),
    ("Transpose", "rank", "", "error", ALL, lambda n: file("Transpose", (1,) * n, perm=list(range(n))), 4, 5),
    ("AvgPool2dInt", "whole_input", "", "warning", SECOND, lambda n: pool("AvgPool2dInt", kernel=n), 2, 4),
    ("iqSub", "stretched", "", "wrong", ALL, lambda n: file("iqSub", (1, 8), (1, n)), 8, 1),
    ("iqDiv", "divisor", "", "error", ALL, lambda n: file("iqDiv", (1, 8), (), stored=bool(n)), 1, 0),
    ("iqPad", "pads_with_values", "", "wrong", ALL, lambda n: file("iqPad", (1, 8), mode="constant" if n else "reflect"), 1, 0),
    ("LogSoftmaxInt", "length", "", "error", ALL, lambda n: file("LogSoftmaxInt", (1, n)), 2048, 2049),
    ("LogSoftmaxInt", "length", "", "error", VENUSA, lambda n: file("LogSoftmaxInt", (1, n)), 1024, 1025),
    ("GluInt", "left_bytes", "", "error", VENUSA, lambda n: file("GluInt", (8 * n, 64), out=(8 * n, 32)), 64, 65),
    ("GluInt", "axis_from_end", "", "wrong", VENUSA, lambda n: file("GluInt", (8, 8), dim=n), 1, 0),
    ("LSTMInt", "layers", "", "error", ALL, lambda n: recurrent("LSTMInt", num_layers=n), 1, 2),
    ("GRUInt", "layers", "", "error", VENUS, lambda n: recurrent("GRUInt", num_layers=n), 1, 2),
    ("LSTMInt", "rank", "", "error", ALL, lambda n: recurrent("LSTMInt", (1, 5, 8)[3 - n :]), 3, 2),
    ("GRUInt", "rank", "", "error", VENUS, lambda n: recurrent("GRUInt", (1, 5, 8)[3 - n :]), 3, 2),
    ("GRUInt", "sequences", "", "error", VENUS, lambda n: recurrent("GRUInt", (n, 5, 8)), 1, 2),
    ("GRUInt", "backwards", "", "wrong", VENUS, lambda n: recurrent("GRUInt", go_forward=n), 1, 0),
)  # fmt: skip
