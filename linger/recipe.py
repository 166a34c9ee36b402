"""Recipes: which layer gets which widths, in a plain TOML file that people can read and change.

    [layers]
    "*" = { parameter_bits = 4 }
    "encoder.conv*" = { parameter_bits = 8, data_bits = 8, out_bits = 16 }
    "head" = { quant = false }

A pattern is a dotted layer name, with ``*``, ``?`` and ``[...]`` as in file names; of several that fit, the later wins, key by key.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from linger.errors import LingerError
from linger.files import whole
from linger.ops._bits import check_bits

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Settings = dict[str, Any]
WIDTHS = ("parameter_bits", "data_bits", "out_bits")
KEYS = (*WIDTHS, "quant")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Patterns and their settings in order. ``notes`` become comments at the head of the file."""

    layers: Mapping[str, Settings]
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        lines = [*(f"# {note}" for note in self.notes), "[layers]"]
        for pattern, settings in self.layers.items():
            values = ", ".join(f"{key} = {str(value).lower()}" for key, value in settings.items())
            lines.append(f"{quoted(pattern)} = {{ {values} }}")
        return "\n".join(lines) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file that ``init(..., recipe=path)`` reads."""
        with whole(path) as out:
            out.write(str(self).encode())


def quoted(pattern: str) -> str:
    """A TOML string."""
    return '"' + pattern.replace("\\", "\\\\").replace('"', '\\"') + '"'


def recipe_of(source: Any) -> Recipe:
    """A recipe from a path, a mapping of patterns to settings, or one that is ready.

    Raises:
        LingerError: the file is missing or no TOML, a key does not exist, or a width is not allowed.
    """
    if isinstance(source, Recipe):
        layers: Any = source.layers
    elif isinstance(source, Mapping):
        layers = source
    else:
        layers = _read(source)
    for pattern, settings in layers.items():
        _check(pattern, settings)
    return Recipe(layers=dict(layers))


def _read(path: Any) -> Mapping[str, Any]:
    try:
        table = tomllib.loads(Path(path).read_text("utf-8"))
    except (OSError, TypeError, tomllib.TOMLDecodeError) as error:
        raise LingerError(f"recipe {str(path)!r}: {error}; pass the path of a TOML file, or a mapping") from None
    if set(table) != {"layers"} or not isinstance(table["layers"], dict):
        raise LingerError(f"recipe {str(path)!r} holds {', '.join(table) or 'nothing'}, allowed is one table [layers]")
    return table["layers"]


def _check(pattern: str, settings: Any) -> None:
    if not isinstance(settings, Mapping):
        raise LingerError(
            f"recipe: {pattern!r} is {settings!r}, allowed are settings like {{ parameter_bits = 4 }}; write them so"
        )
    for key, value in settings.items():
        if key not in KEYS:
            raise LingerError(
                f"recipe: {pattern!r} has the key {key!r}, allowed are {', '.join(KEYS)}{meant(key, KEYS)}"
            )
        if key == "quant" and not isinstance(value, bool):
            raise LingerError(
                f"recipe: {pattern!r} has quant = {value!r}, allowed are true and false; choose one of them"
            )
    try:
        check_bits(**{key: settings[key] for key in WIDTHS if key in settings})
    except LingerError as error:
        raise LingerError(f"recipe: {pattern!r}: {error}") from None


def meant(found: str, names: Collection[str]) -> str:
    """A suggestion, where a name is near."""
    near = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def assigned(recipe: Recipe, names: Collection[str]) -> dict[str, Settings]:
    """The settings of every layer that a pattern fits.

    Raises:
        LingerError: a pattern fits no layer.
    """
    found: dict[str, Settings] = {}
    for pattern, settings in recipe.layers.items():
        fitting = [name for name in names if fnmatchcase(name, pattern)]
        if not fitting:
            raise LingerError(
                f"recipe: {pattern!r} fits no layer that can be converted, allowed are "
                f"{', '.join(sorted(names)) or 'none in this net'}{meant(pattern, names)}"
            )
        for name in fitting:
            found[name] = found.get(name, {}) | settings
    return found
