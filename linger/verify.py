"""Is the file equal to the net? PyTorch eval, the NumPy runtime and ONNX Runtime at every level, element by element."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linger import runtime
from linger.errors import LingerError, during

LEVELS = {
    "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first place where two runs differ. ``node`` is the output's name, or the first tensor inside that differs."""

    where: str
    node: str
    index: tuple[int, ...]
    expected: float
    found: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """What ``verify`` found. ``differing`` counts elements per runner, "runtime" and the four levels of ONNX Runtime."""

    elements: int
    differing: dict[str, int] = field(default_factory=dict)
    first: Difference | None = None

    @property
    def equal(self) -> bool:
        """Whether nothing differs anywhere."""
        return not any(self.differing.values())

    def __str__(self) -> str:
        if self.equal:
            levels = [name for name in self.differing if name in LEVELS]
            ran = ["PyTorch eval", *(["linger.runtime"] if "runtime" in self.differing else [])]
            ran += [f"ONNX Runtime ({', '.join(levels)})"] if levels else []
            left = (
                ""
                if levels
                else "; not in ONNX Runtime: plain torch.onnx.export writes no function bodies, linger.onnx.export does"
            )
            return f"equal: {self.elements} elements in {', '.join(ran)}{left}"
        text = ", ".join(f"{name} {n} of {self.elements}" for name, n in self.differing.items() if n)
        if self.first is not None:
            d = self.first
            text += (
                f"; first in {d.where}: {d.node}[{', '.join(map(str, d.index))}] is {d.found}, expected {d.expected}"
            )
        return f"differing: {text}"


def session(proto: onnx.ModelProto, level: str) -> ort.InferenceSession:
    """ONNX Runtime on the CPU at one of ``LEVELS``."""
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # four sessions at once share the cores
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def first_difference(expected: np.ndarray, found: np.ndarray) -> tuple[int, ...] | None:
    """Index of the first element that differs (NaN equals NaN), None where all are equal."""
    if expected.shape != found.shape:
        return ()
    same = (expected == found) | ((expected != expected) & (found != found))
    return None if same.all() else tuple(int(i) for i in np.argwhere(~same)[0])


def verify(net: nn.Module, path: str | os.PathLike[str], inputs: Any, *, quiet: bool = False) -> Report:
    """Compare the eval forward of ``net`` with the file, in the NumPy runtime and in ONNX Runtime at every level.

    Args:
        net: the net that was exported; its mode is put back afterwards.
        path: the file; dialect "standard" is compared in ONNX Runtime only, and a file written by plain
            ``torch.onnx.export``, which has no function bodies, in the runtime only: the report says so.
        inputs: what forward takes, one tensor or a tuple.
        quiet: do not print the report.

    Returns:
        The counts and, where something differs, the first node and element. Prints the same unless ``quiet``.
    """
    with during("verify"):
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        expected = [t.detach().cpu().numpy() for t in _eval(net, args)]
        proto = onnx.load(os.fspath(path))
        names = [i.name for i in proto.graph.input]
        tensors = [t.detach().cpu().numpy() for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
        if len(names) != len(tensors):
            raise LingerError(f"found {len(tensors)} inputs, the file takes {', '.join(names)}; pass those of forward")
        feed = dict(zip(names, tensors, strict=True))
        runs: dict[str, list[np.ndarray]] = {}
        reference: runtime.Model | None = None
        if any(i.domain == "thinker" for i in proto.opset_import):
            reference = runtime.from_proto(proto, os.fspath(path))
            out = reference(feed)
            runs["runtime"] = list(out) if isinstance(out, tuple) else [out]
        for level in LEVELS if reference is None or proto.functions else ():
            runs[level] = session(proto, level).run(None, feed)
        outputs = [o.name for o in proto.graph.output]
        differing = {
            where: sum(_count(e, f) for e, f in zip(expected, found, strict=True)) for where, found in runs.items()
        }
        first = next(
            (_locate(w, outputs, expected, runs[w], reference, proto, feed) for w, n in differing.items() if n), None
        )
        report = Report(elements=sum(e.size for e in expected), differing=differing, first=first)
    if not quiet:
        print(report)
    return report


def _eval(net: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    modes = {m: m.training for m in net.modules()}
    try:
        net.eval()
        with torch.no_grad():
            out = net(*args)
    finally:
        for m, mode in modes.items():
            m.training = mode
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]


def _count(expected: np.ndarray, found: np.ndarray) -> int:
    if expected.shape != found.shape:
        return max(expected.size, 1)
    return int(((expected != found) & ~((expected != expected) & (found != found))).sum())


def _locate(
    where: str, names: list[str], expected: list[np.ndarray], found: list[np.ndarray], reference: runtime.Model | None,
    proto: onnx.ModelProto, feed: dict[str, np.ndarray],
) -> Difference:  # fmt: skip
    """The first tensor inside the file at which ONNX Runtime leaves the reference; the output where there is none."""
    if reference is not None and where in LEVELS:
        inner = onnx.ModelProto()
        inner.CopyFrom(proto)
        kept = [n for node in proto.graph.node for n in node.output if n and n not in names]
        inner.graph.output.extend(onnx.ValueInfoProto(name=n) for n in kept)
        values = dict(zip(names + kept, session(inner, where).run(None, feed), strict=True))
        for node in proto.graph.node:
            for name in node.output:
                index = first_difference(reference.tensors[name], values[name])
                if index is not None:
                    return _difference(where, name, index, reference.tensors[name], values[name])
    for name, e, f in zip(names, expected, found, strict=True):
        index = first_difference(e, f)
        if index is not None:
            return _difference(where, name, index, e, f)
    raise LingerError(f"{where} differs but no element does; this is a bug of linger, please report it")


def _difference(where: str, node: str, index: tuple[int, ...], expected: np.ndarray, found: np.ndarray) -> Difference:
    if expected.shape != found.shape:
        return Difference(
            where=where,
            node=f"{node} of shape {found.shape}, expected {expected.shape},",
            index=(),
            expected=0.0,
            found=0.0,
        )
    return Difference(where=where, node=node, index=index, expected=float(expected[index]), found=float(found[index]))
