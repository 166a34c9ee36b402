"""What a node costs: multiplications and bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from linger.check._file import Node
from linger.check._shapes import is_recurrent
from linger.targets import Latency

CONVOLUTIONS = {"Conv1dInt", "Conv2dInt", "Conv"}
TRANSPOSED = {"ConvTranspose1dInt", "ConvTranspose2dInt", "ConvTranspose"}
PRODUCTS = {"LinearInt", "BmmInt", "MatMul"}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """``macs``: multiplications with addition. ``weights``: bytes stored in the file. ``activations``: bytes of the results."""

    macs: int
    weights: int
    activations: int


def macs_of(node: Node) -> int:
    """Multiplications of a convolution, a product or a recurrent layer; 0 for any other node, and for one without weights."""
    shapes, out = [t.shape for t in node.inputs], node.outputs[0].elements
    if node.op in CONVOLUTIONS | TRANSPOSED and len(shapes) < 2:  # it has no form in a file, or the file is damaged
        return 0
    if node.op in CONVOLUTIONS:
        return out * math.prod(shapes[1][1:])
    if node.op in TRANSPOSED:
        return math.prod(shapes[0]) * math.prod(shapes[1][1:])
    if node.op in PRODUCTS:
        return out * shapes[0][-1]
    if node.op == "Gemm":
        return out * shapes[0][0 if node.attrs.get("transA") else 1]
    if is_recurrent(node.op):
        steps = math.prod(shapes[0][:2])
        return steps * sum(math.prod(s) for s in shapes[1:] if len(s) == 2)
    return 0


def weight_bytes(node: Node) -> int:
    """Bytes of the weights and constants that the file stores for this node, 4-bit weights two in a byte."""
    total = 0
    for i, t in enumerate(node.inputs):
        if t.stored and t.dtype != "int64":  # sizes and indices
            packed = i > 0 and node.attrs.get("parameter_bits") == 4 and t.dtype == "int8"
            total += -(-t.elements // 2) if packed else t.bytes
    return total


def cost_of(node: Node) -> Cost:
    """All of it."""
    return Cost(macs=macs_of(node), weights=weight_bytes(node), activations=sum(t.bytes for t in node.outputs))


def cycles_of(node: Node, latency: Latency) -> int | None:
    """An estimate from the target's figures: work over speed, and an overhead per op. None where a figure is missing."""
    if latency.macs_per_cycle is None or latency.bytes_per_cycle is None or latency.cycles_per_op is None:
        return None
    macs = macs_of(node)
    moved = sum(t.bytes for t in (*node.inputs, *node.outputs))
    work = macs / latency.macs_per_cycle if macs else moved / latency.bytes_per_cycle
    return int(work + latency.cycles_per_op)
