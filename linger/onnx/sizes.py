"""Sizes that change with a dynamic axis, found by recording the forward again with that axis doubled.

A ``Dyn`` is an int that also holds its value in every recording. What equals an input's size in all of them is that
size; nothing is guessed from one run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linger.errors import LingerError
from linger.trace import Graph, Node, Value, record, recorded


class Dyn(int):
    """A size that differs between recordings; as an int, its value in the first."""

    values: tuple[int, ...]

    def __new__(cls, values: tuple[int, ...]) -> Dyn:
        new = super().__new__(cls, values[0])
        new.values = values
        return new


def is_dynamic(tree: Any) -> bool:
    """Whether any size in the tree is dynamic."""
    leaves = pytree.tree_leaves(tree)
    return any(isinstance(v, Dyn) or (isinstance(v, slice) and is_dynamic((v.start, v.stop, v.step))) for v in leaves)


def same(a: int, b: int) -> bool:
    """Whether two sizes are equal in every recording."""
    return getattr(a, "values", a) == getattr(b, "values", b)


def _merge_leaf(leaves: tuple[Any, ...]) -> Any:
    first = leaves[0]
    if isinstance(first, Value):
        if any(not isinstance(v, Value) or v.id != first.id for v in leaves):
            raise LingerError(
                "the forward reads other tensors when a dynamic axis changes; make it the same for all, or fix the axis"
            )
        if len({len(v.shape) for v in leaves}) > 1:
            raise LingerError(
                "the number of dimensions changes with a dynamic axis; name the dim of squeeze, or fix the axis"
            )
        shape = tuple(_merge_leaf(sizes) for sizes in zip(*(v.shape for v in leaves), strict=True))
        return replace(first, shape=shape)
    if isinstance(first, slice):
        return slice(*(_merge_leaf(tuple(getattr(v, k) for v in leaves)) for k in ("start", "stop", "step")))
    if all(v is first or (type(v) is type(first) and repr(v) == repr(first)) for v in leaves):
        return first
    if all(isinstance(v, int) and not isinstance(v, bool) for v in leaves):
        return Dyn(tuple(int(v) for v in leaves))
    raise LingerError(f"{first!r} changes with a dynamic axis; compute it with tensors, or fix the axis")


def merge(trees: tuple[Any, ...]) -> Any:
    """One tree out of the same tree of several recordings."""
    flat = [pytree.tree_flatten(t) for t in trees]
    if any(spec != flat[0][1] for _, spec in flat):
        raise LingerError(
            "the forward makes different calls for different sizes; make it the same for all, or fix the axis"
        )
    merged = [_merge_leaf(leaves) for leaves in zip(*(leaves for leaves, _ in flat), strict=True)]
    return pytree.tree_unflatten(merged, flat[0][1])


def merge_graphs(graphs: list[Graph]) -> Graph:
    """The first graph with every size that differs elsewhere made a ``Dyn``."""
    first = graphs[0]
    if any([n.name for n in g.nodes] != [n.name for n in first.nodes] for g in graphs):
        raise LingerError(
            "the forward takes another path when a dynamic axis changes; make it the same for all, or fix the axis"
        )
    nodes = tuple(_merge_node(each) for each in zip(*(g.nodes for g in graphs), strict=True))
    inputs, outputs = merge(tuple(g.inputs for g in graphs)), merge(tuple(g.outputs for g in graphs))
    results = {key: t for key, t in first.results.items() if all(_agree(t, g.results.get(key)) for g in graphs[1:])}
    return replace(first, nodes=nodes, inputs=inputs, outputs=outputs, results=results)


def _agree(a: Tensor, b: Tensor | None) -> bool:
    """Whether a tensor made of constants holds the same values in two recordings."""
    return b is not None and torch.equal(a, b)


def _merge_node(each: tuple[Node, ...]) -> Node:
    try:
        args, kwargs = merge(tuple(n.args for n in each)), merge(tuple(n.kwargs for n in each))
        return replace(each[0], args=args, kwargs=kwargs, outputs=merge(tuple(n.outputs for n in each)))
    except LingerError as error:
        raise LingerError(f"{each[0].name}: {error}" + (f" ({each[0].source})" if each[0].source else "")) from error


def record_all(
    net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], axes: list[dict[int, str]], leaf: Any
) -> tuple[Graph, Any, list[str]]:
    """Record the forward as it is and once more for every symbol of ``axes`` (per input tensor: axis -> symbol), doubled.

    Returns:
        The merged graph, what the first forward returned, and the symbols in the order of ``Dyn.values[1:]``.
    """
    graph, out = recorded(net, args, kwargs, leaf=leaf)
    symbols = sorted({symbol for by_axis in axes for symbol in by_axis.values()})
    graphs = [graph]
    for symbol in symbols:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        numbers = iter(range(len(leaves)))
        grown = [_grown(v, axes[next(numbers)], symbol) if isinstance(v, Tensor) else v for v in leaves]
        more_args, more_kwargs = pytree.tree_unflatten(grown, spec)
        try:
            graphs.append(record(net, more_args, more_kwargs, leaf=leaf)[0])
        except Exception as error:
            raise LingerError(
                f"dynamic axis {symbol!r}: the forward does not run with it doubled: {error}; give axes that grow together the same name, or fix the axis"
            ) from error
    return merge_graphs(graphs), out, symbols


def _grown(x: Tensor, axes: dict[int, str], symbol: str) -> Tensor:
    for axis, name in axes.items():
        if name == symbol:
            x = x.repeat_interleave(2, axis)  # lengths that are sorted stay so
    return x
