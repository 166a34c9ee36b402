"""The part of JSON Schema that docs/command-line.schema.json uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "command-line.schema.json").read_text("utf-8"))
TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)
}  # fmt: skip
KNOWN = {"type", "properties", "required", "items", "additionalProperties", "enum", "$ref"}


def errors(value: Any, schema: dict[str, Any], path: str = "$") -> list[str]:
    """Where ``value`` does not follow ``schema``."""
    assert schema.keys() <= KNOWN, schema.keys() - KNOWN
    if "$ref" in schema:
        return errors(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], path)
    if "enum" in schema:
        return [] if value in schema["enum"] else [f"{path} is {value!r}"]
    if not _is(value, schema["type"]):
        return [f"{path} is a {type(value).__name__}, no {schema['type']}"]
    found = [
        f"{path} has no {name}" for name in schema.get("required", ()) if isinstance(value, dict) and name not in value
    ]
    more = schema.get("additionalProperties", True)
    for name, inner in value.items() if isinstance(value, dict) else ():
        rule = schema.get("properties", {}).get(name, more)
        found += (
            [f"{path}.{name} is unknown"]
            if rule is False
            else errors(inner, rule, f"{path}.{name}")
            if rule is not True
            else []
        )
    for i, inner in enumerate(value if isinstance(value, list) and "items" in schema else ()):
        found += errors(inner, schema["items"], f"{path}[{i}]")
    return found


def _is(value: Any, types: str | list[str]) -> bool:
    allowed = [types] if isinstance(types, str) else types
    return any(isinstance(value, TYPES[t]) and (t == "boolean" or not isinstance(value, bool)) for t in allowed)


def _refused(constant: str) -> None:
    raise AssertionError(constant)


def check(command: str, text: str) -> Any:
    """The JSON that ``linger command --json`` printed; it must follow the command's schema.

    Raises:
        AssertionError: it does not, or holds NaN or infinity, which JSON does not have.
    """
    said = json.loads(text, parse_constant=_refused)
    assert errors(said, SCHEMA["$defs"][command]) == []
    return said
