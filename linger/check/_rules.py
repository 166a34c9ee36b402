"""Every violation of a target's table by the nodes of a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from linger.check._file import File, Node
from linger.check._words import FINE, WAYS, instead, op_name, python_path
from linger.ops import BY_NAME
from linger.rounding import HALF_UP
from linger.targets import Limit, Target
from linger.targets._measures import beyond_limit
from linger.targets._words import said, words

RANK = {"error": 0, "wrong": 1, "split": 2, "warning": 3}
MOVES = {"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Expand", "Tile", "Gather", "Pad"}
STATUS = {
    "repair": ("wrong", "the stock engine computes other integers"),
    "workspace": ("warning", "the packer reserves too little working memory"),
    "prefetch": ("warning", "the engine crashes while it prefetches for it"),
    "share": ("warning", "the packer wants its weights in share memory"),
    "unverified": ("warning", "its integers on this chip were never compared"),
}


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One thing that does not fit.

    Attributes:
        layer: dotted name of the layer, or of the call.
        op: the op type of the file.
        kind: "error", "wrong" (the engine computes other integers), "split" (the engine divides it, the integers stay),
            "warning".
        found: what the net has.
        allowed: what the chip has.
        way: what to do.
        source: file and line of a call, "" of a layer or where it is not known.
        of: what was counted, or "float", "op" and "status": the whole op.
    """

    layer: str
    op: str
    kind: str
    found: str
    allowed: str
    way: str
    source: str = ""
    of: str = ""


def violations(file: File, target: Target) -> list[Violation]:
    """Errors first, then in the order of the file."""
    found = list(dict.fromkeys(v for node in file.nodes for v in _of(node, target)))
    return sorted(found, key=lambda v: RANK[v.kind])


def is_float(node: Node) -> bool:
    """A node that computes in float: neither ours nor a move of integers."""
    if node.unknown:
        return not node.outputs[0].bits
    return not node.domain and any(t.dtype.startswith(("float", "bool")) for t in node.outputs)


def _of(node: Node, target: Target) -> Iterator[Violation]:
    if node.unknown or is_float(node):
        yield _island(node)
        return
    status = target.ops.get(node.op, "none")
    if status == "none":
        allowed = target.lacks.get(node.op, f"{target.name} has no such op")
        way = (
            "use nn.ReLU, or a clamp whose input has 2 to 4 dimensions and 8 bits"
            if node.op == "Clip"
            else instead(node.op, target.ops)
        )
        yield _violation(node, "op", "error", op_name(node.op), allowed, _or_float(node, way))
        return
    if target.rounding != HALF_UP and node.op in BY_NAME and BY_NAME[node.op].half_up:
        found = f"{op_name(node.op)}, which rounds half up"
        yield _violation(node, "op", "error", found, f"rounding {target.rounding}", _or_float(node, WAYS["op"]))
    if status in STATUS:
        kind, allowed = STATUS[status]
        yield _violation(node, "status", kind, op_name(node.op), allowed, WAYS[status])
    for limit in target.limits:
        if limit.op == node.op:
            yield from _of_limit(node, limit, target)


def _island(node: Node) -> Violation:
    found = f"{node.called} in float" if not node.why else f"{node.called}, which has no form in a file"
    moves = node.op in MOVES or (node.op == "Cast" and not node.why)
    return _violation(node, "float", "error", found, "integers", WAYS["move" if moves else "float"])


def _or_float(node: Node, way: str) -> str:
    """The way out, and for a layer how to leave it to the host."""
    if not node.module:
        return way
    if way == WAYS["op"]:
        return f"{way}: linger.disable_quant({python_path(node.layer)})"
    return f"{way}, or linger.disable_quant({python_path(node.layer)}) and compute it outside of the chip"


def _violation(node: Node, of: str, kind: str, found: str, allowed: str, way: str) -> Violation:
    return Violation(
        layer=node.layer, op=node.op, kind=kind, found=found, allowed=allowed, way=way, source=node.source, of=of
    )  # fmt: skip


def _of_limit(node: Node, limit: Limit, target: Target) -> Iterator[Violation]:
    facts = node.facts
    beyond = beyond_limit(facts, limit)
    if not beyond:
        return
    worst = max(beyond, key=abs)
    found, allowed = said(limit, worst)
    way = FINE if limit.kind == "split" else WAYS[limit.of].format(**words(limit, worst), target=target.name)
    yield _violation(node, limit.of, limit.kind, found, allowed, limit.way or way)
