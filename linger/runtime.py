"""Run an exported file on integers, with the NumPy reference of every op; keep every tensor.

model = linger.runtime.load("net.onnx")
y = model(x)
model.tensors["conv1"]
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from linger.errors import LingerError, during
from linger.numerics import exponent
from linger.ops import BY_NAME
from linger.rounding import HALF_UP, ROUNDINGS

ENGINE_NAMES = {"x_bits": "data_bits", "w_bits": "parameter_bits", "stride": "strides", "scale_i": "scale_x"}
STANDARD_OURS = ("Relu", "MaxPool", "Clip")
BROKEN = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError)  # what NumPy and onnx say of nonsense
Step = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Input:
    """What the file says of an input. A size may have a name, which stands for one number in all inputs, or be ""."""

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str, ...] | None

    def array(self, value: Any, sizes: dict[str, int]) -> np.ndarray:
        """``value`` as an array of this type and shape; ``sizes`` holds the named sizes met so far.

        Raises:
            LingerError: it is none.
        """
        x = self.read(value)
        if self.dtype is not None and x.dtype != self.dtype:
            raise LingerError(
                f"input {self.name} is {x.dtype}, allowed is {self.dtype}; convert it with astype(np.{self.dtype})"
            )
        return self.shaped(x, sizes)

    def read(self, value: Any) -> np.ndarray:
        """``value`` as an array of its own type and shape."""
        try:
            return np.asarray(value)
        except BROKEN as error:
            raise LingerError(f"input {self.name} is no array: {error}; pass a NumPy array or a CPU tensor") from None

    def shaped(self, x: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        """``x``, if it has this shape."""
        known = dict(sizes)
        if self.shape is not None and not self.fits(x.shape, sizes):
            allowed = ", ".join(str(known.get(str(n), n)) or "any" for n in self.shape)
            raise LingerError(
                f"input {self.name} has shape {x.shape}, allowed is ({allowed}); pass that, or export with dynamic_axes"
            )
        return x

    def fits(self, shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
        """Whether every size is the one the file says."""
        assert self.shape is not None
        wanted = [
            n if isinstance(n, int) or not n else sizes.setdefault(n, m)
            for n, m in zip(self.shape, shape, strict=False)
        ]
        return len(self.shape) == len(shape) and all(n in ("", m) for n, m in zip(wanted, shape, strict=True))


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
        self.declared = [declared(i) for i in proto.graph.input if i.name not in self.constants]
        self.inputs = [i.name for i in self.declared]
        self.outputs = [o.name for o in proto.graph.output]
        self.steps = [(node, self.step(node)) for node in proto.graph.node]
        self.tensors: dict[str, np.ndarray] = {}
        self._refuse_loose_ends()

    def _refuse_loose_ends(self) -> None:
        """Raise unless every node reads what comes before it."""
        made = {"", *self.constants, *self.inputs}
        for node in self.proto.graph.node:
            loose = [n for n in node.input if n not in made]
            if loose:
                raise LingerError(
                    f"{node.name or node.op_type} reads {loose[0]!r}, which nothing before it makes; export it again"
                )
            made.update(node.output)
        loose = [n for n in self.outputs if n not in made]
        if loose:
            raise LingerError(f"nothing makes the output {loose[0]!r}; export it again")

    def step(self, node: onnx.NodeProto) -> Step:
        """What runs this node: our reference for our ops and for standard ops on integers, else ONNX's own."""
        attrs = {ENGINE_NAMES.get(a.name, a.name): _attribute(a) for a in node.attribute}
        op = BY_NAME.get(node.op_type)
        if op is not None and _is_ours(node, attrs):
            with during("load", node.name or node.op_type):
                _check_scales(attrs)
                _check_rounding(op.half_up, attrs)
            run = op.run
            return lambda *x: run(*x, **attrs)
        if node.domain not in ("", "ai.onnx"):
            raise LingerError(
                f"load: {node.name or node.output[0]}: found {node.domain}::{node.op_type}, which linger does not know; "
                "load a file that linger exported"
            )
        if node.op_type == "Flatten":
            return lambda x: _flatten(x, attrs.get("axis", 1))
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
        tensors: dict[str, Any] = {**self.constants, **self._given(args, named), "": None}
        for node, run in self.steps:
            with during("runtime", node.name or node.output[0]):
                out = _outputs(node, run, [tensors[n] for n in node.input])
            tensors.update(zip(node.output, map(np.asarray, out), strict=False))
        del tensors[""]
        self.tensors = tensors
        results = tuple(tensors[n] for n in self.outputs)
        return results[0] if len(results) == 1 else results

    def _given(self, args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, np.ndarray]:
        """The inputs by name, as the file declares them."""
        if len(args) == 1 and isinstance(args[0], Mapping):
            named, args = {**args[0], **named}, ()
        names = [*self.inputs[: len(args)], *(f"input {i}" for i in range(len(self.inputs), len(args))), *named]
        if sorted(names) != sorted(self.inputs):
            raise LingerError(
                f"runtime: found inputs {', '.join(names) or 'none'}, allowed are {', '.join(self.inputs)}; pass exactly those"
            )
        given = dict(zip(self.inputs, args, strict=False)) | named
        sizes: dict[str, int] = {}
        with during("runtime"):
            return {i.name: i.array(given[i.name], sizes) for i in self.declared}


def _flatten(x: np.ndarray, axis: int) -> np.ndarray:
    """Flatten, also of an empty batch, which onnx.reference cannot reshape."""
    axis = axis % x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _outputs(node: onnx.NodeProto, run: Step, x: list[Any]) -> tuple[Any, ...]:
    """What a node makes of its inputs."""
    try:
        out = run(*x)
    except LingerError:
        raise
    except BROKEN as error:
        shapes = ", ".join("none" if v is None else str(v.shape) for v in x)
        raise LingerError(
            f"{node.op_type} does not run on inputs of shape {shapes} ({error}); export the net again"
        ) from error
    return out if isinstance(out, tuple) else (out,)


def declared(value: onnx.ValueInfoProto) -> Input:
    """What the file says of an input: its name, type and shape."""
    tensor = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type) if tensor.elem_type else None
    sizes = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim)
    return Input(name=value.name, dtype=dtype, shape=sizes if tensor.HasField("shape") else None)


def _is_ours(node: onnx.NodeProto, attrs: Mapping[str, Any]) -> bool:
    """Whether a node whose name we know means our op: by domain, by scales, or by the form only the chip reads."""
    if (
        node.domain not in ("", "ai.onnx")
        or (node.op_type in STANDARD_OURS and len(node.output) == 1)
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


def _check_rounding(half_up: bool, attrs: Mapping[str, Any]) -> None:
    found = attrs.get("rounding", HALF_UP)
    allowed = (HALF_UP,) if half_up else tuple(ROUNDINGS)
    if found not in allowed:
        raise LingerError(f"rounding is {found!r}, allowed are {', '.join(allowed)}; export the net again")


def load(path: str | os.PathLike[str]) -> Model:
    """Read a file that linger (or upstream 1.1.1) exported, in dialect "thinker" or the engine's newer spelling.

    Raises:
        LingerError: the file is missing, truncated, not ours, or holds scales that are not powers of two.
    """
    with during("load"):
        return from_proto(read(path), os.fspath(path))


def read(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Any ONNX file as it is.

    Raises:
        LingerError: it is missing, truncated, empty or none.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise LingerError(
            f"found a path of type {type(path).__name__}, allowed are a string and a Path; pass one of them"
        )
    try:
        proto = onnx.load(os.fspath(path))
    except FileNotFoundError:
        raise LingerError(f"there is no file {os.fspath(path)!r}; pass the path given to linger.onnx.export") from None
    except OSError as error:
        raise LingerError(
            f"{os.fspath(path)!r} cannot be read ({error.strerror}); pass the path given to linger.onnx.export"
        ) from None
    except (DecodeError, onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        raise LingerError(f"{os.fspath(path)!r} is truncated or not an ONNX file ({error}); export it again") from None
    _refuse_empty(proto, os.fspath(path))
    return proto


def from_proto(proto: onnx.ModelProto, name: str = "the model") -> Model:
    """The same for a model in memory."""
    try:
        _refuse_empty(proto, name)
        _refuse_foreign(proto, name)
        return Model(proto)
    except LingerError:
        raise
    except (*BROKEN, onnx.defs.SchemaError) as error:
        raise LingerError(f"{name!r} is damaged ({error}); export it again") from None


def _refuse_empty(proto: onnx.ModelProto, name: str) -> None:
    if not proto.graph.node or not proto.graph.output or not proto.opset_import:
        raise LingerError(f"{name!r} is truncated or empty: it has no nodes or no opset; export it again")


def _refuse_foreign(proto: onnx.ModelProto, name: str) -> None:
    if any(
        n.domain not in ("", "ai.onnx") if n.op_type in BY_NAME else n.op_type.endswith("Int") for n in proto.graph.node
    ):
        return
    ours = proto.producer_name == "linger"
    way = (
        'dialect="standard" and "qdq" run in ONNX Runtime; export with dialect="thinker"'
        if ours
        else "load a file that linger exported"
    )
    raise LingerError(f"{name!r} has no fixed-point node; {way}")
