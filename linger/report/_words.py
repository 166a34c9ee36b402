"""The words of the page: a name in ``assets/words.json`` stands for a text in every language, with {values} to fill in."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from linger.errors import LingerError

ASSETS = Path(__file__).parent / "assets"
LANGUAGES = ("en", "zh")


@cache
def words() -> dict[str, dict[str, str]]:
    """Name -> language -> text."""
    found: dict[str, dict[str, str]] = json.loads((ASSETS / "words.json").read_text("utf-8"))
    return found


def known(language: str) -> None:
    """Refuse a language that the page does not speak.

    Raises:
        LingerError: there is no such language.
    """
    if language not in LANGUAGES:
        raise LingerError(f"language is {language!r}, allowed are {', '.join(LANGUAGES)}; choose one of them")


def word(name: str, language: str, **values: object) -> str:
    """One text with its values filled in."""
    return words()[name][language].format(**values)
