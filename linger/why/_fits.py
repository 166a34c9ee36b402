"""Causes that are solved for instead of tried: factors of channels, and one weight that is another.

out_c = saturate(shift_round(r_c * p_c + t_c))   p: the sum without its bias; r_c, t_c of least squares       (1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from linger.why._case import View

NEAR = 1.5  # LSB that rounded weights may move a result
SURE = 0.98


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A cause that was solved for: how many of the differing elements it reproduces."""

    name: str
    said: str
    explained: int
    certain: bool = False


def channel_factors(view: View, found: np.ndarray) -> Iterator[Fit]:
    """Equation (1): another eps scales every channel by a factor of its own, all of them down or all of them up."""
    if not (view.weighted and view.last and view.sums and found.ndim >= 2 and len(view.inputs) > 2):
        return
    v, n = view.sums[-1]
    bias = 0 if view.inputs[2] is None else view.inputs[2].astype(np.float64).reshape(1, -1, *[1] * (found.ndim - 2))
    p = (v - bias) / 2.0**n
    limits = np.iinfo(view.out.dtype)
    factors, near, count = [], 0, 0
    for c in range(found.shape[1]):
        x, y = p[:, c].ravel(), found[:, c].astype(np.float64).ravel()
        inside = (y > limits.min) & (y < limits.max)
        if inside.sum() < 8 or np.ptp(x[inside]) < 8:
            continue
        r, t = np.polyfit(x[inside], y[inside], 1)
        factors.append(float(r))
        near += int((np.abs(r * x + t - y)[inside] <= NEAR).sum())
        count += int(inside.sum())
    differing = int((found != view.segment.expected).sum())
    if len(factors) < 2 or near < SURE * count:
        return
    r = np.array(factors)
    spread = float(r.max() - r.min())
    if (r.max() <= 1.01 or r.min() >= 0.99) and np.abs(r - 1).max() > 0.004 and spread > 0.002:
        said = f"every channel has a factor of its own, {r.min():.3f} to {r.max():.3f}, as another eps makes them"
        yield Fit(name="normalization eps", said=said, explained=differing)


def one_weight(view: View, found: np.ndarray) -> Iterator[Fit]:
    """A single stored weight is another: only its output channel differs, in proportion to what the weight multiplies."""
    if not (view.weighted and view.last and view.sums):
        return
    axis = -1 if view.op.startswith("Linear") else 1
    differs = np.moveaxis(found != view.segment.expected, axis, 0).reshape(found.shape[axis], -1).any(1)
    if differs.sum() != 1:
        return
    channel = int(differs.argmax())
    w = view.inputs[1]
    if "Transpose" in view.op or w[channel].size > 4096:
        return
    for position in np.ndindex(*w[channel].shape):
        for bit in range(8 * w.dtype.itemsize):
            changed = w.copy()
            changed[(channel, *position)] ^= w.dtype.type(
                1 << bit if bit < 8 * w.dtype.itemsize - 1 else np.iinfo(w.dtype).min
            )
            out = view.with_input(1, changed)
            if out is not None and np.array_equal(out, found):
                place = ", ".join(map(str, (channel, *position)))
                said = f"bit {bit} of {view.node.input[1]}[{place}] is flipped"
                yield Fit(
                    name="stored weight", said=said, explained=int((found != view.segment.expected).sum()), certain=True
                )
                return


FITS: tuple[Callable[[View, np.ndarray], Iterator[Fit]], ...] = (one_weight, channel_factors)
