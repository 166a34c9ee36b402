"""A chip's table from a TOML file: what it says, and what it takes from a table that there is (``like``).

The tables of sigmoid, softmax and the like are those of the other chip, which the nodes of a file name as their platform, and the
rounding is an attribute of every node, so that a file means the same where this one is missing. Sizes, widths, ops and limits are
the file's own. Every error names the line. A key or a word that is not known is an error: a limit that is not read would not hold.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from linger.errors import LingerError
from linger.rounding import ROUNDINGS
from linger.targets._base import Target
from linger.targets._engine import STATUS
from linger.targets._limits import KINDS, STATUSES, Latency, Limit, Memory
from linger.targets._measures import ALIGNED, CONDITIONS, MEASURES

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser under its older name
    import tomli as tomllib

WIDTHS = {"data_bits": (8, 16, 32), "parameter_bits": (4, 8, 16)}
KEYS = ("name", "like", "rounding", "data_bits", "parameter_bits", "memory", "latency", "ops", "limits")
LIMIT_KEYS = tuple(f.name for f in fields(Limit) if f.name != "op")
STRING = r'("(?:\\.|[^"\\\n])*"|\'[^\'\n]*\')'


class _Reader:
    """The parsed file, and where in its text a key stands."""

    def __init__(self, path: str, text: str) -> None:
        self.path, self.text = path, re.sub(STRING + r"|#[^\n]*", lambda m: m[1] or "", text)

    def line(self, *keys: str | int) -> int:
        """The line of the innermost of ``keys``, searched after the outer ones; 1 where it is not found.

        A number is that of a table in the list before.
        """
        at = 0
        for key in keys:
            if isinstance(key, int):
                at = self._table(at, key)
                continue
            word = rf"(?<![\w-]){re.escape(key)}(?![\w-])[\"']?\s*[=\].]|\"{re.escape(key)}\""
            found = re.compile(word).search(self.text, at)
            at = found.start() if found else at
        return 1 + self.text.count("\n", 0, at)

    def _table(self, at: int, index: int) -> int:
        """Where the table of this number begins, of those from the line of ``at`` on."""
        begin = self.text.rfind("\n", 0, at) + 1
        found = [m.start() for m in re.finditer(STRING + r"|(\{|\[\[)", self.text[begin:]) if m[2]]
        return begin + found[index] if index < len(found) else at

    def error(self, keys: tuple[str | int, ...], found: str, allowed: str, way: str) -> LingerError:
        """The one sentence: where, what, and what instead."""
        return LingerError(f"{self.path}:{self.line(*keys)}: found {found}, allowed {allowed}; {way}")

    def known(self, keys: tuple[str | int, ...], given: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
        """Raise for a key that means nothing."""
        for key in given:
            if key not in allowed:
                raise self.error((*keys, key), f"the key {key!r}", f"are {', '.join(allowed)}", "correct or remove it")

    def table(self, given: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        """A part of the file that must be a table."""
        value = given.get(key, {})
        if not isinstance(value, Mapping):
            raise self.error((key,), f"{key} = {value!r}", "is a table", f"write [{key}] and keys below it")
        return value


def load(path: str | os.PathLike[str], find: Callable[[str], Target], taken: Collection[str] = ()) -> Target:
    """Read a table; ``find`` gives that which it is like, ``taken`` are names that it must not have.

    Raises:
        LingerError: the file cannot be read, is no TOML, or says something that means nothing or cannot be.
    """
    name = os.fspath(path)
    try:
        text = Path(name).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LingerError(
            f"the target's file {name!r} cannot be read ({error}); pass the path of a .toml file"
        ) from None
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"line (\d+)", str(error))  # none at the end of the file
        line = at[1] if at else 1 + text.rstrip().count("\n")
        raise LingerError(f"{name}:{line}: this is no TOML ({error}); correct it") from None
    return _target(_Reader(name, text), given, find, taken)


def _target(r: _Reader, given: Mapping[str, Any], find: Callable[[str], Target], taken: Collection[str]) -> Target:
    r.known((), given, KEYS)
    for key in ("name", "like"):
        if not isinstance(given.get(key), str):
            raise r.error((key,), f"{key} = {given.get(key)!r}", "is a string", f'write {key} = "..." at the top')
    if not re.fullmatch(r"[a-z][a-z0-9_]*", given["name"]):
        raise r.error(("name",), f"name = {given['name']!r}", "are lower-case letters, digits and _", "rename it")
    if given["name"] in taken:
        raise r.error(("name",), f"the name {given['name']!r}", "are names of no other chip", "rename it")
    try:
        base = find(given["like"])
    except LingerError as error:
        raise LingerError(f"{r.path}:{r.line('like')}: {error}") from None
    return replace(
        base, name=given["name"], rounding=_rounding(r, given, base), like=base.like or base.name,
        data_bits=_widths(r, given, "data_bits", base.data_bits),
        parameter_bits=_widths(r, given, "parameter_bits", base.parameter_bits),
        memory=_numbers(r, given, "memory", Memory, base.memory, whole=True),
        latency=_numbers(r, given, "latency", Latency, base.latency, whole=False),
        ops=_ops(r, given, base), limits=_limits(r, given, base),
    )  # fmt: skip


def _rounding(r: _Reader, given: Mapping[str, Any], base: Target) -> str:
    found = given.get("rounding", base.rounding)
    if not isinstance(found, str) or found not in ROUNDINGS:
        raise r.error(("rounding",), f"rounding = {found!r}", f"are {', '.join(ROUNDINGS)}", "choose one of them")
    return str(found)


def _widths(r: _Reader, given: Mapping[str, Any], key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    found = given.get(key, list(default))
    if not isinstance(found, list) or not found or any(b not in WIDTHS[key] for b in found):
        raise r.error((key,), f"{key} = {found!r}", f"is a list of {', '.join(map(str, WIDTHS[key]))}", "correct it")
    return tuple(sorted(found))


def _numbers(r: _Reader, given: Mapping[str, Any], key: str, cls: Any, base: Any, whole: bool) -> Any:
    """A dataclass of figures."""
    table = r.table(given, key)
    r.known((key,), table, tuple(f.name for f in fields(cls)))
    for name, value in table.items():
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if (
            not number
            or not math.isfinite(value)
            or value < 0
            or (value == 0 and (name == "align" or name.endswith("per_cycle")))
        ):
            wanted = "is a whole number of bytes" if whole else "is a positive number"
            raise r.error((key, name), f"{name} = {value!r}", wanted, "correct it, or leave it out")
    return replace(base, **table)


def _ops(r: _Reader, given: Mapping[str, Any], base: Target) -> dict[str, str]:
    found = dict(base.ops)
    for op, status in r.table(given, "ops").items():
        _require_op(r, ("ops", op), op)
        if status not in STATUSES:
            raise r.error(("ops", op), f"{op} = {status!r}", f"are {', '.join(STATUSES)}", "choose one of them")
        found[op] = status
    return found


def _require_op(r: _Reader, keys: tuple[str, ...], op: str) -> None:
    known = [line.split()[0] for line in STATUS.strip().splitlines()]
    if op not in known:
        raise r.error(keys, f"the op {op!r}", f"are {', '.join(known)}", "correct or remove it")


def _limits(r: _Reader, given: Mapping[str, Any], base: Target) -> tuple[Limit, ...]:
    """Those of ``base``, but for the ops and measures that the file speaks of."""
    made: list[Limit] = []
    for op, rows in r.table(given, "limits").items():
        _require_op(r, ("limits", op), op)
        if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
            raise r.error(
                ("limits", op), f"{op} = {rows!r}", "is a list of tables", 'write [{of = "kernel", high = 5}]'
            )
        made += [_limit(r, op, i, row) for i, row in enumerate(rows)]
    said = {(limit.op, limit.of) for limit in made}
    return (*(limit for limit in base.limits if (limit.op, limit.of) not in said), *made)


def _limit(r: _Reader, op: str, index: int, row: Mapping[str, Any]) -> Limit:
    keys = ("limits", op, index)
    r.known(keys, row, LIMIT_KEYS)
    if "of" not in row:
        raise r.error(keys, "a limit without of", f"are {', '.join(MEASURES)}", "say what is counted")
    for key, allowed in (("of", MEASURES), ("when", CONDITIONS), ("kind", KINDS)):
        if key in row and (not isinstance(row[key], str) or row[key] not in allowed):
            known = ", ".join(filter(None, allowed))
            raise r.error((*keys, key), f"{key} = {row[key]!r}", f"are {known}", "choose one of them")
    if not isinstance(row.get("way", ""), str):
        raise r.error((*keys, "way"), f"way = {row['way']!r}", "is a string", "say what to do instead")
    for key in ("low", "high", "among", "align"):
        numbers = row.get(key, []) if key in ("among", "align") else [row.get(key, 0)]
        if not isinstance(numbers, list) or any(not isinstance(n, int) or isinstance(n, bool) for n in numbers):
            raise r.error((*keys, key), f"{key} = {row[key]!r}", "are whole numbers", "correct it")
    said: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    limit = Limit(op=op, **said)
    nothing = limit.low is not None and limit.high is not None and limit.low > limit.high
    nothing |= limit.among != () and not any(map(limit.allows, limit.among))
    if nothing or (limit.low, limit.high, limit.among) == (None, None, ()) or min(limit.align, default=1) < 1:
        raise r.error(
            (*keys, "low" if "low" in row else "of"), f"an impossible limit on {limit.of}",
            "is low <= high, or among, and align of 1 and more", "correct it",
        )  # fmt: skip
    factors = ALIGNED.get(limit.of, 0)
    if len(limit.align) > factors:
        raise r.error(
            (*keys, "align"), f"align of {len(limit.align)} factors of {limit.of}", f"are {factors}", "leave the others out"
        )  # fmt: skip
    return limit
