"""What every verb that takes a loader shares: how a batch enters the net, how far one has come, how modes come back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linger.errors import LingerError
from linger.ops import IntModule
from linger.swap import device_of

Forward = Callable[[nn.Module, Any], Any]


def feed(net: nn.Module, batch: Any) -> Any:
    """The net on one batch of a loader: a tensor, (input, anything ...) as data sets yield, or a mapping of arguments."""
    if isinstance(batch, Mapping):
        return net(**batch)
    if isinstance(batch, (tuple, list)) and batch:
        return net(batch[0])
    if isinstance(batch, Tensor):
        return net(batch)
    raise LingerError(
        f"the loader yields {type(batch).__name__}, allowed are a tensor, (input, ...) and a mapping of arguments; "
        "pass forward=lambda net, batch: ... for another kind"
    )


def plain(net: nn.Module) -> nn.Module:
    """The net below ``torch.compile``, whose compiled forward watches nothing."""
    return getattr(net, "_orig_mod", net)


def moved(batch: Any, net: nn.Module) -> Any:
    """The batch where the net is."""
    device = device_of(net)
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), batch) if device else batch


def taken(loader: Iterable[Any], net: nn.Module, limit: int | None) -> Iterator[Any]:
    """At most ``limit`` batches of the loader, where the net is.

    Raises:
        LingerError: there is none, or ``limit`` is no positive number.
    """
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise LingerError(
            f"batches is {limit!r}, allowed are None and numbers from 1; leave it out for the whole loader"
        )
    i = -1
    for i, batch in enumerate(loader):
        if i == limit:
            return
        yield moved(batch, net)
    if i < 0:
        raise LingerError(
            "found an empty loader, allowed is one of at least one batch; an iterator can be used up only once"
        )


def kept(loader: Iterable[Any], limit: int | None) -> Iterable[Any]:
    """A loader that can be gone through several times: an iterator's batches are held."""
    if iter(loader) is not loader:
        return loader
    held = []
    for batch in loader:
        held.append(batch)
        if len(held) == limit:
            break
    return held


@contextmanager
def bar(shown: bool) -> Iterator[Progress]:
    """Progress bars on stderr."""
    columns = (TextColumn("{task.description:>20}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        yield progress


def length(loader: Any, limit: int | None) -> int | None:
    """How many batches there will be; None where that is not known before."""
    known = len(loader) if hasattr(loader, "__len__") else None
    return limit if known is None else known if limit is None else min(known, limit)


@contextmanager
def modes_kept(net: nn.Module) -> Iterator[None]:
    """Every module's training flag as it was before."""
    modes = {m: m.training for m in net.modules()}
    try:
        yield
    finally:
        for m in net.modules():
            m.training = modes.get(m, modes[net])


@contextmanager
def observing(net: nn.Module) -> Iterator[None]:
    """Fixed-point layers observe, and everything else is in eval mode: no dropout, and statistics stay as they are."""
    layers = {m: m.still for m in net.modules() if isinstance(m, IntModule)}
    try:
        with modes_kept(net), torch.no_grad():
            net.eval()
            for module in layers:
                module.training, module.still = True, False
            yield
    finally:
        for module, still in layers.items():
            module.still = still
