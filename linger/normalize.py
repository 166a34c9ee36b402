"""normalize_layers: swap float layers for twins whose weights, biases and outputs stay within bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from linger import checkpoint
from linger.errors import LingerError, during
from linger.ops import BY_FLOAT, IntModule
from linger.ops._base import twin
from linger.ops._normalize import Normalized
from linger.ops.batchnorm import BATCHNORMS
from linger.ops.convbn import FUSED
from linger.ops.quant import ScaledRoundLayer
from linger.swap import Step, Types, freeze, named, require_net, swap, types_of

NORMALIZABLE = (*(t for op in set(BY_FLOAT.values()) if op.normalized for t in op.floats), *FUSED.values())
DefaultNormalizeIntXModule = tuple(sorted(NORMALIZABLE, key=lambda t: t.__name__))


def _bounds(**values: float | None) -> dict[str, float | None]:
    for name, value in values.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < float("inf")):
            raise LingerError(f"{name} is {value!r}, allowed are None and numbers above 0; choose one of them")
    return values


def disable_normalize(module: nn.Module) -> None:
    """Keep ``module`` and everything in it as it is when ``normalize_layers`` runs."""
    require_net("disable_normalize", module)
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
    require_net("normalize_module", module)
    types = types_of("normalize_module", type_modules, NORMALIZABLE)
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
    require_net("normalize_layers", net)
    types = types_of("normalize_layers", normalize_modules, NORMALIZABLE)
    with during("normalize_layers"):
        common = _bounds(
            normalize_data=normalize_output_value,
            normalize_weight=normalize_weight_value,
            normalize_bias=normalize_bias_value,
        )
        steps: list[Step] = []
        fused: list[tuple[Any, dict[str, Any]]] = []
        for module, name in named(net).items():
            given = module.__dict__.get("_linger_normalize", common)
            if given is False:
                continue
            _refuse_repeat(module, name, types)
            if type(module) in FUSED.values():
                _refuse_bounds(module, name, common)
                fused.append((module, given | {"ahead_relu": module.ahead_relu}))
            elif type(module) in types:
                steps.append((module, _normalizer(module, given)))
        for normalized, bounds in fused:
            normalized.start(**bounds)
            freeze(normalized.bn)
        net = swap(net, steps)
        checkpoint.attach(net, checkpoint.plan_of(net))
    return net


def _refuse_repeat(module: nn.Module, name: str, types: set[type[nn.Module]]) -> None:
    """A layer that was normalized or converted before must not be asked for again."""
    op = BY_FLOAT.get(type(module))
    if isinstance(module, IntModule) and not isinstance(module, ScaledRoundLayer):
        raise LingerError(
            f"{name}: found {type(module).__name__}, allowed are float layers; call normalize_layers before init"
        )
    if isinstance(module, Normalized) and op is not None and types.intersection(op.floats):
        raise LingerError(
            f"{name}: found {type(module).__name__}, normalized before; call normalize_layers once per layer"
        )


def _refuse_bounds(module: Any, name: str, keys: dict[str, Any]) -> None:
    """A fused layer that has bounds was normalized before."""
    if any(getattr(module, key) is not None for key in keys):
        raise LingerError(f"{name}: found bounds, allowed is a layer without; call normalize_layers once", "")


def _normalizer(module: nn.Module, bounds: dict[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made = twin(BY_FLOAT[type(module)].normalized, module)  # type: ignore[arg-type]
        made.start(ahead_relu=getattr(module, "_linger_ahead_relu", False), **bounds)
        if isinstance(module, BATCHNORMS):
            freeze(made)
        return made  # type: ignore[no-any-return]

    return make
