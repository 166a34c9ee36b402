"""What differs between two files: signature, nodes, stored tensors and metadata, each by name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from linger import runtime
from linger.contents import attributes
from linger.errors import LingerError, during

LONG = 60


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One difference: a part ("node", "tensor", "metadata", "input", ...), its name, and what was found in each file."""

    part: str
    name: str
    first: str
    second: str


@dataclass(frozen=True, kw_only=True)
class FileDifference:
    """All of them, in the order of the first file."""

    first: str
    second: str
    entries: tuple[Entry, ...]

    @property
    def equal(self) -> bool:
        """Whether there is none."""
        return not self.entries

    def __str__(self) -> str:
        if self.equal:
            return f"equal: {self.first} and {self.second}"
        lines = [f"{e.part} {e.name}: {e.first} -> {e.second}" for e in self.entries]
        count = "1 difference" if len(lines) == 1 else f"{len(lines)} differences"
        return "\n".join([*lines, f"{count} between {self.first} and {self.second}"])


def difference_of(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> FileDifference:
    """Compare two files part by part; nothing is run.

    Raises:
        LingerError: one of them cannot be read, or is damaged.
    """
    with during("diff"):
        a, b = _parts(first), _parts(second)
        entries = tuple(e for part in PARTS for e in _compared(part, a[part], b[part]))
    return FileDifference(first=os.fspath(first), second=os.fspath(second), entries=entries)


def _parts(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    proto = runtime.read(path)
    try:
        return {part: read(proto) for part, read in PARTS.items()}
    except runtime.BROKEN as error:
        raise LingerError(f"{os.fspath(path)!r} is damaged ({error}); export it again") from None


def _compared(part: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Entry]:
    for name in dict.fromkeys((*a, *b)):
        if name not in a or name not in b:
            yield Entry(
                part=part,
                name=name,
                first="there" if name in a else "missing",
                second="there" if name in b else "missing",
            )
        elif isinstance(a[name], np.ndarray):
            yield from _arrays(part, name, a[name], b[name])
        elif a[name] != b[name]:
            first, second = _unlike(a[name], b[name])
            yield Entry(part=part, name=name, first=first, second=second)


def _arrays(part: str, name: str, a: np.ndarray, b: np.ndarray) -> Iterator[Entry]:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        yield Entry(part=part, name=name, first=f"{a.dtype} {a.shape}", second=f"{b.dtype} {b.shape}")
        return
    unlike = np.argwhere(~((a == b) | ((a != a) & (b != b))))
    if len(unlike):
        index = tuple(int(i) for i in unlike[0])
        place = f"{list(index)} of {len(unlike)} of {a.size} elements"
        yield Entry(part=part, name=name, first=f"{a[index]} at {place}", second=f"{b[index]}")


def _unlike(a: Any, b: Any) -> tuple[str, str]:
    """Of two mappings only what differs; everything short."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = [k for k in dict.fromkeys((*a, *b)) if a.get(k) != b.get(k)]
        return tuple(", ".join(f"{k} = {m.get(k, 'missing')}" for k in keys) for m in (a, b))  # type: ignore[return-value]
    return tuple(t if len(t) <= LONG else f"{t[:LONG]}... ({len(t)} characters)" for t in map(str, (a, b)))  # type: ignore[return-value]


def _signature(p: onnx.ModelProto) -> dict[str, Any]:
    values = {
        f"{kind} {v.name}": str(v.type).replace("\n", " ")
        for kind, each in (("input", p.graph.input), ("output", p.graph.output))
        for v in each
    }
    return values | {f"opset of {i.domain or 'ai.onnx'}": i.version for i in p.opset_import}


def _nodes(p: onnx.ModelProto) -> dict[str, Any]:
    return {
        n.output[0]: {"op": f"{n.domain}::{n.op_type}".lstrip(":"), "inputs": list(n.input), **attributes(n)}
        for n in p.graph.node
    }


def _functions(p: onnx.ModelProto) -> dict[str, Any]:
    return {f"{f.name} {f.overload}".strip(): f.SerializeToString(deterministic=True) for f in p.functions}


PARTS: dict[str, Any] = {
    "signature": _signature,
    "node": _nodes,
    "tensor": lambda p: {i.name: numpy_helper.to_array(i) for i in p.graph.initializer},
    "function": _functions,
    "metadata": lambda p: {m.key: m.value for m in p.metadata_props},
}
