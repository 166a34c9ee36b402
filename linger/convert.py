"""normalize_layers and init: swap float layers for their range-constrained and their fixed-point twins, all or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linger import checkpoint
from linger.errors import LingerError, LingerWarning, during
from linger.ops import BY_FLOAT, ROUTED, IntModule
from linger.ops._base import check_bits, dry, twin
from linger.ops._normalize import Normalized
from linger.ops.convbn import FUSED, EmptyBatchNorm
from linger.ops.quant import ScaledRoundLayer
from linger.route import make_site, route
from linger.settings import QuantMode, config
from linger.targets import target as find_target
from linger.trace import is_leaf

Types = type[nn.Module] | Iterable[type[nn.Module]]
Step = tuple[nn.Module, Callable[[], nn.Module]]

NORMALIZABLE = (*(t for op in set(BY_FLOAT.values()) if op.normalized for t in op.floats), *FUSED.values())
QUANTIZABLE = (*BY_FLOAT, *FUSED.values())
ALWAYS_QUANTIZED = (nn.ReLU6, *FUSED.values(), *(op.normalized for op in BY_FLOAT.values() if op.normalized))
DefaultNormalizeIntXModule = tuple(sorted(NORMALIZABLE, key=lambda t: t.__name__))
DefaultQuantIntXOP = tuple(sorted(QUANTIZABLE, key=lambda t: t.__name__))
# Layers that need no twin: they move or drop values, and the grid goes through.
TRANSPARENT = (
    nn.ReLU, nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Dropout, nn.Dropout1d,
    nn.Dropout2d, nn.AlphaDropout, nn.Flatten, nn.Unflatten, nn.Identity, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d, nn.PixelShuffle, nn.PixelUnshuffle, EmptyBatchNorm,
)  # fmt: skip


def _types(verb: str, wanted: Types, allowed: tuple[type[nn.Module], ...]) -> set[type[nn.Module]]:
    """The requested types as a set; a type that has no twin is an error."""
    found = set(wanted) if isinstance(wanted, Iterable) else {wanted}
    unknown = sorted(t.__name__ for t in found if t not in allowed)
    if unknown:
        names = ", ".join(sorted({t.__name__ for t in allowed}))
        raise LingerError(f"{verb}: found {', '.join(unknown)}, allowed are {names}; leave the others out")
    return found


def _named(net: nn.Module, prefix: str = "", found: dict[nn.Module, str] | None = None) -> dict[nn.Module, str]:
    """Every module once, under its first dotted name; the inside of a fused layer is not listed."""
    found = {} if found is None else found
    if net not in found:
        found[net] = prefix
        if type(net) not in FUSED.values():
            for name, child in net.named_children():
                _named(child, f"{prefix}.{name}".lstrip("."), found)
    return found


def _device(net: nn.Module) -> torch.device | None:
    return next((t.device for t in (*net.parameters(), *net.buffers())), None)


def _swap(net: nn.Module, steps: Iterable[Step]) -> nn.Module:
    """Make every new module first, then put all of them in place."""
    made = {old: make() for old, make in steps}
    for new in made.values():
        new.__dict__.pop("forward", None)
    for module in list(net.modules()):
        for name, child in module._modules.items():
            if child in made:
                module._modules[name] = made[child]
    return made.get(net, net)


def _bounds(**values: float | None) -> dict[str, float | None]:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise LingerError(f"{name} is {value}, allowed are None and numbers above 0; choose one of them")
    return values


# --- normalized float stage


def disable_normalize(module: nn.Module) -> None:
    """Keep ``module`` and everything in it as it is when ``normalize_layers`` runs."""
    for m in module.modules():
        m._linger_normalize = False  # type: ignore[assignment]


def normalize_module(
    module: nn.Module,
    type_modules: Types = DefaultNormalizeIntXModule,
    normalize_weight_value: float | None = 8,
    normalize_bias_value: float | None = 8,
    normalize_output_value: float | None = None,
) -> None:
    """Give the layers of ``module`` (itself included) of these types their own bounds for ``normalize_layers``."""
    types = _types("normalize_module", type_modules, NORMALIZABLE)
    with during("normalize_module"):
        bounds = _bounds(
            normalize_data=normalize_output_value,
            normalize_weight=normalize_weight_value,
            normalize_bias=normalize_bias_value,
        )
    for m in module.modules():
        if type(m) in types:
            m._linger_normalize = bounds  # type: ignore[assignment]


def normalize_layers(
    net: nn.Module,
    *,
    normalize_modules: Types = DefaultNormalizeIntXModule,
    normalize_weight_value: float | None = 8,
    normalize_bias_value: float | None = None,
    normalize_output_value: float | None = 8,
) -> nn.Module:
    """Swap float layers for twins whose weight, bias and output stay within +-bound, in place, keeping parameters.

    Args:
        net: the net; fused conv + bn of ``trace_layers`` are always included.
        normalize_modules: exact layer types to bound.
        normalize_weight_value: bound of weights, None for no bound.
        normalize_bias_value: bound of biases.
        normalize_output_value: bound of outputs.

    Returns:
        ``net`` (its twin where ``net`` itself is such a layer).

    Raises:
        LingerError: a type has no twin, a bound is not positive, or a layer was normalized or converted before.
    """
    types = _types("normalize_layers", normalize_modules, NORMALIZABLE)
    with during("normalize_layers"):
        common = _bounds(
            normalize_data=normalize_output_value,
            normalize_weight=normalize_weight_value,
            normalize_bias=normalize_bias_value,
        )
        steps: list[Step] = []
        fused: list[tuple[Any, dict[str, Any]]] = []
        seen = _named(net)
        for module, name in seen.items():
            given = module.__dict__.get("_linger_normalize", common)
            if given is False:
                continue
            _refuse_repeat(module, name, types)
            if type(module) in FUSED.values():
                if any(getattr(module, key) is not None for key in common):
                    raise LingerError(
                        f"{name}: found bounds, allowed is a layer without; call normalize_layers once", ""
                    )
                fused.append((module, given | {"ahead_relu": module.ahead_relu}))
            elif type(module) in types:
                steps.append((module, _normalizer(module, given)))
        for normalized, bounds in fused:
            normalized.start(**bounds)
            _freeze(normalized.bn)
        net = _swap(net, steps)
        checkpoint.attach(net, checkpoint.plan_of(net))
    return net


def _refuse_repeat(module: nn.Module, name: str, types: set[type[nn.Module]]) -> None:
    """A layer that was normalized or converted before must not be asked for again."""
    op = BY_FLOAT.get(type(module))
    if isinstance(module, IntModule):
        raise LingerError(
            f"{name}: found {type(module).__name__}, allowed are float layers; call normalize_layers before init"
        )
    if isinstance(module, Normalized) and op is not None and types.intersection(op.floats):
        raise LingerError(
            f"{name}: found {type(module).__name__}, normalized before; call normalize_layers once per layer"
        )


def _freeze(bn: nn.Module) -> None:
    if config.bn_frozen and hasattr(bn, "momentum"):
        bn.momentum = 0.0  # type: ignore[assignment]


def _normalizer(module: nn.Module, bounds: dict[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made = twin(BY_FLOAT[type(module)].normalized, module)  # type: ignore[arg-type]
        made.start(ahead_relu=getattr(module, "_linger_ahead_relu", False), **bounds)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            _freeze(made)
        return made  # type: ignore[no-any-return]

    return make


# --- fixed-point stage


def disable_quant(module: nn.Module) -> None:
    """Keep ``module`` and everything in it in float when ``init`` runs."""
    for m in module.modules():
        m._linger_quant = False  # type: ignore[assignment]


def quant_module(
    module: nn.Module,
    type_modules: Types = DefaultQuantIntXOP,
    mode: QuantMode = QuantMode.QValue,
    data_bits: int = 8,
    parameter_bits: int = 8,
    out_bits: int | None = None,
) -> None:
    """Give the layers of ``module`` (itself included) of these types their own widths for ``init``.

    Args:
        module: a layer or a container.
        type_modules: exact layer types.
        mode: ``QuantMode.QValue``, power-of-two scales.
        data_bits: width of the input, 8, 16 or 32.
        parameter_bits: width of the weights, 4, 8 or 16.
        out_bits: width of the output, 8, 16 or 32; None for ``data_bits``.
    """
    types = _types("quant_module", type_modules, QUANTIZABLE)
    bits = {"data_bits": data_bits, "parameter_bits": parameter_bits, "out_bits": out_bits or data_bits}
    with during("quant_module"):
        check_bits(**bits)
    for m in module.modules():
        if type(m) in types:
            m._linger_quant = bits  # type: ignore[assignment]


quant_module_by_type = quant_module


def quant_tensor(module: nn.Module, x: Tensor, name: str = "_default_layername", bits: int = 8) -> Tensor:
    """Inside ``module.forward``: put ``x`` on a grid of its own, kept by a child of ``module``.

    Args:
        module: the module whose forward runs.
        x: a tensor of any shape; one with a grid of ``bits`` bits is returned as it is.
        name: ends the child's name ``_linger_round_tensor_iq_tensor_quant_<name>``.
        bits: 8, 16 or 32.
    """
    child_name = f"_linger_round_tensor_iq_tensor_quant_{name}"
    child = module._modules.get(child_name)
    if child is None:
        with during("quant_tensor"):
            check_bits(data_bits=bits)
        child = make_site(module, "iq_tensor_quant", child_name)
    assert isinstance(child, ScaledRoundLayer)
    child.bits = bits
    return child(x)  # type: ignore[no-any-return]


def init(
    net: nn.Module,
    *,
    quant_modules: Types = DefaultQuantIntXOP,
    parameter_bits: int = 8,
    mode: QuantMode = QuantMode.QValue,
    data_bits: int = 8,
    out_bits: int = 8,
    target: str | None = None,
) -> nn.Module:
    """Swap layers for their fixed-point twins, in place, keeping parameters (conv + bn are folded), and route functional calls.

    Args:
        net: a float, traced or normalized net. May be called again with other ``quant_modules`` to convert more types.
        quant_modules: exact layer types to convert; normalized and fused layers and ReLU6 are always included.
        parameter_bits: width of weights, 4, 8 or 16.
        mode: ``QuantMode.QValue``, power-of-two scales.
        data_bits: width of layer inputs, 8, 16 or 32.
        out_bits: width of layer outputs, 8, 16 or 32.
        target: a chip; widths that it cannot run are refused.

    Returns:
        ``net`` (its twin where ``net`` itself is such a layer).

    Raises:
        LingerError: a type has no twin, a width is not supported, or a layer was converted before.
    """
    types = _types("init", quant_modules, QUANTIZABLE)
    bits = {"data_bits": data_bits, "parameter_bits": parameter_bits, "out_bits": out_bits}
    with during("init"):
        check_bits(**bits)
        chip = find_target(target)
        if target is not None:
            _check_target(chip, bits)
        names = _named(net)
        _refuse_second(net, names, types, bits)
        device = _device(net)
        steps: list[Step] = []
        left: list[tuple[str, str]] = []
        floats: set[nn.Module] = set()
        for module, name in names.items():
            given = module.__dict__.get("_linger_quant", bits)
            if given is False or isinstance(module, IntModule):
                floats.update(() if given else (module,))
                continue
            reason = _reason_to_stay(module)
            floats.update((module,) if reason and type(module) in BY_FLOAT else ())
            if type(module) in types or type(module) in ALWAYS_QUANTIZED:
                if reason:
                    left.append((name, f"{type(module).__name__}, {reason}"))
                else:
                    steps.append((module, _integer(module, given, device)))
            elif reason:
                left.append((name, f"{type(module).__name__}{reason}"))
        sample = net.__dict__.pop("_linger_sample", None)
        plan, calls = checkpoint.plan_of(net), net.__dict__.get("_linger_inits", ())
        net = _swap(net, steps)
        net._linger_inits = (*calls, (frozenset(types), tuple(bits.items())))  # type: ignore[assignment]
        net._linger_target = chip.name  # type: ignore[assignment]
        checkpoint.attach(net, plan)
        if not isinstance(net, IntModule):
            route(net, frozenset(config.off), floats, chip.name)
            net._linger_routed = True  # type: ignore[assignment]
        if sample is not None:
            _make_sites(net, sample, device)
    if left:
        listed = ", ".join(f"{name or 'the net'} ({what})" for name, what in left)
        warnings.warn(f"init: left in float: {listed}; disable_quant silences this", LingerWarning, stacklevel=2)
    return net


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
    if (frozenset(types), tuple(bits.items())) in net.__dict__.get("_linger_inits", ()):
        raise LingerError(
            f"found {type(net).__name__} converted before; call init once, or once for each set of quant_modules"
        )
    for module, name in names.items():
        if isinstance(module, IntModule) and module.weighted and "_linger_quant" not in module.__dict__:
            found = {key: getattr(module, key) for key in bits}
            if found != bits:
                raise LingerError(f"{name}: found {found} from an earlier init, asked for {bits}; convert a fresh net")


def _reason_to_stay(module: nn.Module) -> str:
    """Why a layer stays in float; "" for one that can be converted and for containers and layers that need no twin."""
    op = BY_FLOAT.get(type(module))
    if op is not None:
        if hasattr(module, "weight") and "weight" not in module._parameters:
            return "its weight is computed by a parametrization or hook"
        return op.integer.refuses(module)  # type: ignore[union-attr,no-any-return]
    if type(module) in (*FUSED.values(), *TRANSPARENT, *ROUTED) or isinstance(module, IntModule):
        return ""
    base = next((t for t in BY_FLOAT if isinstance(module, t)), None)
    if base is not None:
        return f", a subclass of {base.__name__}"
    return " has no fixed-point form" if is_leaf(module) and not list(module.children()) else ""


def _integer(module: nn.Module, bits: dict[str, int], device: torch.device | None) -> Callable[[], nn.Module]:
    settings = bits | {
        key: getattr(module, key, None) for key in ("normalize_data", "normalize_weight", "normalize_bias")
    }  # fmt: skip
    settings["ahead_relu"] = getattr(module, "ahead_relu", getattr(module, "_linger_ahead_relu", False))

    def make() -> nn.Module:
        if type(module) in FUSED.values():
            return module.to_integer(device=device, **settings)  # type: ignore[operator,no-any-return]
        made = twin(BY_FLOAT[type(module)].integer, module)  # type: ignore[arg-type]
        if not made.weighted:
            settings["out_bits"] = settings["data_bits"]
        made.start(device=device, **settings)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            _freeze(made)
        return made  # type: ignore[no-any-return]

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
    except RuntimeError:
        pass  # the net changed since it was traced: its first forward makes the sites, or says what is wrong
    finally:
        for m in net.modules():
            m.training = modes.get(m, net.training)
