"""Chips as tables. A table says how its engine spells itself and which attributes its packer reads."""

from __future__ import annotations

import os

from linger.errors import LingerError
from linger.rounding import HALF_UP
from linger.targets._base import Target
from linger.targets._differ import difference
from linger.targets._limits import Latency, Limit, Memory
from linger.targets._measures import Facts
from linger.targets._pwl import Pwl
from linger.targets._softmax import Softmax
from linger.targets._toml import load
from linger.targets.arcs import ARCS, MARS
from linger.targets.venus import VENUS
from linger.targets.venusa import VENUSA

TARGETS: dict[str, Target] = {t.name: t for t in (VENUS, ARCS, VENUSA)}
BUILT_IN: dict[str, Target] = {**TARGETS, MARS.name: MARS}
_KNOWN = dict(BUILT_IN)  # and those read from files
_FILES: dict[str, str] = {}  # name of a chip -> the file that it was read from

__all__ = [
    "TARGETS",
    "Facts",
    "Latency",
    "Limit",
    "Memory",
    "Pwl",
    "Softmax",
    "Target",
    "difference",
    "half_up",
    "known",
    "target",
]


def known(name: str | os.PathLike[str]) -> Target:
    """The table under this name or this spelling of the packer, or in this file, which is known by its name from then on.

    Raises:
        LingerError: there is none, or the file is wrong.
    """
    said = os.fspath(name) if isinstance(name, os.PathLike) else str(name)
    if said.endswith(".toml"):
        return _read(said)
    found = _KNOWN.get(said.lower())
    if found is None:
        raise LingerError(
            f"target is {name!r}, allowed are {', '.join(_KNOWN)} and the path of a .toml file; choose one of them"
        )
    return found


def _read(path: str) -> Target:
    made, full = load(path, known, BUILT_IN), os.path.abspath(path)
    before = _FILES.setdefault(made.name, full)
    if before != full and _KNOWN[made.name] != made:  # nets that follow the chip find it by its name
        raise LingerError(
            f"{path}: found the name {made.name!r}, which {before!r} has with another table, allowed is one table of a name; "
            "rename one of them"
        )
    _KNOWN[made.name] = made
    return made


def half_up(chip: Target) -> Target:
    """A chip of the same tables that rounds half up, on which every op can be looked at."""
    return chip if chip.rounding == HALF_UP else known(chip.like)


def target(name: str | os.PathLike[str] | None) -> Target:
    """The table of a chip; venus where none is named.

    Raises:
        LingerError: there is no such chip.
    """
    return VENUS if name is None else known(name)
