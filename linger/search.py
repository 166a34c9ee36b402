"""search: the widths of weights that hurt least within a budget of memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import nn

from linger.batches import Forward, bar, feed, kept, plain, taken
from linger.errors import LingerError, during
from linger.ops import IntModule
from linger.ops._bits import ALLOWED_PARAMETER_BITS
from linger.recipe import Recipe, Settings
from linger.sensitivity import Bench, Metric, at_bits, measurable
from linger.swap import require_net
from linger.targets import target as find_target

UNITS = {"": 1, "B": 1, "kB": 1000, "KiB": 1024, "MB": 1000**2, "MiB": 1024**2}
CELLS = 4096  # of the budget, each layer's bytes rounded up to whole ones
TIE = 1e-6  # of the noise, added to the metric's increase so that equal ones are told apart


def search(
    net: nn.Module,
    loader: Iterable[Any],
    budget: int | str,
    *,
    metric: Metric | None = None,
    bits: Iterable[int] = ALLOWED_PARAMETER_BITS,
    target: str | None = None,
    batches: int | None = None,
    forward: Forward = feed,
    progress: bool = True,
) -> Recipe:
    """Choose 4, 8 or 16 bits for the weights of every layer, so that they hurt least and fit into a budget.

    Each layer is measured alone at every width (see ``sensitivity``); what layers lose is taken to add up, and the best sum
    within the budget is found exactly (knapsack). The net does not change.

    Args:
        net: a calibrated fixed-point net.
        loader: an iterable of batches.
        budget: bytes, or a text such as "96 kB" (1,000 bytes each) or "96 KiB" (1,024), for weights and 4-byte biases of
            layers; weights that a forward only reads, as those of attention, are not counted and keep their width.
        metric: ``metric(output, batch)``, smaller is better; what counts by default is the noise at the net's outputs.
        bits: the widths to choose from.
        target: a chip; only widths that it can run are chosen.
        batches: how many batches are used at most.
        forward: how a batch enters the net, as for ``calibrate``.
        progress: show a progress bar.

    Returns:
        The recipe: ``save`` it, and pass the file (or the recipe) to ``init(..., recipe=...)``.

    Raises:
        LingerError: the budget is too small even for the narrowest weights, or no text of a size.
    """
    require_net("search", net)
    with during("search"):
        net, limit = plain(net), size_of(budget)
        widths = _widths(bits, target)
        bench = Bench(net, taken(kept(loader, batches), net, batches), forward, metric)
        chosen_from = {
            n: m for n, m in measurable(net).items() if m.weighted and list(m.parameters()) and m in bench.called
        }
        sizes = {name: [bytes_of(m, b) for b in widths] for name, m in chosen_from.items()}
        least = sum(min(s) for s in sizes.values())
        if least > limit:
            raise LingerError(
                f"the budget is {limit:,} bytes, {widths[0]}-bit weights and the biases take {least:,}; allow that much"
            )
        costs = _costs(bench, chosen_from, widths, progress)
    picks = knapsack(sizes, costs, limit)
    used = sum(sizes[name][i] for name, i in picks.items())
    layers: dict[str, Settings] = {name: {"parameter_bits": widths[i]} for name, i in picks.items()}
    return Recipe(layers=layers, notes=(f"weights and biases: {used:,} of {limit:,} bytes",))


def _widths(bits: Iterable[int], target: str | None) -> list[int]:
    known = ALLOWED_PARAMETER_BITS if target is None else find_target(target).parameter_bits
    wanted = sorted(set(bits))
    left = [b for b in wanted if b in known]
    if not left or not set(wanted) <= set(ALLOWED_PARAMETER_BITS):
        raise LingerError(f"bits are {', '.join(map(str, wanted)) or 'none'}, allowed are {', '.join(map(str, known))}")
    return left


def _costs(bench: Bench, layers: Mapping[str, IntModule], widths: list[int], progress: bool) -> dict[str, list[float]]:
    """What every layer loses at every width."""
    costs: dict[str, list[float]] = {}
    with bar(progress) as shown:
        for name, module in shown.track(layers.items(), description="search"):
            costs[name] = []
            for width in widths:
                with at_bits(module, width):
                    noise, increase = bench.loss([module])
                costs[name].append(noise if increase is None else max(increase, 0.0) + TIE * noise)
    return costs


def size_of(budget: int | str) -> int:
    """Bytes from a number or a text.

    Raises:
        LingerError: it is neither, or not above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(\w*)\s*", str(budget))
    if found is None or found[2] not in UNITS or float(found[1]) <= 0:
        raise LingerError(
            f"the budget is {budget!r}, allowed are bytes and texts such as '96 kB' ({', '.join(UNITS)[2:]})"
        )
    return int(float(found[1]) * UNITS[found[2]])


def bytes_of(module: nn.Module, bits: int) -> int:
    """What a layer takes in flash: matrices of ``bits`` bits, vectors of 4 bytes."""
    shapes = [p.shape for p in module.parameters()]
    return sum(-(-s.numel() * bits // 8) if len(s) > 1 else 4 * s.numel() for s in shapes)


def knapsack(sizes: Mapping[str, list[int]], costs: Mapping[str, list[float]], limit: int) -> dict[str, int]:
    """One choice per layer with the least sum of costs within the limit, which the smallest choices fit.

    Sizes beyond each layer's smallest count in cells, rounded up: the sum never exceeds the limit.
    """
    room = limit - sum(min(s) for s in sizes.values())
    cell = max(1, -(-room // CELLS))
    cells = room // cell + 1
    best, back = np.zeros(cells), []
    for name, given in sizes.items():
        weights = [-(-(size - min(given)) // cell) for size in given]
        rows = np.full((len(given), cells), np.inf)
        for row, weight, cost in zip(rows, weights, costs[name], strict=True):
            if weight < cells:
                row[weight:] = best[: cells - weight] + cost
        picked = rows.argmin(0)
        back.append((name, picked, weights))
        best = rows.min(0)
    at, found = cells - 1, {}
    for name, picked, weights in reversed(back):
        found[name] = int(picked[at])
        at -= weights[found[name]]
    return {name: found[name] for name in sizes}
