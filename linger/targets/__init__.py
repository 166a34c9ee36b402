"""Chips as tables. A table says how its engine spells itself and which attributes its packer reads."""

from __future__ import annotations

from linger.errors import LingerError
from linger.targets._base import Target
from linger.targets._limits import Latency, Limit, Memory
from linger.targets._measures import Facts
from linger.targets._pwl import Pwl
from linger.targets._softmax import Softmax
from linger.targets.arcs import ARCS, MARS
from linger.targets.venus import VENUS
from linger.targets.venusa import VENUSA

TARGETS: dict[str, Target] = {t.name: t for t in (VENUS, ARCS, VENUSA)}
_KNOWN: dict[str, Target] = {**TARGETS, MARS.name: MARS}  # and those read from files

__all__ = ["TARGETS", "Facts", "Latency", "Limit", "Memory", "Pwl", "Softmax", "Target", "known", "target"]


def known(name: str) -> Target:
    """The table under this name, or this spelling of the packer.

    Raises:
        LingerError: there is none, or its file was not read in this process.
    """
    found = _KNOWN.get(str(name).lower())
    if found is None:
        raise LingerError(
            f"target is {name!r}, allowed are {', '.join(_KNOWN)} and the path of a .toml file; choose one of them"
        )
    return found


def target(name: str | None) -> Target:
    """The table of a chip; venus where none is named.

    Raises:
        LingerError: there is no such chip.
    """
    return VENUS if name is None else known(name)
