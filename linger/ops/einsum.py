"""``torch.einsum`` and ``torch.tensordot`` as a matrix product with its axes moved.

With the labels of both operands and the result split into batch B (in all three), summed C (not in the result), and free
M (only in x), N (only in y):

    x -> (B, M, C),   y -> (B, C, N),   x @ y -> (B, M, N) -> the result's order                       (1)

Without C it is a product of elements. One operand is a permutation and a sum. Everything else (three operands, a
diagonal, a label that only one operand has and that the result has not) has no such form and is a float island.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from linger.ops._composed import Composed, Router
from linger.ops._constant import constant_of

Labels = tuple[Any, ...]


def einsum(route: Router, equation: Any, *operands: Any) -> Tensor:
    """The call where it has the form above; else as it is."""
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    read = labels_of(equation, tensors) if isinstance(equation, str) else None
    if read is None:
        return route(torch.einsum, equation, *operands)  # type: ignore[no-any-return]
    *given, wanted = read
    if len(tensors) == 1:
        return reduced(tensors[0], given[0], wanted)
    return contracted(tensors[0], tensors[1], given[0], given[1], wanted)


def labels_of(equation: str, tensors: Sequence[Tensor]) -> list[Labels] | None:
    """Labels per operand and of the result, the axes of an ellipsis as numbers from the right; None without the form above."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(tensors) or len(tensors) > 2:
        return None
    given = [_expanded(term, t.dim()) for term, t in zip(terms, tensors, strict=True)]
    every = [label for term in given for label in term]
    ellipsis = tuple(sorted({label for label in every if isinstance(label, int)}))
    once = sorted(label for label in set(every) if isinstance(label, str) and every.count(label) == 1)
    wanted = _expanded(right, len(right.replace("...", "")) + len(ellipsis)) if arrow else (*ellipsis, *once)
    lone = [label for i, term in enumerate(given) for label in term if label not in (*wanted, *given[i - 1])]
    distinct = all(len(set(term)) == len(term) for term in (*given, wanted))
    whole = set(ellipsis) <= set(wanted) <= set(every)
    return [*given, wanted] if distinct and whole and (len(given) == 1 or not lone) else None


def _expanded(term: str, rank: int) -> Labels:
    """``"b...i"`` of rank 4 -> ``("b", -2, -1, "i")``"""
    before, dots, after = term.partition("...")
    count = rank - len(before) - len(after) if dots else 0
    return (*before, *range(-count, 0), *after)


def reduced(x: Tensor, given: Labels, wanted: Labels) -> Tensor:
    """A sum over the labels that the result lacks, and the rest in its order."""
    kept = tuple(label for label in given if label in wanted)
    dims = [i for i, label in enumerate(given) if label not in wanted]
    return ordered(x.sum(dims) if dims else x, kept, wanted)


def contracted(x: Tensor, y: Tensor, of_x: Labels, of_y: Labels, wanted: Labels) -> Tensor:
    """Equation (1)."""
    batch = [label for label in of_x if label in of_y and label in wanted]
    summed = [label for label in of_x if label in of_y and label not in wanted]
    if not batch and constant_of(x) is not None and constant_of(y) is None:
        return contracted(y, x, of_y, of_x, wanted)
    m, n = ([label for label in own if label not in (*batch, *summed)] for own in (of_x, of_y))
    x, y = ordered(x, of_x, (*batch, *m, *summed)), ordered(y, of_y, (*batch, *summed, *n))
    lead = len(batch)
    free = [*x.shape[lead : lead + len(m)], *y.shape[y.dim() - len(n) :]]
    if not summed:
        x = x.reshape(*x.shape, *[1] * len(n))
        y = y.reshape(*y.shape[:lead], *[1] * len(m), *y.shape[lead:])
        return ordered(x * y, (*batch, *m, *n), wanted)
    k = math.prod(x.shape[lead + len(m) :])
    x = shaped(x, [*x.shape[:lead], math.prod(free[: len(m)]), k])
    y = shaped(y, [*y.shape[:lead], k, math.prod(free[len(m) :])])
    z = torch.matmul(x, y)
    return ordered(shaped(z, [*z.shape[:lead], *free]), (*batch, *m, *n), wanted)


def ordered(x: Tensor, given: Labels, wanted: Labels) -> Tensor:
    """The axes ``given`` in the order ``wanted``."""
    order = [given.index(label) for label in wanted]
    return x if order == list(range(len(order))) else x.permute(order)


def shaped(x: Tensor, size: list[int]) -> Tensor:
    """Reshaped where that changes anything."""
    return x if list(x.shape) == size else x.reshape(size)


def tensordot(route: Router, a: Tensor, b: Tensor, dims: Any = 2, out: None = None) -> Tensor:
    """a and b summed over pairs of axes: the last ``dims`` of a with the first of b, or two lists of axes."""
    if isinstance(dims, int):
        of_a, of_b = list(range(a.dim() - dims, a.dim())), list(range(dims))
    else:
        of_a, of_b = ([int(d) for d in (side if isinstance(side, (list, tuple)) else [side])] for side in dims)
    left: list[Any] = [f"a{i}" for i in range(a.dim())]
    right: list[Any] = [f"b{i}" for i in range(b.dim())]
    for i, (p, q) in enumerate(zip(of_a, of_b, strict=True)):
        left[p] = right[q] = i
    wanted = [label for label in (*left, *right) if isinstance(label, str)]
    return contracted(a, b, tuple(left), tuple(right), tuple(wanted))


OPS = ()
COMPOSED = {
    torch.einsum: Composed(function=einsum, tag="function_bmm"),
    torch.tensordot: Composed(function=tensordot, tag="function_bmm"),
}
