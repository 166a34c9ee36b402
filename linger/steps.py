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


def replaceable(step: Step) -> Step:
    """A step of the reference that ``instead`` may replace; ``__wrapped__`` is the step itself."""
    known = len([name for name in inspect.signature(step).parameters if name != "rounding"])

    @functools.wraps(step)
    def called(*args: Any) -> np.ndarray:
        other = (_INSTEAD.get() or {}).get(step.__name__)
        return step(*args) if other is None else other(*args[:known])

    return called  # type: ignore[return-value]
