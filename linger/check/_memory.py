"""Where the tensors of a file lie on a chip, and how much of each memory they take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from linger.check._allocate import Block, Plan, plan
from linger.check._cost import weight_bytes
from linger.check._file import File, Node, Tensor
from linger.targets import Target
from linger.targets._measures import CONDITIONS, aligned, kernel_bytes

IN_PLACE = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"}
TAKES_RELU = {"Conv2dInt", "ConvTranspose2dInt"}
PREFETCHED = {"Conv1dInt", "Conv2dInt", "ConvTranspose2dInt", "LinearInt", "LSTMInt", "GRUInt", "LayerNormInt"}


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Bytes on the chip.

    Attributes:
        parameters: weights and biases as the packer stores them, in PSRAM, from flash.
        activations: the planned sum of everything in share memory: activations, workspace, prefetch buffers.
        workspace: the largest working memory of one node.
        prefetch: the two buffers into which the next layer's parameters are loaded.
        outside: activations that are too large for share memory and lie in PSRAM.
        plan: the winner of the three greedy orders.
        blocks: what was planned.
    """

    parameters: int
    activations: int
    workspace: int
    prefetch: tuple[int, int]
    outside: int
    plan: Plan
    blocks: tuple[Block, ...]


def usage(file: File, target: Target) -> Usage:
    """Plan the memory of a file as the chip's packer does."""
    nodes = [n for n in file.nodes if n.op not in ("Quant", "Dequant")]
    stand_in = _aliases(file)
    workspace = max((_workspace(n, target) for n in nodes), default=0)
    prefetch = _prefetch(nodes, target)
    last = max(len(nodes) - 1, 0)
    tensors = _lives(file, nodes, stand_in, target)
    spill = target.memory.spill
    inside = [b for b in tensors if spill is None or b.size <= spill]
    outside = [b for b in tensors if b not in inside]
    working = [step for step, n in enumerate(nodes) if _workspace(n, target)] or [0]
    extra = [
        ("workspace", workspace, working[0], working[-1]),
        ("prefetch 1", prefetch[0], 0, last),
        ("prefetch 2", prefetch[1], 0, last),
    ]
    inside += [Block(name=n, size=_round(s, target), begin=begin, end=end) for n, s, begin, end in extra if s]
    made = plan(inside)
    return Usage(
        parameters=parameter_bytes(file, target), activations=made.total, workspace=workspace, prefetch=prefetch,
        outside=plan(outside).total, plan=made, blocks=tuple(inside),
    )  # fmt: skip


def _round(size: int, target: Target) -> int:
    return aligned(size, target.memory.align)


def _workspace(node: Node, target: Target) -> int:
    reserved = target.workspaces.get(node.op)
    try:
        return reserved(node.facts) if reserved else 0
    except (KeyError, IndexError):  # a shape that the chip refuses, or a file without scales: as in ``beyond_limit``
        return 0


def _aliases(file: File) -> dict[str, str]:
    """Name of a value -> the value whose memory it shares: moves in place, a relu fused into its convolution, I/O."""
    readers: dict[str, int] = {}
    made_by = {t.name: n for n in file.nodes for t in n.outputs}
    for node in file.nodes:
        for t in node.inputs:
            readers[t.name] = readers.get(t.name, 0) + 1
    same: dict[str, str] = {}
    for node in file.nodes:
        source = node.inputs[0].name if node.inputs else ""
        producer = made_by.get(source)
        fused = node.op == "Relu" and producer is not None and producer.op in TAKES_RELU and readers[source] == 1
        if node.op in IN_PLACE or node.op in ("Quant", "Dequant") or fused:
            same[node.outputs[0].name] = same.get(source, source)
    return same


def _lives(file: File, nodes: list[Node], same: dict[str, str], target: Target) -> list[Block]:
    """Every value that needs memory of its own: inputs from the start, outputs to the end."""
    spans: dict[str, list[int]] = {}
    sizes: dict[str, int] = {}

    def touch(tensors: Iterable[Tensor], step: int) -> None:
        for t in tensors:
            if not t.stored:
                name = same.get(t.name, t.name)
                spans.setdefault(name, []).append(step)
                sizes[name] = max(
                    sizes.get(name, 0), t.elements * max(t.bits, 8) // 8 if t.name != name or t.bits else 0
                )

    touch(file.inputs, 0)
    for step, node in enumerate(nodes):
        touch(node.inputs, step)
        touch(node.outputs, step)
    touch(file.outputs, max(len(nodes) - 1, 0))
    narrow = {n.inputs[0].name: n.outputs[0].bytes for n in file.nodes if n.op == "Quant"}
    sizes |= {same.get(name, name): size for name, size in narrow.items()}
    sizes |= {same.get(t.name, t.name): _made(file, same, t) for t in file.outputs}
    return [Block(name=n, size=_round(sizes[n], target), begin=min(s), end=max(s)) for n, s in spans.items()]


def _made(file: File, same: dict[str, str], output: Tensor) -> int:
    """Bytes of an output as the chip hands it out: before its Dequant."""
    name = same.get(output.name, output.name)
    return next((t.bytes for n in file.nodes for t in n.outputs if t.name == name), output.bytes)


def _prefetch(nodes: list[Node], target: Target) -> tuple[int, int]:
    """The largest parameters of every other layer, and of those between."""
    sizes = [s for s in (node_parameters(n, target) for n in nodes if n.op in PREFETCHED) if s]
    return max(sizes[::2], default=0), max(sizes[1::2], default=0)


def parameter_bytes(file: File, target: Target) -> int:
    """What the packer stores: each stored tensor once, convolution weights padded."""
    seen: dict[str, int] = {}
    for node in file.nodes:
        names = tuple(t.name for t in node.inputs if t.stored)
        if names:
            seen.setdefault("\n".join(names), node_parameters(node, target))
    return sum(seen.values())


def node_parameters(node: Node, target: Target) -> int:
    """Bytes that the packer stores for a node: channels of a convolution rounded up to what its kernel reads."""
    total = weight_bytes(node)
    for limit in target.limits:
        padded = limit.op == node.op and limit.of == "kernel_bytes" and len(node.inputs) > 1
        if padded and CONDITIONS[limit.when](node.facts):
            half = 2 if node.attrs.get("parameter_bits") == 4 else 1
            stored = -(-node.inputs[1].elements // half)
            return total - stored + kernel_bytes(node.facts, limit.align)[0] // half
    return total
