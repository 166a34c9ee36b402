"""``linger.retarget``: which integers change when a net or a file moves from one chip to another, and why."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from linger import runtime
from linger.check._net import follow
from linger.check._words import op_name, readable
from linger.errors import LingerError, during
from linger.numerics import exponent
from linger.onnx.export import DEFAULT_OPSET, build
from linger.onnx.inputs import array, given
from linger.ops import BY_NAME, IntModule
from linger.plain import text_of
from linger.rounding import HALF_UP
from linger.targets import Target, difference
from linger.targets import target as find_target
from linger.trace import tensors_of

INHERITED = "what it reads changed"


@dataclass(frozen=True, kw_only=True)
class Change:
    """A tensor that differs: how many of its elements, by how much at most (integers in steps), and why."""

    tensor: str
    op: str
    changed: int
    elements: int
    most: float
    why: str


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Every tensor that differs, in the order of the file, and the outputs among them."""

    source: str
    target: str
    tensors: tuple[Change, ...]
    outputs: tuple[Change, ...]
    elements: int

    @property
    def equal(self) -> bool:
        """Whether every output is the same."""
        return not self.outputs

    def __str__(self) -> str:
        """A table, and one line."""
        return text_of(self.show, 140)

    def show(self, console: Console) -> None:
        """Print it on a rich console."""
        if self.tensors:
            table = Table("tensor", "op", "changed", "of", "by at most", "why")
            for c in self.tensors:
                name = escape(readable(c.tensor))
                table.add_row(name, op_name(c.op), f"{c.changed}", f"{c.elements}", f"{c.most:g}", c.why)
            console.print(table)
        changed = sum(c.changed for c in self.outputs)
        said = f"{self.source} -> {self.target}: {changed} of {self.elements} output elements change"
        console.print(said, highlight=False, markup=False, soft_wrap=True)


def retarget(
    net: nn.Module | str | os.PathLike[str] | onnx.ModelProto,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *args: Any,
    quiet: bool = False,
) -> Changes:
    """Run a net or a file as two chips would, on the same inputs, and list what differs. Nothing is changed.

    Args:
        net: a converted net that has seen a batch, or an exported file.
        source: the chip it was made for, or the path of a .toml file.
        target: the chip it shall run on.
        args: the inputs.
        quiet: do not print the table.

    Raises:
        LingerError: the net is not converted, or does not run on these inputs.
    """
    with during("retarget"):
        chips = find_target(source), find_target(target)
        files = [_file(net, chip, args) for chip in chips]
        runs = [_run(file, args) for file in files]
        changes = _compare(chips, files, runs)
    if not quiet:
        print(changes)
    return changes


def _file(net: Any, chip: Target, args: tuple[Any, ...]) -> onnx.ModelProto:
    """What is run for a chip: the net exported for it, or the file under its name."""
    if isinstance(net, nn.Module):
        if not any(isinstance(m, IntModule) for m in net.modules()):
            raise LingerError("found a float net, allowed is a converted one; call linger.init and train it first")
        made = follow(copy.deepcopy(net), chip).eval()
        inputs, kwargs = given(made, args, {})
        return build(made, inputs, kwargs, None, None, DEFAULT_OPSET, {}, "thinker", chip.name)[0]
    proto = onnx.ModelProto()
    proto.CopyFrom(net if isinstance(net, onnx.ModelProto) else runtime.read(net))
    for node in proto.graph.node:
        said = {a.name: a for a in node.attribute}
        if "rounding" in said:
            node.attribute.remove(said["rounding"])
        if "platform" in said:
            said["platform"].s = chip.platform.encode()
            if chip.rounding != HALF_UP:
                node.attribute.append(helper.make_attribute("rounding", chip.rounding))
    return proto


def _run(proto: onnx.ModelProto, args: tuple[Any, ...]) -> dict[str, np.ndarray]:
    """Every tensor by name."""
    model = runtime.from_proto(proto)
    model(*(array(a) if isinstance(a, Tensor) else a for a in (tensors_of(args) or args)))
    return model.tensors


def _compare(chips: tuple[Target, Target], files: list[onnx.ModelProto], runs: list[dict[str, np.ndarray]]) -> Changes:
    before, after = runs
    nodes = {name: node for node in files[0].graph.node for name in node.output}
    tensors: dict[str, Change] = {}
    for node in files[1].graph.node:
        for name in node.output:
            a, b = before.get(name), after[name]
            if a is None or a.shape != b.shape or np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
                continue
            why = _why(nodes[name], node, chips, tensors)
            unlike = int((a != b).sum())
            most = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())
            tensors[name] = Change(tensor=name, op=node.op_type, changed=unlike, elements=b.size, most=most, why=why)
    outputs = [o.name for o in files[1].graph.output]
    return Changes(
        source=chips[0].name, target=chips[1].name, tensors=tuple(tensors.values()),
        outputs=tuple(tensors[name] for name in outputs if name in tensors),
        elements=sum(after[name].size for name in outputs),
    )  # fmt: skip


def _why(a: onnx.NodeProto, b: onnx.NodeProto, chips: tuple[Target, Target], changed: Mapping[str, Change]) -> str:
    """Another table, another scale, or only other inputs."""
    op = BY_NAME[b.op_type].name if b.op_type in BY_NAME else b.op_type
    reasons = [r for r in (difference(op, *chips), _scales(a, b)) if r]
    if not reasons or any(name in changed for name in b.input):
        reasons.append(INHERITED)
    return ", ".join(reasons)


def _scales(a: onnx.NodeProto, b: onnx.NodeProto) -> str:
    """Which scales of a node differ."""
    old, new = (
        {x.name: helper.get_attribute_value(x) for x in n.attribute if x.name.startswith("scale")} for n in (a, b)
    )
    said = [
        f"{name} 2^{exponent(new[name])} instead of 2^{exponent(old[name])}"
        for name in sorted(old.keys() & new.keys())
        if old[name] != new[name]
    ]
    return ", ".join(said)
