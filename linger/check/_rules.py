"""Every violation of a target's table by the nodes of a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from linger.check._file import File, Node
from linger.check._words import NAMES, WAYS, bytes_text, op_name
from linger.targets import Limit, Target
from linger.targets._measures import CONDITIONS, numbers

RANK = {"error": 0, "wrong": 1, "split": 2, "warning": 3}
SCALES = {"shift", "product_shift", "finer_output", "finer_input"}  # what training decides, not the net


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
        source: file and line of a call, "" where it is not known.
    """

    layer: str
    op: str
    kind: str
    found: str
    allowed: str
    way: str
    source: str = ""


def violations(file: File, target: Target) -> list[Violation]:
    """Errors first, then in the order of the file."""
    found = [v for node in file.nodes for v in _of(node, target)]
    return sorted(found, key=lambda v: RANK[v.kind])


def _of(node: Node, target: Target) -> Iterator[Violation]:
    status = target.ops.get(node.op, "none")
    if status == "none":
        why = target.lacks.get(node.op, "")
        yield Violation(
            layer=node.layer, op=node.op, kind="error", found=op_name(node.op),
            allowed=why or f"{target.name} has no such op", way=WAYS["op"].format(layer=node.layer),
        )  # fmt: skip
        return
    if status in ("repair", "unverified", "workspace"):
        yield _by_status(node, target, status)
    for limit in target.limits:
        if limit.op == node.op:
            yield from _of_limit(node, limit, target)


def _by_status(node: Node, target: Target, status: str) -> Violation:
    found = {
        "repair": ("wrong", f"the stock engine of {target.name} computes it wrong, a repaired build does not"),
        "workspace": ("wrong", f"the packer of {target.name} reserves too little working memory for it"),
        "unverified": ("warning", f"nobody has compared its integers on {target.name}"),
    }
    kind, allowed = found[status]
    return Violation(
        layer=node.layer, op=node.op, kind=kind, found=op_name(node.op), allowed=allowed, way=WAYS[status]
    )  # fmt: skip


def _of_limit(node: Node, limit: Limit, target: Target) -> Iterator[Violation]:
    facts = node.facts
    if not CONDITIONS[limit.when](facts):
        return
    beyond = [n for n in numbers(facts, limit.of, limit.align) if not limit.allows(n)]
    if not beyond:
        return
    name, is_size = NAMES[limit.of], limit.of.endswith("_bytes")
    worst = max(beyond, key=abs)
    said = bytes_text(worst) if is_size else str(worst)
    allowed = f"at most {bytes_text(limit.high or 0)}" if is_size else str(limit)
    condition = f" ({limit.when})" if limit.when else ""
    yield Violation(
        layer=node.layer, op=node.op, kind=limit.kind, found=f"{name} {said}", allowed=f"{allowed}{condition}",
        way=(limit.way or WAYS[limit.of]).format(layer=node.layer, limit=limit, target=target.name),
    )  # fmt: skip
