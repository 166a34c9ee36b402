"""Chips as tables. A table says how its engine spells itself and which attributes its packer reads."""

from __future__ import annotations

from linger.errors import LingerError
from linger.targets._base import Target
from linger.targets._pwl import Pwl
from linger.targets._softmax import Softmax
from linger.targets.arcs import ARCS
from linger.targets.venus import VENUS
from linger.targets.venusa import VENUSA

TARGETS: dict[str, Target] = {t.name: t for t in (VENUS, ARCS, VENUSA)}

__all__ = ["TARGETS", "Pwl", "Softmax", "Target", "target"]


def target(name: str | None) -> Target:
    """The table of a chip; venus where none is named.

    Raises:
        LingerError: there is no such chip.
    """
    if name is None:
        return VENUS
    found = TARGETS.get(str(name).lower())
    if found is None:
        raise LingerError(f"target is {name!r}, allowed are {', '.join(TARGETS)}; choose one of them")
    return found
