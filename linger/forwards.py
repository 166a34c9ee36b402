"""The forwards of a converted net: its own and those of the containers in it, each under a ``Route`` of its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from linger.eager import recorded
from linger.errors import LingerError
from linger.ops import FORWARDS, ROUTED, SITES, IntModule, _once, _symbolic
from linger.route import Route
from linger.sites import PREFIX
from linger.targets import target as find_target

# Layers whose function PyTorch's compiler shows to no mode; in a forward of the user's own, it stays in float there.
UNSEEN = {nn.Hardswish: F.hardswish, nn.Hardsigmoid: F.hardsigmoid}
# What was ``recorded`` where the innermost routed forward that runs began; None where none does.
_RECORDED: ContextVar[tuple[object, bool] | None] = ContextVar("_RECORDED", default=None)


def _forward(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """The user's own forward. A Sequential that iterates over itself sees its layers and not its sites."""
    own = FORWARDS.get(type(module))
    if own is not None:
        mode = Route(module)
        with mode:
            return own(mode.send, module, *args, **kwargs)
    unseen = UNSEEN.get(type(module))
    if unseen is not None:
        return Route(module).__torch_function__(unseen, (), args, kwargs | {"inplace": module.inplace})
    if not isinstance(module, nn.Sequential) or "_linger_children" in module.__dict__:
        with Route(module):
            return type(module).forward(module, *args, **kwargs)
    everything = module._modules
    module.__dict__["_linger_children"] = everything
    module.__dict__["_modules"] = {k: v for k, v in everything.items() if not k.startswith(PREFIX)}
    try:
        with Route(module):
            return type(module).forward(module, *args, **kwargs)
    finally:
        module.__dict__["_modules"] = module.__dict__.pop("_linger_children")


def routed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a converted net and of every container in it; errors get the dotted name of their layer."""
    if torch.compiler.is_compiling() and not _symbolic.exporting():
        return _forward(module, args, kwargs)
    inside = _once.FORWARD.get()  # of another module, which holds this one
    root = "_linger_routed" in module.__dict__ and inside is None
    if root and torch.is_inference_mode_enabled():
        return _without_inference_mode(module, args, kwargs)
    token, began = _once.FORWARD.set({} if inside is None else inside), _RECORDED.set(recorded())
    try:
        if root and torch.compiler.is_compiling():
            return _exported(module, args, kwargs)
        if root and not module.training:
            _symbolic.FORWARD.set(_symbolic.FORWARD.get() + 1)
        out = _forward(module, args, kwargs)
        if "_linger_unchecked" in module.__dict__:
            _check_sites(module)
        return out
    except LingerError as error:
        error.layer = next((name for name, m in module.named_modules() if m is error.module), error.layer)
        raise
    finally:
        _once.FORWARD.reset(token)
        _RECORDED.reset(began)


def contained(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of an ``nn.Sequential`` in a net: a part of that around it, or, as gradient checkpointing runs it, one of its own."""
    if torch.compiler.is_compiling() or _RECORDED.get() == recorded():
        return type(module).forward(module, *args, **kwargs)
    return routed(module, *args, **kwargs)


def _without_inference_mode(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """The same without gradients but with counted changes: only they tell a grid that an in-place call made stale."""
    with torch.inference_mode(False), torch.no_grad():
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, (args, kwargs))
        return routed(module, *args, **kwargs)


def _exported(net: nn.Module, args: Any, kwargs: Any) -> Any:
    """The forward of a converted net that ``torch.onnx.export`` traces: integer tensors inside, floats at the outputs."""
    token = _symbolic.TRACING.set(_symbolic.Tracing(target=find_target(net.__dict__.get("_linger_target"))))
    try:
        out = _forward(net, args, kwargs)
        return _symbolic.dequantized(out)
    finally:
        _symbolic.TRACING.reset(token)


def _check_sites(net: nn.Module) -> None:
    """Raise if a site made from a checkpoint's keys was not used by the forward that has just run."""
    made = net.__dict__.pop("_linger_unchecked")
    idle = [name for name, m in net.named_modules() if any(m is s for s in made) and not m.used]
    if idle:
        raise LingerError(
            f"the checkpoint holds {', '.join(idle)}, which this forward does not use; "
            "load a checkpoint of this net, or leave those keys out"
        )


def route(
    net: nn.Module, off: frozenset[str], floats: Collection[nn.Module], chip: str, bits: Mapping[str, int]
) -> None:
    """Give the net and its containers their routed forward; torch's own layers and twins keep theirs.

    Args:
        net: the converted net.
        off: tags of sites that stay in float everywhere.
        floats: modules in which all of them do: those that were left in float.
        chip: name of the target whose arithmetic its modules follow.
        bits: widths of the calls that are layers (``F.linear``), and of parameters in other calls.
    """
    for module in net.modules():
        own = not isinstance(module, IntModule) and (
            module is net
            or module in floats
            or type(module) in ROUTED
            or not type(module).__module__.startswith("torch.nn")
        )
        if (own or type(module) is nn.Sequential) and "forward" not in module.__dict__:
            forward = functools.partial(routed if own else contained, module)
            forward.__signature__ = _bare_signature(type(module).forward)  # type: ignore[attr-defined]
            module.forward = forward  # type: ignore[method-assign]
        if own:
            module._linger_off = frozenset(SITES) if module in floats else off  # type: ignore[assignment]
            module._linger_chip = chip  # type: ignore[assignment]
            module._linger_bits = dict(bits)  # type: ignore[assignment]
        if isinstance(module, IntModule):
            module.follow_chip(chip)


def _bare_signature(forward: Callable[..., Any]) -> inspect.Signature:
    """The user's parameters without ``self`` and annotations: what tools that bind inputs by name look at."""
    given = list(inspect.signature(forward).parameters.values())[1:]
    return inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in given])
