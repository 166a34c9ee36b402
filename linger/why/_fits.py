"""Causes that are solved for instead of tried: factors of channels, and one weight that is another.

out_c = saturate(shift_round(r_c * p_c + t_c))   p: the sum; r_c, t_c of least squares                       (1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from linger.why._case import View

NEAR = 1.5  # LSB that rounded weights may move a result
SURE = 0.98  # of the elements that are near
REPRODUCED = 0.5  # of those that differ, exactly; the rest is the rounding of the weights
LEAST = 0.02  # factor of a channel; one that is all 0 has another cause
FEW = 8
SUMS = ("Conv", "Linear", "BatchNorm")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A cause that was solved for: how many of the differing elements it reproduces."""

    name: str
    said: str
    explained: int
    certain: bool = False


def _axis(view: View) -> int:
    """The axis of the output channels."""
    return view.out.ndim - 1 if view.op.startswith("Linear") else 1


def channel_factors(view: View, found: np.ndarray) -> Iterator[Fit]:
    """Equation (1): another eps scales every channel by a factor of its own, all of them down or all of them up.

    Where all factors are 1, the constants are those of another bias.
    """
    if not (view.op.startswith(SUMS) and view.last and view.sums and found.ndim >= 2):
        return
    v, n = view.sums[-1]
    expected = view.segment.expected
    p, out, right = (
        np.moveaxis(a, _axis(view), 0).reshape(found.shape[_axis(view)], -1) for a in (v / 2.0**n, found, expected)
    )
    lines = [line for line in map(_line, p, out, right, [view.out.dtype] * len(p)) if line is not None]
    if len(lines) < 2:
        return
    r, t, near, inside, again, unlike = np.array(lines).T
    differing = int((found != expected).sum())
    explained = int(again.sum())
    if differing < FEW or near.sum() < SURE * inside.sum() or explained < REPRODUCED * unlike.sum():
        return
    if np.abs(r - 1).max() <= 0.02 and np.abs(t).max() > 0.5:
        said = f"every channel is off by a constant, {t.min():.1f} to {t.max():.1f} steps, as another bias makes them"
        yield Fit(name="bias scale", said=said, explained=explained)
    elif (
        ((r.min() > LEAST and r.max() <= 1.01) or r.min() >= 0.99) and np.abs(r - 1).max() > 0.004 and np.ptp(r) > 0.002
    ):
        said = f"every channel has a factor of its own, {r.min():.3f} to {r.max():.3f}, as another eps makes them"
        yield Fit(name="normalization eps", said=said, explained=explained)


def _line(x: np.ndarray, y: np.ndarray, right: np.ndarray, dtype: np.dtype[Any]) -> tuple[float, ...] | None:
    """Of one channel: r, t, how many elements are near the line, of how many, how many that differ it reproduces, of how many."""
    limits = np.iinfo(dtype)
    inside = (y > limits.min) & (y < limits.max)
    x, y, right = x[inside], y[inside].astype(np.float64), right[inside]
    if len(x) < FEW or np.ptp(x) < FEW:
        return None
    r, t = np.polyfit(x, y, 1)
    unlike = right != y
    again = unlike & (np.floor(r * x + t + 0.5) == y)
    near = np.abs(r * x + t - y) <= NEAR
    return float(r), float(t), int(near.sum()), len(x), int(again.sum()), int(unlike.sum())


def one_weight(view: View, found: np.ndarray) -> Iterator[Fit]:
    """A single stored weight is another: only its output channel differs, in proportion to what the weight multiplies."""
    if not (view.op.startswith(SUMS) and view.weighted and view.last):
        return
    axis = _axis(view)
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
