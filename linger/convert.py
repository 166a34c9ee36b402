"""init: swap layers for their fixed-point twins, all or nothing, and route the functional calls of the net."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils import _pytree as pytree

from linger import checkpoint
from linger.errors import LingerError, LingerWarning, during
from linger.forwards import route
from linger.limits import refuse_layers
from linger.ops import BY_FLOAT, LAYERS, ROUTED, IntModule
from linger.ops._base import dry, twin
from linger.ops._bits import check_bits
from linger.ops._recurrent import HIDDEN_BITS, RecurrentInt
from linger.ops.batchnorm import BATCHNORMS
from linger.ops.convbn import FUSED, EmptyBatchNorm
from linger.ops.quant import ScaledRoundLayer
from linger.recipe import Recipe, assigned, recipe_of
from linger.settings import QuantMode, config
from linger.sites import children, make_site
from linger.swap import Step, Types, device_of, freeze, named, require_net, swap, types_of
from linger.targets import target as find_target
from linger.trace import is_leaf

LEARNED = {"running": "", "learned": "tqt", "lsq": "lsq"}
QUANTIZABLE = (*BY_FLOAT, *FUSED.values())
ALWAYS_QUANTIZED = (
    nn.ReLU6, NonDynamicallyQuantizableLinear, *FUSED.values(),
    *(op.normalized for op in BY_FLOAT.values() if op.normalized),
)  # fmt: skip
DefaultQuantIntXOP = tuple(sorted(QUANTIZABLE, key=lambda t: t.__name__))
# Layers whose function is no call with a fixed-point form, so that a subclass with a forward of its own has none.
UNCALLED = BATCHNORMS
# Layers that need no twin: they move or drop values, and the grid goes through.
TRANSPARENT = (
    nn.ReLU, nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Dropout, nn.Dropout1d,
    nn.Dropout2d, nn.AlphaDropout, nn.Flatten, nn.Unflatten, nn.Identity, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d, nn.PixelShuffle, nn.PixelUnshuffle, EmptyBatchNorm,
)  # fmt: skip


def disable_quant(module: nn.Module) -> None:
    """Keep ``module`` and everything in it in float when ``init`` runs."""
    require_net("disable_quant", module)
    for m in module.modules():
        m._linger_quant = False  # type: ignore[assignment]


def quant_module(
    module: nn.Module,
    type_modules: Types = DefaultQuantIntXOP,
    mode: QuantMode = QuantMode.QValue,
    data_bits: int = 8,
    parameter_bits: int = 8,
    out_bits: int | None = None,
    hidden_bits: int | None = None,
) -> None:
    """Give the layers of ``module`` (itself included) of these types their own widths for ``init``.

    Args:
        module: a layer or a container.
        type_modules: exact layer types.
        mode: ``QuantMode.QValue``, power-of-two scales.
        data_bits: width of the input, 8, 16 or 32.
        parameter_bits: width of the weights, 4, 8 or 16.
        out_bits: width of the output, 8, 16 or 32; None for ``data_bits``.
        hidden_bits: width of the hidden state of a recurrent layer, which is its output, 8 or 16; None for ``out_bits``.
    """
    require_net("quant_module", module)
    types = types_of("quant_module", type_modules, QUANTIZABLE)
    bits = {"data_bits": data_bits, "parameter_bits": parameter_bits, "out_bits": out_bits or data_bits}
    with during("quant_module"):
        check_bits(**bits)
        _check_mode(mode)
        hidden = _hidden(hidden_bits)
    for m in module.modules():
        if type(m) in types:
            m._linger_quant = bits | hidden  # type: ignore[assignment]


quant_module_by_type = quant_module


def quant_tensor(module: nn.Module, x: Tensor, name: str = "_default_layername", bits: int = 8) -> Tensor:
    """Inside ``module.forward``: put ``x`` on a grid of its own, kept by a child of ``module``.

    Args:
        module: the module whose forward runs.
        x: a tensor of any shape; one with a grid of ``bits`` bits is returned as it is.
        name: ends the child's name ``_linger_round_tensor_iq_tensor_quant_<name>``.
        bits: 8, 16 or 32.
    """
    require_net("quant_tensor", module)
    if not isinstance(x, Tensor) or not isinstance(name, str) or "." in name:
        raise LingerError(
            f"quant_tensor: found {type(x).__name__} under the name {name!r}, allowed are a tensor and a name without dots; "
            "pass quant_tensor(self, x, 'name')"
        )
    child_name = f"_linger_round_tensor_iq_tensor_quant_{name}"
    child = children(module).get(child_name)
    if child is None:
        with during("quant_tensor"):
            check_bits(data_bits=bits)
        child = make_site(module, "iq_tensor_quant", child_name)
    assert isinstance(child, ScaledRoundLayer)
    child.bits = bits
    return child(x)


def init(
    net: nn.Module,
    *,
    quant_modules: Types = DefaultQuantIntXOP,
    parameter_bits: int = 8,
    mode: QuantMode = QuantMode.QValue,
    data_bits: int = 8,
    out_bits: int = 8,
    hidden_bits: int | None = None,
    target: str | os.PathLike[str] | None = None,
    limits: bool = True,
    recipe: Any = None,
    observe: str = "running",
) -> nn.Module:
    """Swap layers for their fixed-point twins, in place, keeping parameters (conv + bn are folded), and route functional calls.

    Args:
        net: a float, traced or normalized net. May be called again with other ``quant_modules`` to convert more types.
        quant_modules: exact layer types to convert; normalized and fused layers and ReLU6 are always included.
        parameter_bits: width of weights, 4, 8 or 16.
        mode: ``QuantMode.QValue``, power-of-two scales.
        data_bits: width of layer inputs, 8, 16 or 32.
        out_bits: width of layer outputs, 8, 16 or 32.
        hidden_bits: width of the hidden state of recurrent layers, which is their output, 8 or 16; None for ``out_bits``.
        target: a chip, or the path of a .toml file; widths and layers that it cannot run are refused, all at once.
        limits: False to convert layers that ``target`` cannot run; its arithmetic is followed all the same.
        observe: "running", ranges follow the maximum in training; "learned" or "lsq", ranges of weights and of the outputs of layers,
            sums and products are parameters that the optimizer moves (see ``linger.param_groups``).
        recipe: widths of single layers by patterns of their names: the path of a TOML file, a mapping of patterns to settings,
            or what ``search`` returns (see ``linger.recipe``). They go before the widths above and those of ``quant_module``.

    Returns:
        ``net`` (its twin where ``net`` itself is such a layer).

    Raises:
        LingerError: a type has no twin, a width is not supported, a layer was converted before, or a pattern of
            the recipe fits none.
    """
    require_net("init", net)
    types = types_of("init", quant_modules, QUANTIZABLE)
    bits = {"data_bits": data_bits, "parameter_bits": parameter_bits, "out_bits": out_bits}
    with during("init"):
        check_bits(**bits)
        chip = find_target(target)
        if target is not None:
            _check_target(chip, bits)
        _check_mode(mode)
        if observe not in LEARNED:
            raise LingerError(f"observe is {observe!r}, allowed are {', '.join(LEARNED)}; choose one of them")
        names = named(net)
        _refuse_second(net, names, types, bits)
        if recipe is not None:
            _follow_recipe(recipe_of(recipe), names, types, bits, None if target is None else chip)
        device = device_of(net)
        steps, left, floats = _plan(names, types, bits | _hidden(hidden_bits), device)
        sample = net.__dict__.pop("_linger_sample", None)
        pairs, calls = checkpoint.plan_of(net), net.__dict__.get("_linger_inits", ())
        accept = None if target is None else functools.partial(refuse_layers, names=names, chip=chip, limits=limits)
        with torch.inference_mode(False):
            net = swap(net, steps, accept)
        net._linger_inits = (*calls, (frozenset(types), tuple(bits.items())))  # type: ignore[assignment]
        net._linger_target = chip.name  # type: ignore[assignment]
        checkpoint.attach(net, pairs)
        if not isinstance(net, IntModule):
            route(net, frozenset(config.off), floats, chip.name, bits)
            net._linger_routed = True  # type: ignore[assignment]
        else:
            net.follow_chip(chip.name)
        _learn(net, LEARNED[observe])
        if sample is not None:
            _make_sites(net, sample, device)
    if left:
        listed = ", ".join(f"{name or 'the net'} ({what})" for name, what in left)
        warnings.warn(f"init: left in float: {listed}; disable_quant silences this", LingerWarning, stacklevel=2)
    return net


def _learn(net: nn.Module, kind: str) -> None:
    """Make the ranges of layers parameters, and those of sites that are made later; not of layers that are only read."""
    read = {child for m in net.modules() if isinstance(m, nn.MultiheadAttention) for child in m.children()}
    for module in net.modules() if kind else ():
        if isinstance(module, IntModule) and module not in read:
            module.learn(kind)
        if "_linger_off" in module.__dict__:
            module._linger_learn = kind  # type: ignore[assignment]


def _follow_recipe(
    recipe: Recipe, names: Mapping[nn.Module, str], types: set[type[nn.Module]], bits: dict[str, int], chip: Any
) -> None:
    """Give every layer that the recipe names its widths, after all of it has been checked."""
    convertible = {name: m for m, name in names.items() if type(m) in types or type(m) in ALWAYS_QUANTIZED}
    given = assigned(recipe, convertible)
    for name, settings in given.items() if chip is not None else ():
        with during(f"recipe: {name}"):
            _check_target(chip, bits | {k: v for k, v in settings.items() if k in bits})
    for name, settings in given.items():
        module = convertible[name]
        before = module.__dict__.get("_linger_quant") or bits
        own = before | {k: v for k, v in settings.items() if k in bits}
        module._linger_quant = own if settings.get("quant", True) else False  # type: ignore[assignment]


def _plan(
    names: dict[nn.Module, str], types: set[type[nn.Module]], bits: dict[str, int], device: torch.device | None
) -> tuple[list[Step], list[tuple[str, str]], set[nn.Module]]:
    """What to swap, what is left in float and why (by name), and the modules whose functional calls stay in float too."""
    steps: list[Step] = []
    left: list[tuple[str, str]] = []
    floats: set[nn.Module] = set()
    for module, name in names.items():
        given = module.__dict__.get("_linger_quant", bits)
        if given is False or isinstance(module, IntModule):
            floats.update(() if given else (module,))
            continue
        reason = _reason_to_stay(module, name)
        floats.update((module,) if reason and type(module) in BY_FLOAT else ())
        if type(module) in types or type(module) in ALWAYS_QUANTIZED:
            if reason:
                left.append((name, f"{type(module).__name__}, {reason}"))
            else:
                steps.append((module, _integer(module, given, device)))
        elif reason:
            left.append((name, f"{type(module).__name__}{reason}"))
        elif type(module) in LAYERS:
            floats.add(module)
    return steps, left, floats


def _hidden(bits: int | None) -> dict[str, int]:
    """``hidden_bits`` where it is given."""
    if bits is None:
        return {}
    if not isinstance(bits, int) or bits not in HIDDEN_BITS:
        raise LingerError(
            f"hidden_bits is {bits!r}, allowed are {', '.join(map(str, HIDDEN_BITS))}; choose one of them"
        )
    return {"hidden_bits": bits}


def _check_mode(mode: QuantMode) -> None:
    if not isinstance(mode, QuantMode):
        raise LingerError(f"mode is {mode!r}, allowed is QuantMode.QValue; leave it out")


def _check_target(chip: Any, bits: dict[str, int]) -> None:
    for what, allowed in (
        ("data_bits", chip.data_bits),
        ("out_bits", chip.data_bits),
        ("parameter_bits", chip.parameter_bits),
    ):
        if bits[what] > max(allowed) or (what != "parameter_bits" and bits[what] not in allowed):
            raise LingerError(
                f"{what} is {bits[what]}, {chip.name} allows {', '.join(map(str, allowed))}; choose one of them or another target"
            )


def _refuse_second(
    net: nn.Module, names: dict[nn.Module, str], types: set[type[nn.Module]], bits: dict[str, int]
) -> None:
    """The same call twice, or another width for a converted layer, is an error; more types in a second call are not."""
    if "_linger_off" in net.__dict__ and "_linger_inits" not in net.__dict__:
        raise LingerError(f"found {type(net).__name__} converted as a part of a larger net; convert a fresh net")
    if (frozenset(types), tuple(bits.items())) in net.__dict__.get("_linger_inits", ()):
        raise LingerError(
            f"found {type(net).__name__} converted before; call init once, or once for each set of quant_modules"
        )
    for module, name in names.items():
        if isinstance(module, IntModule) and module.weighted and "_linger_quant" not in module.__dict__:
            found = {key: getattr(module, key) for key in bits}
            if found != bits:
                raise LingerError(f"{name}: found {found} from an earlier init, asked for {bits}; convert a fresh net")


def _reason_to_stay(module: Any, name: str) -> str:
    """Why a layer stays in float; "" for one that can be converted and for containers and layers that need no twin."""
    op = BY_FLOAT.get(type(module))
    if type(module) in FUSED.values() and module.bn.running_var is None:
        raise LingerError(
            f"{name}: found a batch normalization without running statistics, which cannot be folded; "
            "keep the layers apart with trace_layers(..., fuse_bn=False)"
        )
    if op is not None:
        if hasattr(module, "weight") and "weight" not in module._parameters:
            return "its weight is computed by a parametrization or hook"
        return op.integer.refuses(module)  # type: ignore[union-attr]
    if type(module) in (*FUSED.values(), *TRANSPARENT, *ROUTED) or isinstance(module, IntModule):
        return ""
    if type(module).__module__.startswith("torch.nn.utils"):  # a parametrization: it computes a weight
        return ""
    base = next((t for t in BY_FLOAT if isinstance(module, t)), None)
    if base is not None:
        return f", a subclass of {base.__name__}" if base in UNCALLED else ""
    return " has no fixed-point form" if is_leaf(module) and not list(module.children()) else ""


def _integer(module: nn.Module, bits: dict[str, int], device: torch.device | None) -> Callable[[], nn.Module]:
    settings = bits | {
        key: getattr(module, key, None) for key in ("normalize_data", "normalize_weight", "normalize_bias")
    }  # fmt: skip
    settings["ahead_relu"] = getattr(module, "ahead_relu", getattr(module, "_linger_ahead_relu", False))

    def make() -> nn.Module:
        if type(module) in FUSED.values():
            return module.to_integer(device=device, **settings)  # type: ignore[operator]
        made = twin(BY_FLOAT[type(module)].integer, module)  # type: ignore[arg-type]
        if not isinstance(made, RecurrentInt):
            settings.pop("hidden_bits", None)
        if not made.weighted:
            settings["out_bits"] = settings["data_bits"]
        made.start(device=device, **settings)
        if isinstance(module, BATCHNORMS):
            freeze(made)
        return made

    return make


@torch.no_grad()
def _make_sites(net: nn.Module, sample: Any, device: torch.device | None) -> None:
    """One forward in eval on the inputs trace_layers saw, so that every functional call has its state before training."""
    modes = {m: m.training for m in net.modules()}
    try:
        for m in modes:
            m.training = False
        moved = pytree.tree_map_only(Tensor, lambda t: t.to(device) if device else t, sample)
        with dry():
            net(*moved)
    except Exception:
        pass  # the net changed since it was traced: its first forward makes the sites, or says what is wrong
    finally:
        for m in net.modules():
            m.training = modes.get(m, net.training)
