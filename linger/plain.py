"""What a rich console prints, as plain text: what ``str`` of a result gives."""

from __future__ import annotations

import io
from collections.abc import Callable

from rich.console import Console

WIDTH = 160  # columns


def text_of(show: Callable[[Console], None], width: int = WIDTH) -> str:
    """What ``show`` prints on a console without colours of this width."""
    out = io.StringIO()
    show(Console(file=out, width=width, no_color=True))
    return out.getvalue().rstrip()
