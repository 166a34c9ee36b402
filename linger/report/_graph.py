"""Where the rows of a report stand when they are drawn below each other: lanes, as in the log of a version control system.

A row's lane is kept until the last row has read it. A row takes the lane of an input that nobody reads after it, else the first
free one, so that a chain is one straight line and a way around it is a second one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from linger.report._data import Layer


@dataclass(frozen=True, kw_only=True)
class Edge:
    """From row ``source`` (-1: the input) in lane ``lane`` to row ``target`` in lane ``to``."""

    source: int
    lane: int
    target: int
    to: int


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """The lane of every row, the edges, and how many lanes there are. The input is lane 0."""

    lanes: tuple[int, ...]
    edges: tuple[Edge, ...]
    width: int


def drawing(layers: Sequence[Layer]) -> Drawing:
    """Lanes of the rows, in their order."""
    last = {j: i for i, layer in enumerate(layers) for j in layer.inputs}
    lanes: dict[int, int] = {-1: 0}
    held: dict[int, int] = {0: -1} if -1 in last else {}  # lane -> the row that is still to be read there
    edges: list[Edge] = []
    for i, layer in enumerate(layers):
        done = [j for j in layer.inputs if last[j] == i]
        for j in done:
            held.pop(lanes[j], None)
        kept = min((lanes[j] for j in done), default=None)
        lanes[i] = next(k for k in range(len(layers) + 2) if k not in held) if kept is None else kept
        if i in last:
            held[lanes[i]] = i
        edges += [Edge(source=j, lane=lanes[j], target=i, to=lanes[i]) for j in layer.inputs]
    found = tuple(lanes[i] for i in range(len(layers)))
    return Drawing(lanes=found, edges=tuple(edges), width=1 + max((0, *found)))
