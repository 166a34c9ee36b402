"""Run a file with the NumPy runtime or ONNX Runtime on inputs from files."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import onnx

from linger import runtime
from linger.arguments import named_inputs
from linger.errors import LingerError, during
from linger.files import fitted
from linger.onnx.golden import stored
from linger.verify import LEVELS, session


def execute(path: str | os.PathLike[str], given: list[str], runner: str, every: bool) -> dict[str, np.ndarray]:
    """Outputs by name, in order, or every tensor that a node makes.

    Args:
        path: the file.
        given: files or shapes, by name or in order; none for the golden inputs.
        runner: "runtime" or one of ``LEVELS``.
        every: all tensors of the graph, its inputs too.

    Raises:
        LingerError: the file or an input cannot be read, or the file does not run on the inputs.
    """
    with during("run"):
        if runner != "runtime" and runner not in LEVELS:
            raise LingerError(f"the runner is {runner!r}, allowed are runtime, {', '.join(LEVELS)}; choose one of them")
        proto = runtime.read(path)
        feed = feed_of(proto, given)
        if runner == "runtime":
            return of_runtime(proto, feed, every, os.fspath(path))
        return of_onnxruntime(proto, feed, every, runner)


def feed_of(proto: onnx.ModelProto, given: list[str]) -> dict[str, np.ndarray]:
    """Inputs by name in the types and ranks that the file declares; the golden ones where none are given."""
    golden = None if given else stored(proto)
    if golden is not None:
        return dict(golden.inputs)
    stores = {i.name for i in proto.graph.initializer}
    declared = {i.name: i for i in proto.graph.input if i.name not in stores}
    arrays = named_inputs(given)
    free = iter([name for name in declared if name not in {n for n, _ in arrays}])
    feed = {(name if name in declared else next(free, name)): array for name, array in arrays}
    if sorted(feed) != sorted(declared):
        raise LingerError(
            f"found {len(arrays)} inputs, the file takes {', '.join(declared)}; pass --input once for each, name=file to say which"
        )
    return {name: _fitted(array, declared[name]) for name, array in feed.items()}


def _fitted(array: np.ndarray, value: onnx.ValueInfoProto) -> np.ndarray:
    tensor = value.type.tensor_type
    rank = len(tensor.shape.dim) if tensor.HasField("shape") else None
    return fitted(array, rank, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type) if tensor.elem_type else None)


def of_runtime(
    proto: onnx.ModelProto, feed: Mapping[str, np.ndarray], every: bool, name: str = "the model"
) -> dict[str, np.ndarray]:
    """What the NumPy runtime makes; ``name`` is for errors."""
    model = runtime.from_proto(proto, name)
    model(dict(feed))
    made = [*model.inputs, *(n for node in proto.graph.node for n in node.output if n)] if every else model.outputs
    return {name: model.tensors[name] for name in made}


def of_onnxruntime(
    proto: onnx.ModelProto, feed: Mapping[str, np.ndarray], every: bool, level: str
) -> dict[str, np.ndarray]:
    """What ONNX Runtime makes, of a copy that returns every tensor where that is asked for."""
    if every:
        inner = onnx.ModelProto()
        inner.CopyFrom(proto)
        outputs = {o.name for o in proto.graph.output}
        names = [n for node in proto.graph.node for n in node.output if n and n not in outputs]
        inner.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
        proto = inner
    try:
        made = session(proto, level)
        found = made.run(None, dict(feed))
    except Exception as error:  # ONNX Runtime's own classes have no common base
        said = " ".join(str(error).split())
        raise LingerError(
            f"ONNX Runtime ({level}) does not run the file on these inputs: {said}; check them"
        ) from error
    return (dict(feed) if every else {}) | dict(zip([o.name for o in made.get_outputs()], found, strict=True))
