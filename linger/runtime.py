"""Run an exported file on integers, with the NumPy reference of every op; keep every tensor.

model = linger.runtime.load("net.onnx")
y = model(x)
model.tensors["conv1"]
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from linger.errors import LingerError, during
from linger.numerics import exponent
from linger.ops import BY_NAME

ENGINE_NAMES = {"x_bits": "data_bits", "w_bits": "parameter_bits", "stride": "strides", "scale_i": "scale_x"}
STANDARD_OURS = ("Relu", "MaxPool", "Clip")
Step = Callable[..., Any]


class Model:
    """A loaded file. Calling it runs the graph; ``tensors`` holds every value of the last call by name.

    Attributes:
        inputs: names of the graph's inputs, in order.
        outputs: names of its outputs.
        tensors: name -> array of the last call, integers where the file has integers.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.opset = next(
            (i.version for i in proto.opset_import if i.domain in ("", "ai.onnx")), onnx.defs.onnx_opset_version()
        )
        self.constants = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
        self.inputs = [i.name for i in proto.graph.input if i.name not in self.constants]
        self.outputs = [o.name for o in proto.graph.output]
        self.steps = [(node, self.step(node)) for node in proto.graph.node]
        self.tensors: dict[str, np.ndarray] = {}

    def step(self, node: onnx.NodeProto) -> Step:
        """What runs this node: our reference for our ops and for standard ops on integers, else ONNX's own."""
        attrs = {ENGINE_NAMES.get(a.name, a.name): _attribute(a) for a in node.attribute}
        op = BY_NAME.get(node.op_type)
        if op is not None and _is_ours(node, attrs):
            with during("load", node.name or node.op_type):
                _check_scales(attrs)
            run = op.run
            return lambda *x: run(*x, **attrs)
        if node.domain not in ("", "ai.onnx"):
            raise LingerError(
                f"load: {node.name or node.output[0]}: found {node.domain}::{node.op_type}, which linger does not know; "
                "load a file that linger exported"
            )
        evaluator = self.evaluator(node)
        names = list(dict.fromkeys(str(n) for n in node.input if n))

        def standard(*x: Any) -> Any:
            by_name: dict[str, Any] = dict(zip(node.input, x, strict=True))
            out: Any = evaluator.run(None, {n: by_name[n] for n in names})
            return out[0] if len(out) == 1 else tuple(out)

        return standard

    def evaluator(self, node: onnx.NodeProto) -> ReferenceEvaluator:
        """ONNX's reference implementation of one standard node."""
        allowed = onnx.defs.get_schema(node.op_type, self.opset).attributes
        plain = onnx.NodeProto()
        plain.CopyFrom(node)
        del plain.attribute[:]
        plain.attribute.extend(
            a for a in node.attribute if a.name in allowed
        )  # the chip's own attributes mean nothing here
        inputs = [helper.make_value_info(n, onnx.TypeProto()) for n in dict.fromkeys(n for n in node.input if n)]
        outputs = [helper.make_value_info(n, onnx.TypeProto()) for n in node.output]
        graph = helper.make_graph([plain], "node", inputs, outputs)
        return ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)]))

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Run the file.

        Args:
            args: the inputs in order (arrays, or CPU tensors); float32 for a float input, integers for an integer one.
            named: inputs by name.

        Returns:
            The output array, or a tuple of them.
        """
        given: dict[str, Any] = dict(zip(self.inputs, args, strict=False)) | named
        if len(args) == 1 and isinstance(args[0], Mapping):
            given, args = dict(args[0]), ()
        missing, extra = [n for n in self.inputs if n not in given], [n for n in given if n not in self.inputs]
        if missing or extra or len(args) > len(self.inputs):
            raise LingerError(f"runtime: found inputs {list(given)}, allowed are {self.inputs}; pass exactly those")
        tensors = dict(self.constants)
        tensors.update({n: np.asarray(v) for n, v in given.items()})
        tensors[""] = None  # type: ignore[assignment]
        for node, run in self.steps:
            with during("runtime", node.name or node.output[0]):
                out = run(*(tensors[n] for n in node.input))
            for name, value in zip(node.output, out if isinstance(out, tuple) else (out,), strict=False):
                tensors[name] = np.asarray(value)
        del tensors[""]
        self.tensors = tensors
        results = tuple(tensors[n] for n in self.outputs)
        return results[0] if len(results) == 1 else results


def _is_ours(node: onnx.NodeProto, attrs: Mapping[str, Any]) -> bool:
    """Whether a node whose name we know means our op: by domain, by scales, or by the form only the chip reads."""
    if (
        node.domain not in ("", "ai.onnx")
        or node.op_type in STANDARD_OURS
        or any(k.startswith("scale_") for k in attrs)
    ):
        return True
    return node.op_type in ("Squeeze", "Unsqueeze") and "axes" in attrs and len(node.input) == 1


def _attribute(a: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(a)
    if isinstance(value, bytes):
        return value.decode()
    return tuple(value) if isinstance(value, (list, tuple)) or hasattr(value, "append") else value


def _check_scales(attrs: Mapping[str, Any]) -> None:
    for name, value in attrs.items():
        if name.startswith("scale_") and isinstance(value, float):
            try:
                exponent(value)
            except ValueError:
                raise LingerError(f"{name} is {value}, allowed are powers of two; export the net again") from None


def load(path: str | os.PathLike[str]) -> Model:
    """Read a file that linger (or upstream 1.1.1) exported, in dialect "thinker" or the engine's newer spelling.

    Raises:
        LingerError: the file is missing, truncated, not ours, or holds scales that are not powers of two.
    """
    with during("load"):
        try:
            proto = onnx.load(os.fspath(path))
        except FileNotFoundError:
            raise LingerError(
                f"there is no file {os.fspath(path)!r}; pass the path given to linger.onnx.export"
            ) from None
        except (DecodeError, onnx.checker.ValidationError, RuntimeError, ValueError) as error:
            raise LingerError(
                f"{os.fspath(path)!r} is truncated or not an ONNX file ({error}); export it again"
            ) from None
        return from_proto(proto, os.fspath(path))


def from_proto(proto: onnx.ModelProto, name: str = "the model") -> Model:
    """The same for a model in memory."""
    if not proto.graph.node or not proto.graph.output:
        raise LingerError(f"{name!r} is truncated or empty: it has no nodes; export it again")
    if not any(
        n.domain not in ("", "ai.onnx") if n.op_type in BY_NAME else n.op_type.endswith("Int") for n in proto.graph.node
    ):
        ours = proto.producer_name == "linger"
        way = (
            'dialect="standard" and "qdq" run in ONNX Runtime; export with dialect="thinker"'
            if ours
            else "load a file that linger exported"
        )
        raise LingerError(f"{name!r} has no fixed-point node; {way}")
    return Model(proto)
