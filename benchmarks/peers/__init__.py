"""Other libraries that train in fixed point, each imported only where it is installed. What both benchmarks of them share.

Both simulate in float with one power-of-two scale per tensor, W8A8 where nothing else is asked for; no file of theirs is compared.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from torch import Tensor, nn

PACKAGES = {"brevitas_nets": "brevitas", "pt2e_nets": "torchao"}
Trainable = Callable[[nn.Module, Tensor], nn.Module]


class NotRun(Exception):
    """Why a peer has no number."""


def version_of(package: str) -> str:
    """Which is installed; an empty string where none is."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def versions() -> str:
    """Of the peers that are installed."""
    return ", ".join(f"{name} {found}" for name in PACKAGES.values() if (found := version_of(name)))


def require(package: str) -> None:
    """Raise NotRun where the library is not installed."""
    if not version_of(package):
        raise NotRun(f"not run, {package} is not installed")


def trainable(module: str) -> Trainable:
    """The module's own ``trainable(net, x)``: a copy of the float net that trains in W8A8 on batches like ``x`` (N, ...)."""

    def made(net: nn.Module, x: Tensor) -> nn.Module:
        require(PACKAGES[module])
        convert: Trainable = importlib.import_module(f"benchmarks.peers.{module}").trainable
        try:
            return convert(net, x)
        except NotRun:
            raise
        except Exception as error:  # whatever a library says of a net that it cannot convert
            raise NotRun(f"not run, {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error

    return made


TRAINABLE: dict[str, Trainable] = {"Brevitas": trainable("brevitas_nets"), "torchao PT2E": trainable("pt2e_nets")}
