"""Other libraries on the same float nets, data, epochs and constraint: per-tensor power-of-two scales.

What they compute is a float simulation: no file of theirs is compared. A library that is not installed is named as not run.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from benchmarks.accuracy.ways import Job

PEERS: dict[str, Callable[[Job], nn.Module]] = {}


class NotRun(Exception):
    """Why a peer has no number."""


def versions() -> str:
    return ""
