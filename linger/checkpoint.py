"""Checkpoints of any earlier stage into any later one: one pure function, and the hooks that apply it on load.

raw         conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, ...
traced      conv.conv.weight, conv.conv.bias, conv.bn.weight, ...         (normalized nets have the same keys)
fixed point conv.weight, conv.bias (folded), conv.running_x, conv.scale_x, ...

Each fused pair is known to the innermost module that holds both layers, so that it loads alone, below any prefix and
under every name it goes by.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from linger.errors import LingerError
from linger.numerics import scale_from_running
from linger.ops import BY_FLOAT, SITES, IntModule
from linger.ops._bits import ALLOWED_DATA_BITS
from linger.ops.convbn import FUSED, folded
from linger.sites import make_site

SITE = re.compile(r"^(?:(?P<owner>.*)\.)?(?P<name>_linger_round_tensor_(?P<call>[^.]+))\.(?P<buffer>[^.]+)$")
NAME_IN_ERROR = re.compile(r'(size mismatch for |parameter named ")(.+?)(: copying|")')
CONV_PARTS = ("conv.weight", "conv.bias")
NORM_PARTS = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked")
NORM_GRIDS = ("running_x", "running_w", "scale_x", "scale_w", "scale_o")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A fused conv + bn by the names of the float net, and what folding needs.

    Attributes:
        conv: dotted name of the convolution; the fused layer and the fixed-point one stand there too.
        bn: dotted name of the batch normalization.
        eps: the batch normalization's own.
        transposed: it is a transposed convolution.
        groups: of the convolution.
        parts: what the float layers need, with shapes: ("conv.weight", (8, 3, 5, 5)), ("bn.running_mean", (8,)), ...
        integer: the layer that loads is fixed point, so the pair is folded.
    """

    conv: str
    bn: str
    eps: float
    transposed: bool
    groups: int
    parts: tuple[tuple[str, tuple[int, ...]], ...] = ()
    integer: bool = False

    def raw(self, part: str) -> str:
        """The key of ``part`` ("conv.weight", "bn.bias") in the float net."""
        owner, _, name = part.partition(".")
        return f"{self.conv if owner == 'conv' else self.bn}.{name}"

    def fused(self, part: str) -> str:
        """The key of ``part`` in the traced net."""
        return f"{self.conv}.{part}"


# --- the pure function


def remap(state_dict: Mapping[str, Tensor], plan: Iterable[Pair]) -> dict[str, Tensor]:
    """The same checkpoint under the keys of the net described by ``plan``; keys that need no change stay as they are.

    Args:
        state_dict: a raw, traced, normalized or fixed-point checkpoint, upstream's 1.1.1 included. It is not changed.
        plan: the fused pairs of the net that loads it; one that goes by two names is listed twice.

    Returns:
        A new dict. A pair for a fixed-point layer that lacks a part, or has one of another shape, is left under its
        traced keys: it cannot be folded.
    """
    plan = list(plan)
    out, moved = dict(state_dict), set()
    for p in plan:
        out.pop(f"{p.bn}._linger_ignore_parameter", None)
        apart = any(p.raw(part) in state_dict for part in NORM_PARTS)
        if p.integer and not apart:
            continue
        for part in (*CONV_PARTS, *NORM_PARTS):
            old, new = p.raw(part), p.fused(part)
            if old in state_dict and new not in state_dict:
                out[new] = state_dict[old]
                moved.add(old)
    for key in moved:
        del out[key]
    for p in plan:
        if p.integer:
            _join_grids(out, p)
            if _complete(out, p):
                _fold(out, p)
    return out


def _join_grids(state: dict[str, Tensor], p: Pair) -> None:
    """The grids of a fixed-point net that was not traced: the pair's output is what its batch normalization gave."""
    if f"{p.bn}.running_o" in state:
        state[f"{p.conv}.running_o"] = state.pop(f"{p.bn}.running_o")
        for name in NORM_GRIDS:
            state.pop(f"{p.bn}.{name}", None)


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _found(value: Any) -> str:
    return f"a param with shape {value.shape}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _complete(state: Mapping[str, Any], p: Pair) -> bool:
    """Whether every part is there in its shape."""
    return bool(p.parts) and all(_shape(state.get(p.fused(part))) == shape for part, shape in p.parts)


def _fold(state: dict[str, Tensor], p: Pair) -> None:
    part = {name: state.pop(p.fused(name)).detach().float() for name, _ in p.parts}
    state.pop(p.fused("bn.num_batches_tracked"), None)
    state[f"{p.conv}.weight"], state[f"{p.conv}.bias"] = folded(
        part["conv.weight"], part.get("conv.bias"), part.get("bn.weight"), part.get("bn.bias"),
        part["bn.running_mean"], part["bn.running_var"], p.eps, p.transposed, p.groups,
    )  # fmt: skip


def float_name(key: str, plan: Iterable[Pair]) -> str:
    """A key of the traced net in the names of the float net, for messages; any other key as it is."""
    for p in plan:
        for owner in ("conv", "bn"):
            start = p.fused(f"{owner}.")
            if key.startswith(start):
                return p.raw(f"{owner}.{key[len(start) :]}")
    return key


# --- who knows which pairs


def plan_of(root: nn.Module) -> list[Pair]:
    """The pairs fused below ``root`` so far."""
    return list(root.__dict__.get("_linger_plan", ()))


def attach(root: nn.Module, plan: list[Pair]) -> None:
    """Let ``root`` and the modules in it load checkpoints of earlier stages, as often as wanted."""
    modules = dict(root.named_modules(remove_duplicate=False))
    names: dict[nn.Module, list[str]] = {}
    for name, module in modules.items():
        names.setdefault(module, []).append(name)
    plan = [_measured(p, modules.get(p.conv)) for p in plan]
    root._linger_plan = plan  # type: ignore[assignment]
    if isinstance(root, IntModule) or type(root) in BY_FLOAT:
        return  # a single layer has the keys of its float twin, and may be swapped again
    _listen(root)
    root.load_state_dict = functools.partial(load_state_dict, root)  # type: ignore[method-assign]
    for p in plan:
        if p.conv in modules and p.bn in modules:
            _tell(modules, p, names[modules[p.conv]], names[modules[p.bn]])


def _tell(modules: Mapping[str, nn.Module], p: Pair, convs: Collection[str], bns: Collection[str]) -> None:
    """Let the holder of a pair know it, under every name of its layers; one split over several, their root too."""
    both = [(conv, max(bns, key=lambda bn: _depth(conv, bn))) for conv in convs]
    both += [(max(convs, key=lambda conv: _depth(conv, bn)), bn) for bn in bns]
    holders = {(conv, bn): ".".join(conv.split(".")[: _depth(conv, bn)]) for conv, bn in both}
    split = len({modules[holder] for holder in holders.values()}) > 1
    for (conv, bn), holder in holders.items():
        for start in dict.fromkeys((holder, "") if split else (holder,)):
            skip = len(start) + 1 if start else 0
            near = replace(p, conv=conv[skip:], bn=bn[skip:])
            _listen(modules[start])[near.conv, near.bn] = near


def _depth(conv: str, bn: str) -> int:
    """How many modules deep the innermost one is that holds both."""
    ways = zip(conv.split(".")[:-1], bn.split(".")[:-1], strict=False)
    return len(list(itertools.takewhile(lambda names: names[0] == names[1], ways)))


def _measured(p: Pair, module: nn.Module | None) -> Pair:
    """The pair with the parts of its float layers, as long as these are there."""
    if type(module) not in FUSED.values():
        return p
    held = {key: tuple(value.shape) for key, value in module.state_dict().items()}  # type: ignore[union-attr]
    return replace(p, parts=tuple((key, held[key]) for key in (*CONV_PARTS, *NORM_PARTS[:-1]) if key in held))


def _listen(module: nn.Module) -> dict[tuple[str, str], Pair]:
    """The pairs that ``module`` knows, by their names in it; it translates what it loads."""
    if "_linger_pairs" not in module.__dict__:
        module._linger_pairs = {}  # type: ignore[assignment]
        module.register_load_state_dict_pre_hook(_before_load)
        module.register_load_state_dict_post_hook(_after_load)
    return module.__dict__["_linger_pairs"]  # type: ignore[no-any-return]


def _current(module: nn.Module) -> list[Pair]:
    """The pairs that ``module`` knows, as their layers are now; one whose layer is gone is left out."""
    layers = dict(module.named_modules(remove_duplicate=False))
    found = []
    for p in module.__dict__["_linger_pairs"].values():
        layer = layers.get(p.conv)
        if isinstance(layer, IntModule):
            found.append(replace(p, integer=True))
        elif type(layer) in FUSED.values():
            found.append(p)
    return found


# --- load


def load_state_dict(root: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """``torch.nn.Module.load_state_dict`` for a traced or converted net; where it raises, the net is as it was before.

    Raises:
        LingerError: keys are missing or unexpected, or shapes differ; every key is named as in the float net.
    """
    before = _snapshot(root)
    try:
        return type(root).load_state_dict(root, state_dict, *args, **kwargs)
    except Exception as error:
        _restore(before)
        if type(error) is not RuntimeError:
            raise
        facts = "; ".join(line.strip().rstrip(".") for line in str(error).splitlines()[1:]) or str(error)
        raise LingerError(
            f"load_state_dict: {type(root).__name__}: {facts}{_prefix_hint(root, state_dict)}; allowed are checkpoints "
            "of the same net at this stage or an earlier one (float, traced, normalized, fixed point); load one of them"
        ) from None


def _prefix_hint(root: nn.Module, state_dict: Mapping[str, Any]) -> str:
    """What to do about a checkpoint of a wrapped net, as DistributedDataParallel and torch.compile make."""
    first, *others = {key.partition(".")[0] for key in state_dict} or {""}
    if others or not first or hasattr(root, first):
        return ""
    return (
        f'; every key starts with "{first}.", which '
        "torch.nn.modules.utils.consume_prefix_in_state_dict_if_present(state_dict, prefix) takes off"
    )


Snapshot = tuple[list[tuple[nn.Module, dict[str, Any]]], list[tuple[Tensor, Tensor]]]
TABLES = ("_parameters", "_buffers", "_modules", "_linger_unchecked")


def _snapshot(root: nn.Module) -> Snapshot:
    """Every table and every value that a load may change."""
    tables = [(m, {key: m.__dict__[key].copy() for key in TABLES if key in m.__dict__}) for m in root.modules()]
    return tables, [(t, t.detach().clone()) for t in (*root.parameters(), *root.buffers())]


@torch.no_grad()
def _restore(before: Snapshot) -> None:
    tables, values = before
    for module, held in tables:
        for key in TABLES:
            module.__dict__.pop(key, None)
        module.__dict__.update(held)
    for tensor, value in values:
        tensor.copy_(value)


@torch.no_grad()
def _before_load(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, _meta: Any, _strict: bool, missing: list[str],
    _unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """Bring the part of the checkpoint that is ``module``'s under its keys of today."""
    own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    plan = _current(module)
    new = remap(own, plan)
    for p in plan:
        if p.integer:
            _keep_unfolded(module, new, p, prefix, missing, errors)
    for key in own.keys() - new.keys():
        del state_dict[prefix + key]
    state_dict.update({prefix + key: value for key, value in new.items()})
    _sites_from(module, new)
    module.__dict__["_linger_load"] = prefix, errors


def _keep_unfolded(
    module: nn.Module, state: dict[str, Any], p: Pair, prefix: str, missing: list[str], errors: list[str]
) -> None:
    """A pair that cannot be folded: report exactly what it lacks, and load the values that the layer has."""
    found = {part: state.pop(p.fused(part)) for part, _ in p.parts if p.fused(part) in state}
    if not found:
        return
    state.pop(p.fused("bn.num_batches_tracked"), None)
    missing += [prefix + p.raw(part) for part, _ in p.parts if part not in found]
    errors += [
        f"size mismatch for {prefix}{p.raw(part)}: copying {_found(found[part])} from checkpoint, the shape in current "
        f"model is {torch.Size(shape)}."
        for part, shape in p.parts
        if part in found and _shape(found[part]) != shape
    ]
    for name, value in module.get_submodule(p.conv).named_parameters(recurse=False):
        state.setdefault(f"{p.conv}.{name}", value)


def _after_load(module: nn.Module, keys: Any) -> None:
    """Name what did not fit as in the float net."""
    if "_linger_load" not in module.__dict__:
        return  # a module of the user's that loads by itself
    prefix, errors = module.__dict__.pop("_linger_load")
    plan = _current(module)

    def named(key: str) -> str:
        return prefix + float_name(key[len(prefix) :], plan) if key.startswith(prefix) else key

    for names in (keys.missing_keys, keys.unexpected_keys):
        names[:] = dict.fromkeys(named(key) for key in names)
    errors[:] = [NAME_IN_ERROR.sub(lambda m: m[1] + named(m[2]) + m[3], text) for text in errors]


# --- sites


def _sites_from(root: nn.Module, state: Mapping[str, Any]) -> None:
    """Make the sites that a checkpoint holds; the next forward checks that it uses them."""
    tags: Collection[str] = SITES if "_linger_routed" in root.__dict__ else ("iq_tensor_quant",)
    modules = dict(root.named_modules(remove_duplicate=False))
    held: dict[tuple[str, str], dict[str, Any]] = {}
    for match, value in ((SITE.match(key), value) for key, value in state.items()):
        if match:
            held.setdefault((match["owner"] or "", match["name"]), {})[match["buffer"]] = value
    if held:
        _drop_unchecked(root, modules, held)
    for (owner, name), buffers in held.items():
        tag = next((t for t in tags if name.startswith(f"_linger_round_tensor_{t}_")), None)
        if tag is not None and owner in modules and not isinstance(modules[owner], IntModule):
            _site_from(root, modules[owner], tag, name, buffers)


def _drop_unchecked(root: nn.Module, modules: Mapping[str, nn.Module], held: Collection[tuple[str, str]]) -> None:
    """Remove the sites that an earlier checkpoint brought, no forward has used and this checkpoint does not hold."""
    made = [site for site in root.__dict__.get("_linger_unchecked", ()) if not site.used]
    if not made:
        return
    for owner, module in modules.items():
        for name in [n for n, child in module._modules.items() if (owner, n) not in held and child in made]:
            del module._modules[name]
    left = set(root.modules())
    root._linger_unchecked = [site for site in made if site in left]  # type: ignore[assignment]


def _site_from(root: nn.Module, owner: nn.Module, tag: str, name: str, buffers: Mapping[str, Any]) -> None:
    """One site with the ranges that the checkpoint has for it, and the width that its scale tells."""
    device = next((t.device for t in (*root.parameters(), *root.buffers())), None)
    if name not in owner._modules:
        made = make_site(owner, tag, name).to(device)
        root.__dict__.setdefault("_linger_unchecked", []).append(made)
    site: Any = owner._modules[name]
    for key in buffers:
        if key.startswith("running_") and key not in site._buffers:
            site.register_buffer(key, torch.zeros((), device=device))
    if "running_o" in buffers and "scale_o" in buffers:
        site.out_bits = _width(buffers["running_o"], buffers["scale_o"])


def _width(running: Any, scale: Any) -> int:
    """The width at which ``running`` gives ``scale``; 8 where none does."""
    if not all(isinstance(v, Tensor) and v.numel() == 1 for v in (running, scale)):
        return 8
    fits = (b for b in ALLOWED_DATA_BITS if scale_from_running(running.float().reshape(()), b) == scale.reshape(()))
    return next(fits, 8)
