"""``linger.why``: where two runs of a file part, and which mistake of an implementation makes exactly that difference."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from linger import runtime
from linger.batches import bar
from linger.errors import LingerError, during
from linger.execute import feed_of
from linger.onnx.golden import damaged, stored
from linger.onnx.inputs import array
from linger.trace import tensors_of
from linger.verify import first_difference
from linger.why._case import Segment, View
from linger.why._fits import FITS
from linger.why._hypotheses import HYPOTHESES, Hypothesis
from linger.why._report import UNKNOWN, Why
from linger.why._runs import Arrays, read_run

__all__ = ["HYPOTHESES", "Hypothesis", "Why", "why"]

LIKELY = 0.9  # of the differing elements that a cause must reproduce to be named although it misses some


def why(
    file: str | os.PathLike[str] | onnx.ModelProto,
    first: Any,
    second: Any = "runtime",
    *,
    inputs: Any = None,
    progress: bool = False,
    quiet: bool = False,
) -> Why:
    """Find the first tensor in which two runs of a file differ, and the cause that reproduces the difference.

    The first element that differs and all others of its tensor are computed again under every hypothesis of the table in
    docs/why.md, from inputs in which the runs still agree.

    Args:
        file: the exported file that both runs are of.
        first: an .npz file of ``linger run --all``, a folder of text dumps, "runtime", "onnxruntime" (":all" for a level of
            optimization), arrays by name, or the net.
        second: likewise.
        inputs: inputs of the file, one tensor or a tuple; by default those in the runs, or the golden ones of the file.
        progress: show a progress bar.
        quiet: do not print the result.

    Returns:
        The place, the cause, and the evidence.

    Raises:
        LingerError: a run cannot be read, has nothing in common with the file, or inputs are needed that are nowhere.
    """
    with during("why"):
        proto = file if isinstance(file, onnx.ModelProto) else runtime.read(file)
        model = runtime.from_proto(proto, "the model" if isinstance(file, onnx.ModelProto) else os.fspath(file))
        feed = _feed(proto, inputs)
        a, b = (read_run(run, proto, feed) for run in (first, second))
        found = _compare(model, a, b, feed or {}, progress)
    if not quiet:
        print(found)
    return found


def _feed(proto: onnx.ModelProto, inputs: Any) -> Arrays | None:
    """Inputs by name, if any are known."""
    if inputs is None:
        golden = stored(proto)
        return None if golden is None else dict(golden.inputs)
    if isinstance(inputs, list):
        return feed_of(proto, inputs)
    given = [array(t) for t in tensors_of(inputs)]
    names = [i.name for i in proto.graph.input]
    if len(given) != len(names):
        raise LingerError(f"found {len(given)} inputs, the file takes {', '.join(names)}; pass those of forward")
    return dict(zip(names, given, strict=True))


def _compare(model: runtime.Model, a: Arrays, b: Arrays, feed: Arrays, progress: bool) -> Why:
    order = [name for node in model.proto.graph.node for name in node.output if name in a and name in b]
    if not order:
        raise LingerError(
            "the two runs have no tensor in common, allowed are runs of the same file; write both with --all"
        )
    equal: Arrays = {**model.constants, **{k: v for k, v in {**a, **feed}.items() if k in model.inputs}}
    for name in order:
        if not _same(a[name], b[name]):
            return _explain(model, name, equal, a[name], b[name], len(order), progress)
        equal[name] = a[name]
    return Why(compared=len(order))


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.size == b.size and first_difference(a.reshape(-1), b.reshape(-1)) is None


def segment_of(model: runtime.Model, target: str, known: Mapping[str, np.ndarray]) -> Segment:
    """The nodes between known tensors and the target.

    Raises:
        LingerError: an input of the file is needed and not known.
    """
    makers = {name: node for node in model.proto.graph.node for name in node.output}
    needed, wanted = set(), [target]
    while wanted:
        name = wanted.pop()
        if name in makers and id(makers[name]) not in needed:
            needed.add(id(makers[name]))
            wanted += [n for n in makers[name].input if n and n not in known]
        elif name not in makers:
            raise LingerError(
                f"the input {name!r} is in neither run, allowed are runs that hold it; pass --input, or export with golden="
            )
    nodes = [n for n in model.proto.graph.node if id(n) in needed]
    return Segment(model, nodes, _shaped(model, known), target)


def _shaped(model: runtime.Model, known: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Known tensors in the type and shape that the file says: text dumps have neither."""
    declared = {v.name: v.type.tensor_type for v in (*model.proto.graph.value_info, *model.proto.graph.output)}
    made = dict(known)
    for name, t in declared.items():
        if name in known and name not in model.constants:
            x = known[name]
            sizes = [d.dim_value if d.HasField("dim_value") else -1 for d in t.shape.dim]
            if t.HasField("shape") and x.ndim != len(sizes) and sizes.count(-1) <= 1:
                x = x.reshape(sizes)
            made[name] = x.astype(onnx.helper.tensor_dtype_to_np_dtype(t.elem_type)) if t.elem_type else x
    return made


def _explain(
    model: runtime.Model, target: str, known: Arrays, a: np.ndarray, b: np.ndarray, compared: int, progress: bool
) -> Why:
    segment = segment_of(model, target, known)
    expected = segment.expected
    if a.size != expected.size or b.size != expected.size:
        raise LingerError(
            f"{target} has {a.size} and {b.size} elements, the file makes {expected.size} of these inputs; run both on the same"
        )
    a, b = a.reshape(expected.shape), b.reshape(expected.shape)
    right = [first_difference(expected, run) is None for run in (a, b)]
    wrong = "second" if right[0] else "first" if right[1] else "both"
    found = a if wrong == "first" else b
    index = first_difference(a, b) or ()
    place: dict[str, Any] = {
        "tensor": target, "op": segment.nodes[-1].op_type, "index": index, "first": _number(a[index]), "second": _number(b[index]),
        "expected": _number(expected[index]), "differing": int((a != b).sum()), "elements": a.size, "wrong": wrong,
    }  # fmt: skip
    cause = Search(segment, found, progress).best(index)
    broken = damaged(model.proto)
    evidence = (*cause.pop("evidence"), *([f"the file itself is damaged: {', '.join(broken)}"] if broken else []))
    return Why(compared=compared, **place, **cause, evidence=evidence)


def _number(value: Any) -> float | None:
    """For a report and for JSON."""
    return float(value) if math.isfinite(value) else None


class Search:
    """Every hypothesis at every node of a segment, against what was found."""

    def __init__(self, segment: Segment, found: np.ndarray, progress: bool) -> None:
        self.segment, self.found, self.progress = segment, found, progress
        self.unlike = found != segment.expected
        self.views = [segment.view(at) for at in reversed(range(len(segment.nodes)))]

    def best(self, index: tuple[int, ...]) -> dict[str, Any]:
        """The first cause that reproduces the whole tensor, else what was solved for, else the one that comes near."""
        exact: list[tuple[Hypothesis, str, View]] = []
        near: tuple[int, Hypothesis, str, View] | None = None
        with bar(self.progress) as shown:
            for h in shown.track(HYPOTHESES, description="why"):
                wrong, said, view = self._tried(h)
                if view is not None and wrong == 0:
                    exact.append((h, said, view))
                    if len(self.views) > 1:
                        break
                elif view is not None and (near is None or wrong < near[0]):
                    near = wrong, h, said, view
        count = int(self.unlike.sum())
        if exact:
            h, said, view = exact[0]
            others = tuple(f"{o.name} ({text})" for o, text, _ in exact[1:])
            return _cause(view, h.name, said, count, True, index, others)
        for view in self.views:
            for fit in (f for solve in FITS for f in solve(view, self.found)):
                return _cause(view, fit.name, fit.said, fit.explained, fit.certain, index)
        if near is not None and near[0] <= (1 - LIKELY) * count:
            return _cause(near[3], near[1].name, near[2], count - near[0], False, index)
        return _cause(self.views[0], UNKNOWN, "", 0, False, index)

    def _tried(self, h: Hypothesis) -> tuple[int, str, View | None]:
        """The form of a hypothesis that misses least, how many elements it misses, and where it is."""
        least: tuple[int, str, View | None] = (self.found.size + 1, "", None)
        for view in self.views:
            for said, out in h.recompute(view):
                if out is None or out.shape != self.found.shape:
                    continue
                wrong = int((out != self.found).sum())
                if wrong < least[0]:
                    least = wrong, said, view
                if wrong == 0:
                    return least
        return least


def _cause(
    view: View,
    name: str,
    said: str,
    explained: int,
    certain: bool,
    index: tuple[int, ...],
    others: tuple[str, ...] = (),
) -> dict[str, Any]:
    return {
        "node": view.node.name or view.node.output[0], "cause": name, "said": said, "explained": explained, "certain": certain,
        "evidence": _evidence(view, index), "others": others,
    }  # fmt: skip


def _evidence(view: View, index: tuple[int, ...]) -> tuple[str, ...]:
    """The exact value that is rounded at the element, where the node makes the tensor itself."""
    if not view.last or not view.sums or view.sums[-1][0].shape != view.out.shape:
        return ()
    v, n = view.sums[-1]
    value = int(v[index])
    return (f"there the exact sum is {value:,} = {value / 2.0**n:g} * 2^{n} before rounding",)
