"""What lets a file verify itself: inputs, the outputs that PyTorch eval made of them, and a hash of every part.

Two entries of the file's metadata, both JSON with sorted keys. "golden": {"inputs": [tensor ...], "outputs": [tensor ...]}, a
tensor being {"name", "type", "shape", "data" (base64, little-endian)}. "hashes": part -> the first 16 hexadecimal digits of
SHA-256 of its bytes; parts are "initializer NAME", "node OUTPUT", "function NAME", "signature" and "golden".
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from linger.errors import LingerError

DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Inputs and the outputs that belong to them, by name, in the order of the file."""

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]


def embed(proto: onnx.ModelProto, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
    """Write both into the metadata of ``proto``, which must be finished otherwise.

    Raises:
        LingerError: there are more or fewer tensors than the file has, or one has a shape that the file does not allow.
    """
    values = [*proto.graph.input, *proto.graph.output]
    if len(inputs) != len(proto.graph.input):
        raise LingerError(
            f"found {len(inputs)} golden inputs, the file takes {', '.join(i.name for i in proto.graph.input)}; pass those "
            "of forward"
        )
    for value, array in zip(values, [*inputs, *outputs], strict=True):
        _refuse_shape(value, array)
    said = {
        "inputs": [_written(v, a) for v, a in zip(proto.graph.input, inputs, strict=True)],
        "outputs": [_written(v, a) for v, a in zip(proto.graph.output, outputs, strict=True)],
    }
    props = {p.key: p.value for p in proto.metadata_props}
    props["golden"] = json.dumps(said, sort_keys=True)
    hashes = {part: _digest(data) for part, data in _parts(proto, props["golden"])}
    props["hashes"] = json.dumps(hashes, sort_keys=True)
    del proto.metadata_props[:]
    proto.metadata_props.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in sorted(props.items()))


def _refuse_shape(value: onnx.ValueInfoProto, array: np.ndarray) -> None:
    dims = value.type.tensor_type.shape.dim
    wanted = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
    if len(wanted) != array.ndim or any(w not in (-1, n) for w, n in zip(wanted, array.shape, strict=True)):
        allowed = ", ".join("any" if w < 0 else str(w) for w in wanted)
        raise LingerError(
            f"golden: {value.name} has shape {array.shape}, allowed in this file is ({allowed}); pass that, or export with "
            "dynamic_axes"
        )


def _written(value: onnx.ValueInfoProto, array: np.ndarray) -> dict[str, Any]:
    """A tensor in the type that the file declares."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    data = np.ascontiguousarray(array.astype(dtype)).astype(dtype.newbyteorder("<")).tobytes()
    return {
        "name": value.name, "type": dtype.name, "shape": list(array.shape), "data": base64.b64encode(data).decode(),
    }  # fmt: skip


def stored(proto: onnx.ModelProto) -> Golden | None:
    """What ``embed`` wrote; None where there is nothing.

    Raises:
        LingerError: it cannot be read.
    """
    text = next((p.value for p in proto.metadata_props if p.key == "golden"), None)
    if text is None:
        return None
    try:
        said = json.loads(text)
        both = {kind: {t["name"]: _read(t) for t in said[kind]} for kind in ("inputs", "outputs")}
    except (ValueError, KeyError, TypeError) as error:
        raise LingerError(f"the golden tensors are damaged ({error}); export the net again") from None
    return Golden(**both)


def _read(said: Mapping[str, Any]) -> np.ndarray:
    dtype = np.dtype(said["type"])
    data = base64.b64decode(said["data"], validate=True)
    return np.frombuffer(data, dtype.newbyteorder("<")).reshape(said["shape"]).astype(dtype)


def damaged(proto: onnx.ModelProto) -> tuple[str, ...]:
    """The parts whose hash is another than the one written at export, in the order of the file; () without hashes."""
    props = {p.key: p.value for p in proto.metadata_props}
    if "hashes" not in props:
        return ()
    try:
        wanted = {str(k): str(v) for k, v in json.loads(props["hashes"]).items()}
    except (ValueError, AttributeError):
        return ("hashes",)
    found = {part: _digest(data) for part, data in _parts(proto, props.get("golden", ""))}
    return tuple(
        [part for part, digest in found.items() if wanted.get(part) != digest]
        + [f"{part} (missing)" for part in wanted if part not in found]
    )


def _parts(proto: onnx.ModelProto, golden: str | bytes) -> Iterator[tuple[str, bytes]]:
    """Every part and what is hashed of it; protobuf hands text that is no UTF-8 out as bytes."""
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        yield f"initializer {tensor.name}", f"{array.dtype} {array.shape} ".encode() + array.tobytes()
    for node in proto.graph.node:
        yield f"node {node.output[0]}", node.SerializeToString(deterministic=True)
    for function in proto.functions:
        name = f"{function.name}.{function.overload}".rstrip(".")
        yield f"function {name}", function.SerializeToString(deterministic=True)
    signature = [*proto.graph.input, *proto.graph.output, *proto.opset_import]
    yield "signature", b"".join(v.SerializeToString(deterministic=True) for v in signature)
    yield "golden", golden if isinstance(golden, bytes) else golden.encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGITS]
