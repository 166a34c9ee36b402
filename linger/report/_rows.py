"""The rows of a report: the nodes of a file, those of one layer or call together, with what was measured of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from linger.check import Layer as Costs
from linger.check import Node as FileNode
from linger.check import Origin, Report, op_name
from linger.numerics import Grid
from linger.report._data import Layer, Scale, Weight
from linger.report._meter import Meter, limits

BOUNDARY = ("Quant", "Dequant")
MATRICES = {"weight_ih": "scale_iw", "weight_hh": "scale_hw", "weight_hr": "scale_rw"}  # of recurrent layers
WIDTHS = {"int8": 8, "int16": 16}


@dataclass
class Group:
    """The nodes of one row, and their costs."""

    key: str
    nodes: list[FileNode] = field(default_factory=list)
    costs: list[Costs] = field(default_factory=list)

    @property
    def main(self) -> int:
        """The node that says what the row is: the one that multiplies most, else the last."""
        return max(range(len(self.nodes)), key=lambda i: (self.costs[i].cost.macs, i))


@dataclass(frozen=True, kw_only=True)
class Source:
    """What rows are made of. ``meters``: key of a row -> measured; ``originals``: state-dict key -> float parameter.

    ``widths``: key of a row -> bits of its weights, which a file may store wider than they are.
    """

    proto: onnx.ModelProto
    nodes: Sequence[FileNode]
    report: Report
    origins: Mapping[str, Origin]
    meters: Mapping[str, Meter]
    originals: Mapping[str, torch.Tensor]
    widths: Mapping[str, int]


def rows(source: Source) -> tuple[tuple[Layer, ...], tuple[int, ...]]:
    """The rows in the order of the file, and which of them make the net's outputs."""
    groups = grouped(source)
    made = {t.name: i for i, g in enumerate(groups) for n in g.nodes for t in n.outputs}
    through = {n.outputs[0].name: n.inputs[0].name for n in source.nodes if n.op in BOUNDARY}
    stored = {i.name: numpy_helper.to_array(i) for i in source.proto.graph.initializer}

    def producer(name: str) -> int | None:
        while name in through:
            name = through[name]
        return None if name in stored else made.get(name, -1)

    reads = [
        sorted({j for n in g.nodes for t in n.inputs if (j := producer(t.name)) is not None} - {i})
        for i, g in enumerate(groups)
    ]
    numbers = islands(groups, reads)
    layers = tuple(row(g, tuple(reads[i]), numbers.get(i, 0), source, stored) for i, g in enumerate(groups))
    outputs = sorted({j for o in source.proto.graph.output if (j := producer(o.name)) is not None})
    return layers, tuple(outputs)


def grouped(source: Source) -> list[Group]:
    """The nodes of every layer and call, without those that only enter or leave fixed point."""
    costs = iter(source.report.layers)
    groups: dict[str, Group] = {}
    for node in source.nodes:
        if node.op in BOUNDARY:
            continue
        cost = next(costs)
        origin = source.origins.get(node.name)
        key = node.name if origin is None or node.name.endswith(".requant") else origin.name
        group = groups.setdefault(key, Group(key=key))
        group.nodes.append(node)
        group.costs.append(cost)
    return list(groups.values())


def islands(groups: Sequence[Group], reads: Sequence[Sequence[int]]) -> dict[int, int]:
    """Rows in float -> the number of the island, from 1: rows that hand floats to each other are one."""
    found: dict[int, int] = {}
    for i, group in enumerate(groups):
        if group.costs[group.main].in_float:
            near = [found[j] for j in reads[i] if j in found]
            found[i] = min(near, default=max(found.values(), default=0) + 1)
            found |= {j: found[i] for j, n in found.items() if n in near}
    order = {n: k for k, n in enumerate(dict.fromkeys(found.values()), 1)}
    return {i: order[n] for i, n in found.items()}


def row(group: Group, reads: tuple[int, ...], island: int, source: Source, stored: Mapping[str, np.ndarray]) -> Layer:
    """One row."""
    main, costs = group.nodes[group.main], group.costs
    meter = source.meters.get(group.key)
    kind = "float" if island else "move" if meter is None else "fixed"
    called = main.called if kind == "move" or island else op_name(main.op)
    cycles = [c.cycles for c in costs]
    first, last = group.nodes[0], group.nodes[-1]
    return Layer(
        name=main.layer, op=called, kind=kind, island=island, source=main.source, inputs=reads,
        input=first.inputs[0].shape if first.inputs else (), output=last.outputs[0].shape,
        accumulator=max(c.accumulator for c in costs), macs=sum(c.cost.macs for c in costs),
        weight_bytes=sum(c.cost.weights for c in costs), activation_bytes=sum(c.cost.activations for c in costs),
        cycles=None if None in cycles else sum(c for c in cycles if c is not None),
        weights=tuple(weights(group, stored, source)), **measured(meter),
    )  # fmt: skip


def measured(meter: Meter | None) -> dict[str, Any]:
    """The fields of a row that a meter knows."""
    if meter is None:
        return {}
    said: dict[str, Any] = {"sqnr": meter.total.sqnr, "own_sqnr": meter.own.sqnr, "clipped": meter.share_clipped}
    if meter.low <= meter.high:
        said |= {"low": meter.low, "high": meter.high}
    if meter.grid is not None:
        scale, bits = meter.scale_and_bits
        low, high = limits(scale, bits)
        said |= {"grid": grid(scale, bits), "used": max(meter.high / high, meter.low / low, 0.0)}
        said |= {"histogram": meter.histogram()}
    return said


def grid(scale: float, bits: int) -> Scale:
    """A grid as a row says it."""
    low, high = limits(scale, bits)
    return Scale(scale=scale, bits=bits, lowest=low, highest=high)


def weights(group: Group, stored: Mapping[str, np.ndarray], source: Source) -> Iterable[Weight]:
    """The stored integers of a row that have a scale."""
    for node in group.nodes:
        for t in node.inputs:
            attr = next((s for word, s in MATRICES.items() if word in t.name), "scale_w")
            if t.stored and t.dtype in WIDTHS and t.elements > 1 and attr in node.attrs:
                own = source.widths.get(group.key.partition("@")[0], int(node.attrs.get("parameter_bits", 8)))
                bits = min(own, WIDTHS[t.dtype]) if t.dtype == "int8" else WIDTHS[t.dtype]
                yield weight(t.name, stored[t.name], float(node.attrs[attr]), bits, source.originals.get(t.name))


def weight(name: str, integers: np.ndarray, scale: float, bits: int, original: torch.Tensor | None) -> Weight:
    """One of them, against its float values where they are known."""
    q = torch.from_numpy(integers.astype(np.float32)) / scale
    meter = Meter(grid=Grid(torch.tensor(scale), bits))
    meter.add_fixed(q)
    if original is not None and original.shape == q.shape:
        wanted = original.detach().float().cpu()
        meter.add_own(wanted, q)
        meter.add_float(wanted)
    low, high = limits(scale, bits)
    histogram = meter.histogram()
    assert histogram is not None
    return Weight(
        name=name, shape=tuple(integers.shape), grid=grid(scale, bits), used=max(meter.high / high, meter.low / low, 0.0),
        sqnr=meter.own.sqnr, clipped=meter.share_clipped, histogram=histogram,
    )  # fmt: skip
