"""Calls made of other calls, written as PyTorch code that is routed in its turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Router = Callable[..., Any]  # route(func, *args): the call of ``func``, sent to its site


@dataclass(frozen=True, kw_only=True, eq=False)
class Composed:
    """A call made of others that have a fixed-point form: ``function(route, *args)`` makes them, routed in their turn.

    ``tag``: the site whose switch turns it off. ``layer``: with a parameter as weight it is one also on a plain tensor.
    ``opaque``: standard ONNX has no op for it, so that a file has those calls in float too.
    """

    function: Callable[..., Any]
    tag: str
    layer: bool = False
    opaque: bool = False
