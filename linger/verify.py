"""Is the file equal to the net? PyTorch eval, the NumPy runtime and ONNX Runtime at every level, element by element.

A file that was exported with golden inputs is compared with the outputs it holds, and every part of it with its hash.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from linger import runtime
from linger.errors import LingerError, during
from linger.onnx.golden import damaged, stored
from linger.onnx.inputs import array
from linger.swap import require_net
from linger.trace import tensors_of

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
    """What ``verify`` found. ``differing`` counts elements per runner, "runtime" and the four levels of ONNX Runtime.

    ``damaged``: parts of the file that changed since export; ``reference``: what made the expected outputs.
    """

    elements: int
    differing: dict[str, int] = field(default_factory=dict)
    first: Difference | None = None
    damaged: tuple[str, ...] = ()
    reference: str = "PyTorch eval"

    @property
    def equal(self) -> bool:
        """Whether nothing differs anywhere, and nothing of the file changed."""
        return not (any(self.differing.values()) or self.damaged)

    def __str__(self) -> str:
        said = [f"damaged since export: {', '.join(self.damaged)}"] if self.damaged else []
        return "; ".join(said + ([self._compared()] if self.differing else []))

    def _compared(self) -> str:
        if not any(self.differing.values()):
            levels = [name for name in self.differing if name in LEVELS]
            ran = [self.reference, *(["linger.runtime"] if "runtime" in self.differing else [])]
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


def verify(
    net: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    inputs: Any = None,
    *,
    kwargs: dict[str, Any] | None = None,
    quiet: bool = False,
) -> Report:
    """Compare the eval forward of ``net`` with the file, in the NumPy runtime and in ONNX Runtime at every level.

    ``verify("net.onnx")`` alone compares a file that was exported with ``golden=`` with the outputs that it holds, and every
    weight and node with its hash.

    Args:
        net: the net that was exported, its mode is put back afterwards; or the path of a file that verifies itself.
        path: the file; dialect "standard" is compared in ONNX Runtime only, and a file written by plain
            ``torch.onnx.export``, which has no function bodies, in the runtime only: the report says so.
        inputs: what forward takes, one tensor or a tuple.
        kwargs: keyword inputs of forward, in the order given to ``export``.
        quiet: do not print the report.

    Returns:
        The counts and, where something differs, the first node and element. Prints the same unless ``quiet``.

    Raises:
        LingerError: the file cannot be read, or the net or the file does not run on these inputs.
    """
    with during("verify"):
        if isinstance(net, (str, os.PathLike)) and path is None and inputs is None:
            report = _alone(net)
        else:
            require_net("verify", net)
            assert isinstance(net, nn.Module)
            report = _against(net, path, inputs, kwargs or {})
    if not quiet:
        print(report)
    return report


def _against(net: nn.Module, path: Any, inputs: Any, kwargs: dict[str, Any]) -> Report:
    args = inputs if type(inputs) is tuple else (inputs,)
    proto = runtime.read(path)
    names = [i.name for i in proto.graph.input]
    tensors = tensors_of((args, kwargs))
    if len(names) != len(tensors):
        raise LingerError(f"found {len(tensors)} inputs, the file takes {', '.join(names)}; pass those of forward")
    expected = [array(t) for t in _eval(net, args, kwargs)]
    feed = {i.name: _typed(t, i) for i, t in zip(proto.graph.input, tensors, strict=True)}
    return Report(**_compared(proto, os.fspath(path), expected, feed), damaged=damaged(proto))


def _alone(path: str | os.PathLike[str]) -> Report:
    """A file against what it says of itself."""
    proto = runtime.read(path)
    broken = damaged(proto)
    try:
        golden = stored(proto)
        if golden is None:
            raise LingerError(
                f"{os.fspath(path)!r} holds no golden inputs, allowed alone is a file exported with golden=x; pass the net and "
                "inputs too, linger.verify(net, path, x)"
            )
        found = _compared(proto, os.fspath(path), list(golden.outputs.values()), dict(golden.inputs))
    except LingerError:
        if not broken:
            raise
        found = {"elements": 0}  # a damaged file need not run
    return Report(**found, damaged=broken, reference="the golden outputs")


def _compared(
    proto: onnx.ModelProto, path: str, expected: list[np.ndarray], feed: dict[str, np.ndarray]
) -> dict[str, Any]:
    """What every runner makes of ``feed`` against ``expected``: the first three fields of a report."""
    runs, reference = _run(proto, path, feed)
    outputs = [o.name for o in proto.graph.output]
    differing = {where: _differing(expected, found) for where, found in runs.items()}
    first = next(
        (_locate(w, outputs, expected, runs[w], reference, proto, feed) for w, n in differing.items() if n), None
    )
    return {"elements": sum(e.size for e in expected), "differing": differing, "first": first}


def _typed(t: Tensor, value: onnx.ValueInfoProto) -> np.ndarray:
    """The input in the type that the file declares: a net of float64 is written as float32."""
    wanted = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    return array(t).astype(wanted) if t.dtype.is_floating_point else array(t)


def _run(
    proto: onnx.ModelProto, path: str, feed: dict[str, np.ndarray]
) -> tuple[dict[str, list[np.ndarray]], runtime.Model | None]:
    """What every runner makes of the inputs, and the NumPy runtime's model where the file is for it."""
    runs: dict[str, list[np.ndarray]] = {}
    reference: runtime.Model | None = None
    if any(i.domain == "thinker" for i in proto.opset_import):
        reference = runtime.from_proto(proto, path)
        out = reference(feed)
        runs["runtime"] = list(out) if isinstance(out, tuple) else [out]
    for level in LEVELS if reference is None or proto.functions else ():
        try:
            runs[level] = session(proto, level).run(None, feed)
        except Exception as error:  # ONNX Runtime's own classes have no common base
            raise LingerError(
                f"ONNX Runtime ({level}) does not run {path!r} on these inputs: {error}; export with dynamic_axes, or pass "
                "inputs of the shapes that it was exported with"
            ) from error
    return runs, reference


def _eval(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    modes = {m: m.training for m in net.modules()}
    try:
        net.eval()
        with torch.no_grad():
            out = net(*args, **kwargs)
    except LingerError:
        raise
    except Exception as error:
        shapes = [tuple(t.shape) for t in tensors_of((args, kwargs))]
        raise LingerError(
            f"the forward of {type(net).__name__} does not run on inputs of shape {shapes}: {error}; pass inputs that it accepts"
        ) from error
    finally:
        for m, mode in modes.items():
            m.training = mode
    return tensors_of(out)


def _differing(expected: list[np.ndarray], found: list[np.ndarray]) -> int:
    """How many elements differ over all outputs."""
    if len(expected) != len(found):
        raise LingerError(
            f"the net returns {len(expected)} tensors, the file {len(found)}; compare a net with its own file"
        )
    return sum(_count(e, f) for e, f in zip(expected, found, strict=True))


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
