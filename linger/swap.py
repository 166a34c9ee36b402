"""What both conversions share: which types, which modules under which names, and the swap that is all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from linger.errors import LingerError
from linger.ops.convbn import FUSED
from linger.settings import config

Types = type[nn.Module] | Iterable[type[nn.Module]]
Made = dict[nn.Module, nn.Module]
Step = tuple[nn.Module, Callable[[], nn.Module]]


def require_net(verb: str, net: Any) -> None:
    """Raise LingerError unless ``net`` is a module."""
    if not isinstance(net, nn.Module):
        raise LingerError(
            f"{verb}: found {_described(net)}, allowed are instances of torch.nn.Module; pass the net itself"
        )


def _described(thing: Any) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"an object of type {type(thing).__name__}"


def types_of(verb: str, wanted: Types, allowed: tuple[type[nn.Module], ...]) -> set[type[nn.Module]]:
    """The requested types as a set; a type that has no twin is an error."""
    found = set(wanted) if isinstance(wanted, Iterable) and not isinstance(wanted, str) else {wanted}
    unknown = sorted(t.__name__ if isinstance(t, type) else repr(t) for t in found if t not in allowed)
    if unknown:
        names = ", ".join(sorted({t.__name__ for t in allowed}))
        raise LingerError(f"{verb}: found {', '.join(unknown)}, allowed are {names}; leave the others out")
    return found  # type: ignore[return-value]


def named(net: nn.Module, prefix: str = "", found: dict[nn.Module, str] | None = None) -> dict[nn.Module, str]:
    """Every module once, under its first dotted name; the inside of a fused layer is not listed."""
    found = {} if found is None else found
    if net not in found:
        found[net] = prefix
        if type(net) not in FUSED.values():
            for name, child in net.named_children():
                named(child, f"{prefix}.{name}".lstrip("."), found)
    return found


def device_of(net: nn.Module) -> torch.device | None:
    """Where the net is; None where it has no tensor."""
    return next((t.device for t in (*net.parameters(), *net.buffers())), None)


def swap(net: nn.Module, steps: Iterable[Step], accept: Callable[[Made], None] | None = None) -> nn.Module:
    """Make every new module first, then put all of them in place, unless ``accept`` raises."""
    made = {old: make() for old, make in steps}
    if accept is not None:
        accept(made)
    for new in made.values():
        new.__dict__.pop("forward", None)
    for module in list(net.modules()):
        for name, child in module._modules.items():
            if child in made:
                module._modules[name] = made[child]
    return made.get(net, net)


def freeze(bn: nn.Module) -> None:
    """Stop the statistics of a batch normalization where ``SetBnMomentumUpdate`` asks for it."""
    if config.bn_frozen and hasattr(bn, "momentum"):
        bn.momentum = 0.0  # type: ignore[assignment]
