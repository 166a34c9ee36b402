"""What may be wrong: the nodes between the last tensors that agree and the first that does not, run again otherwise."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from linger import runtime
from linger.errors import LingerError
from linger.rounding import HALF_UP
from linger.steps import instead
from linger.why._arithmetic import exact, rounding

Inputs = list[Any]
Steps = Mapping[str, Callable[..., np.ndarray]]
FAILS = (LingerError, *runtime.BROKEN, MemoryError)


class Segment:
    """Nodes that run one after another from known tensors to ``target``, the first tensor that differs."""

    def __init__(
        self, model: runtime.Model, nodes: Sequence[onnx.NodeProto], known: Mapping[str, Any], target: str
    ) -> None:
        self.model, self.nodes, self.target = model, list(nodes), target
        self.steps = [model.step(node) for node in self.nodes]
        self.before: list[dict[str, Any]] = []  # what is known in front of every node
        tensors = dict(known)
        for node, step in zip(self.nodes, self.steps, strict=True):
            self.before.append(dict(tensors))
            tensors.update(_run(node, step, tensors))
        self.tensors = tensors

    @property
    def expected(self) -> np.ndarray:
        """The target as the file says."""
        found: np.ndarray = self.tensors[self.target]
        return found

    def again(
        self, at: int, *, attrs: Mapping[str, Any] | None = None, inputs: Inputs | None = None, steps: Steps | None = None,
        op_type: str = "",
    ) -> np.ndarray | None:  # fmt: skip
        """The target with node ``at`` run otherwise; None where that does not run or has another shape."""
        node, step = self.nodes[at], self.steps[at]
        tensors = dict(self.before[at])
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if attrs or op_type:
                    step = self.model.step(_changed(node, attrs or {}, op_type))
                with rounding(_rule(node)), instead(**(steps or {})):
                    tensors.update(_run(node, step, tensors, inputs))
                for later, run in zip(self.nodes[at + 1 :], self.steps[at + 1 :], strict=True):
                    tensors.update(_run(later, run, tensors))
        except FAILS:
            return None
        out: np.ndarray = tensors[self.target]
        return out if out.shape == self.expected.shape else None

    def view(self, at: int) -> View:
        """Node ``at`` with all that hypotheses ask for."""
        node, known = self.nodes[at], self.before[at]
        out = self.tensors[node.output[0]]
        sums: list[tuple[np.ndarray, int]] = []

        def watched(v: np.ndarray, n: int) -> np.ndarray:
            if isinstance(v, np.ndarray) and v.shape == out.shape:
                sums.append((v, int(n)))
            return exact["shift_round"](v, n)

        self.again(at, steps={"shift_round": watched})
        attrs = {a.name: _value(a) for a in node.attribute}
        inputs = [known.get(name) if name else None for name in node.input]
        return View(segment=self, at=at, node=node, attrs=attrs, inputs=inputs, out=out, sums=sums)


class View:
    """A node: its attributes, inputs, its own result, and the (sum, shift) pairs that it rounds, whose shape is the result's."""

    def __init__(
        self, segment: Segment, at: int, node: onnx.NodeProto, attrs: dict[str, Any], inputs: Inputs, out: np.ndarray,
        sums: list[tuple[np.ndarray, int]],
    ) -> None:  # fmt: skip
        self.segment, self.at, self.node, self.attrs, self.inputs = segment, at, node, attrs, inputs
        self.out, self.sums = out, sums

    @property
    def op(self) -> str:
        """The op type."""
        return self.node.op_type

    @property
    def shift(self) -> int:
        """The largest right shift in the node, 0 where it has none."""
        return max([n for _, n in self.sums], default=0)

    @property
    def weighted(self) -> bool:
        """Whether the node multiplies with stored weights."""
        return "scale_w" in self.attrs and len(self.inputs) >= 2 and self.inputs[1] is not None

    @property
    def last(self) -> bool:
        """Whether the node makes the target itself."""
        return self.segment.target in self.node.output

    def again(self, **otherwise: Any) -> np.ndarray | None:
        """``Segment.again`` of this node."""
        return self.segment.again(self.at, **otherwise)

    def with_input(self, position: int, array: np.ndarray) -> np.ndarray | None:
        """The target where another array enters at ``position``."""
        return self.again(inputs=[*self.inputs[:position], array, *self.inputs[position + 1 :]])


def _run(node: onnx.NodeProto, step: Any, tensors: Mapping[str, Any], inputs: Inputs | None = None) -> dict[str, Any]:
    given = [tensors[name] if name else None for name in node.input] if inputs is None else inputs
    out = step(*given)
    made = out if isinstance(out, tuple) else (out,)
    return {name: np.asarray(value) for name, value in zip(node.output, made, strict=False) if name}


def _rule(node: onnx.NodeProto) -> str:
    return next((a.s.decode() for a in node.attribute if a.name == "rounding"), HALF_UP)


def _value(a: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(a)
    if isinstance(value, bytes):
        return value.decode()
    return value if isinstance(value, (int, float, str, onnx.TensorProto)) else tuple(value)


def _changed(node: onnx.NodeProto, attrs: Mapping[str, Any], op_type: str) -> onnx.NodeProto:
    made = onnx.NodeProto()
    made.CopyFrom(node)
    kept = [a for a in node.attribute if a.name not in attrs]
    del made.attribute[:]
    made.attribute.extend([*kept, *(helper.make_attribute(k, v) for k, v in attrs.items())])
    made.op_type = op_type or node.op_type
    return made
