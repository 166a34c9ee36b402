"""Checkpoints of any earlier stage into any later stage: one pure function, and the hooks that apply it on load.

raw         conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, ...
traced      conv.conv.weight, conv.conv.bias, conv.bn.weight, ...         (normalized nets have the same keys)
fixed point conv.weight, conv.bias (folded), conv.running_x, conv.scale_x, ...
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linger.errors import LingerError
from linger.ops import SITES, IntModule
from linger.ops.convbn import folded
from linger.route import make_site

SITE = re.compile(r"^(?:(?P<owner>.*)\.)?(?P<name>_linger_round_tensor_(?P<rest>[^.]+))\.[^.]+$")
CONV_KEYS = ("weight", "bias")
NORM_KEYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A fused conv + bn by the names of the float net, and what folding needs. ``integer``: the target is fixed point."""

    conv: str
    bn: str
    eps: float
    transposed: bool
    groups: int
    integer: bool = False


def remap(state_dict: Mapping[str, Tensor], plan: Iterable[Pair]) -> dict[str, Tensor]:
    """The same checkpoint under the keys of the net described by ``plan``; keys that need no change stay as they are."""
    out = dict(state_dict)
    for p in plan:
        out.pop(f"{p.bn}._linger_ignore_parameter", None)
        if f"{p.bn}.running_mean" in out and f"{p.conv}.weight" in out:
            for key in CONV_KEYS:
                _rename(out, f"{p.conv}.{key}", f"{p.conv}.conv.{key}")
            for key in NORM_KEYS:
                _rename(out, f"{p.bn}.{key}", f"{p.conv}.bn.{key}")
        if p.integer and f"{p.conv}.conv.weight" in out and f"{p.conv}.bn.running_mean" in out:
            conv = {key: out.pop(f"{p.conv}.conv.{key}", None) for key in CONV_KEYS}
            bn = {key: out.pop(f"{p.conv}.bn.{key}", None) for key in NORM_KEYS}
            out[f"{p.conv}.weight"], out[f"{p.conv}.bias"] = folded(
                conv["weight"], conv["bias"], bn["weight"], bn["bias"], bn["running_mean"], bn["running_var"],  # type: ignore[arg-type]
                p.eps, p.transposed, p.groups,
            )  # fmt: skip
    return out


def _rename(state: dict[str, Tensor], old: str, new: str) -> None:
    if old in state:
        state[new] = state.pop(old)


def float_name(key: str, plan: Iterable[Pair]) -> str:
    """A key of the converted net in the names of the float net, for messages."""
    for p in plan:
        if key.startswith(f"{p.conv}.conv."):
            return f"{p.conv}.{key[len(p.conv) + 6 :]}"
        if key.startswith(f"{p.conv}.bn."):
            return f"{p.bn}.{key[len(p.conv) + 4 :]}"
    return key


def plan_of(root: nn.Module) -> list[Pair]:
    """The pairs fused below ``root`` so far."""
    return list(root.__dict__.get("_linger_plan", ()))


def attach(root: nn.Module, plan: list[Pair]) -> None:
    """Let ``root`` load checkpoints of earlier stages, as often as wanted, alone or inside a larger module."""
    if "_linger_plan" not in root.__dict__:
        root.register_load_state_dict_pre_hook(_before_load)
        root.load_state_dict = functools.partial(load_state_dict, root)  # type: ignore[method-assign]
    root._linger_plan = plan  # type: ignore[assignment]


def _current(root: nn.Module) -> list[Pair]:
    """The plan with ``integer`` as the net is now."""
    modules = dict(root.named_modules(remove_duplicate=False))
    return [
        Pair(conv=p.conv, bn=p.bn, eps=p.eps, transposed=p.transposed, groups=p.groups,
             integer=isinstance(modules.get(p.conv), IntModule))
        for p in plan_of(root)
    ]  # fmt: skip


@torch.no_grad()
def _before_load(root: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    new = remap(own, _current(root))
    for key in own:
        if key not in new:
            del state_dict[prefix + key]
    for key, value in new.items():
        state_dict[prefix + key] = value
    if root.__dict__.get("_linger_routed"):
        _sites_from(root, new)


def _sites_from(root: nn.Module, keys: Iterable[str]) -> None:
    """Make the sites that a fixed-point checkpoint holds; the next forward checks that it uses them."""
    modules = dict(root.named_modules(remove_duplicate=False))
    for key in keys:
        match = SITE.match(key)
        owner = modules.get(match["owner"] or "") if match else None
        if match is None or owner is None or isinstance(owner, IntModule):
            continue
        tag = next((t for t in SITES if match["rest"].startswith(f"{t}_")), None)
        if tag is None:
            continue
        if match["name"] not in owner._modules:
            site = make_site(owner, tag, match["name"])
            root.__dict__.setdefault("_linger_unchecked", []).append(site)
        name = key.rpartition(".")[2]
        site = owner._modules[match["name"]]  # type: ignore[assignment]
        if name.startswith("running_") and name not in site._buffers:
            reference = next(iter(site._buffers.values()), None)
            device = reference.device if reference is not None else torch.device("cpu")
            site.register_buffer(name, torch.zeros((), device=device))


def load_state_dict(root: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
    """``torch.nn.Module.load_state_dict`` for a traced or converted net.

    Raises:
        LingerError: keys are missing or unexpected, or shapes differ; every key is named as in the float net.
    """
    try:
        return type(root).load_state_dict(root, state_dict, strict, assign)
    except RuntimeError as error:
        plan = plan_of(root)
        text = re.sub(r'"([^"]+)"', lambda m: f'"{float_name(m[1], plan)}"', str(error))
        text = re.sub(r"for ([\w.]+): copying", lambda m: f"for {float_name(m[1], plan)}: copying", text)
        raise LingerError(
            f"load_state_dict: {type(root).__name__}: the checkpoint does not fit: {text}; allowed are checkpoints of the same "
            "net at this stage or an earlier one (float, traced, normalized, fixed point)"
        ) from None
