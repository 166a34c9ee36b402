"""The one error class, and the one wrapper that adds the verb and the dotted layer name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class LingerError(RuntimeError):
    """What was asked, where, what was found, what is allowed, and the way out: one sentence, in the user's names.

    ``LingerError(fact, layer="")``; no ``__init__`` of its own, for PyTorch's compiler has to be able to trace a raise.

    Attributes:
        module: the layer itself, kept only until a container that knows its name has seen the error.
    """

    module: Any = None

    @property
    def fact(self) -> str:
        """The sentence without the layer."""
        return str(self.args[0])

    @property
    def layer(self) -> str:
        """Dotted name of the layer, "" while it is not known."""
        return self.args[1] if len(self.args) > 1 else ""

    @layer.setter
    def layer(self, name: str) -> None:
        self.args = (self.args[0], name)

    def __str__(self) -> str:
        return f"{self.layer}: {self.fact}" if self.layer else self.fact


class LingerWarning(UserWarning):
    """Something was left alone (a layer in float, for example); named so that nothing is skipped silently."""


@contextmanager
def during(verb: str, layer: str = "") -> Iterator[None]:
    """Prefix any LingerError raised inside with ``verb: layer:``. Inner code raises facts, outer code says where."""
    try:
        yield
    except LingerError as error:
        fact = str(error)
        if fact.startswith(f"{verb}: "):
            raise
        if layer and not error.layer:
            fact = f"{layer}: {fact}"
        raise LingerError(f"{verb}: {fact}") from error
