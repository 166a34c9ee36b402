"""Steps of the integer reference that another implementation's may replace, to see what that would compute."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import numpy as np

Step = TypeVar("Step", bound=Callable[..., np.ndarray])
_INSTEAD: ContextVar[Mapping[str, Callable[..., np.ndarray]] | None] = ContextVar("_INSTEAD", default=None)


@contextmanager
def instead(**steps: Callable[..., np.ndarray]) -> Iterator[None]:
    """The reference with other steps, by name: what an implementation that rounds or saturates otherwise would compute."""
    token = _INSTEAD.set(steps)
    try:
        yield
    finally:
        _INSTEAD.reset(token)


PIECE = 2**19  # bytes, about: what a core's cache holds beside the results


def pieces(length: int, size: int) -> Iterator[slice]:
    """Slices of an axis whose passes find the cache; one of all where steps are replaced, for these may look at whole sums.

    Args:
        length: of the axis.
        size: bytes that one index of it stands for.
    """
    step = length if _INSTEAD.get() is not None else PIECE // max(1, size)
    for start in range(0, length, max(1, step)):
        yield slice(start, start + max(1, step))


def piecewise(step: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """``step`` in ``pieces``, if it treats elements one by one: its arrays broadcast, and the result lies in memory as the first does."""

    @functools.wraps(step)
    def called(*arrays: np.ndarray, **said: Any) -> np.ndarray:
        first, *others = np.broadcast_arrays(*arrays)
        if 8 * first.size <= PIECE:
            return step(*arrays, **said)
        axis, out = max(range(first.ndim), key=lambda i: (first.shape[i] > 1, first.strides[i])), None
        for some in pieces(first.shape[axis], 8 * first.size // first.shape[axis]):
            part = (*[slice(None)] * axis, some)
            made = step(*(a[part] for a in (first, *others)), **said)
            out = np.empty_like(first, made.dtype, subok=False) if out is None else out
            out[part] = made
        assert out is not None
        return out

    return called


def replaceable(step: Step) -> Step:
    """A step of the reference that ``instead`` may replace; ``__wrapped__`` is the step itself."""
    known = len([name for name in inspect.signature(step).parameters if name != "rounding"])

    @functools.wraps(step)
    def called(*args: Any) -> np.ndarray:
        other = (_INSTEAD.get() or {}).get(step.__name__)
        return step(*args) if other is None else other(*args[:known])

    return called  # type: ignore[return-value]
