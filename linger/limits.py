"""What ``init`` refuses for a target: layers that are beyond what the chip can run, by their own numbers and, in a traced net, by
the shape of their input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from linger.errors import LingerError
from linger.ops import HALF_UP_ONLY, Operand
from linger.ops._weighted import WeightedInt
from linger.ops.pool import AvgPool1dInt, AvgPool2dInt
from linger.rounding import HALF_UP
from linger.targets import Facts, Target
from linger.targets._measures import beyond_limit
from linger.targets._words import said


def facts_of(layer: Any) -> Facts | None:
    """A fixed-point twin as limits see it, with the input of one sample that tracing saw, or of which the channels are known.

    None for a layer that says nothing without an input.
    """
    if isinstance(layer, WeightedInt):
        return _of_weighted(layer)
    return _of_pool(layer) if isinstance(layer, (AvgPool1dInt, AvgPool2dInt)) else None


def _of_pool(layer: Any) -> Facts:
    rank = layer.rank + 2
    shape = layer.__dict__.get("_linger_shape", ())
    shape = shape if len(shape) == rank else (1,) * rank
    x = Operand(scale=1.0, bits=layer.data_bits, shape=shape)
    (node,) = layer.lower((x,), x, {})
    return Facts(op=node.op_type, shapes=(shape,), out=(), attrs=node.attrs, bits=(x.bits,), out_bits=x.bits)


def _of_weighted(layer: Any) -> Facts:
    product, weight = layer.product(), tuple(layer.weight.shape)
    channels = weight[0] if product.transposed else weight[1] * product.groups
    seen = layer.__dict__.get("_linger_shape", ())
    shape = seen if seen and len(weight) in (2, len(seen)) else (1, channels)
    whole = (*shape, *[1] * (len(weight) - len(shape)))
    attrs = product.attrs(weight, Operand(scale=1.0, bits=8, shape=whole))
    attrs["parameter_bits"] = layer.parameter_bits
    return Facts(
        op=layer.op_type, shapes=(shape, weight), out=(), attrs=attrs, bits=(layer.data_bits,), out_bits=layer.out_bits
    )  # fmt: skip


def unlike(layer: nn.Module, chip: Target) -> list[str]:
    """What a layer computes otherwise than the chip would."""
    differs = chip.rounding != HALF_UP and type(layer) in HALF_UP_ONLY
    return [f"rounds half up, allowed {chip.rounding}"] if differs else []


def errors_of(layer: nn.Module, chip: Target) -> list[str]:
    """What the chip refuses about a layer: "kernel 7, allowed 1 to 5"."""
    found, facts = unlike(layer, chip), facts_of(layer)
    if facts is None:
        return found
    for limit in chip.limits:
        beyond = beyond_limit(facts, limit) if limit.op == facts.op and limit.kind == "error" else []
        if beyond:
            number, allowed = said(limit, max(beyond, key=abs))
            found.append(f"{number}, allowed {allowed}")
    return found


def refuse_layers(
    made: Mapping[nn.Module, nn.Module], names: Mapping[nn.Module, str], chip: Target, limits: bool = True
) -> None:
    """Raise for all layers that the chip refuses, in one error.

    Args:
        made: float layer -> its fixed-point twin.
        names: float layer -> its dotted name.
        chip: the target.
        limits: False to refuse only what has other arithmetic than the chip.
    """
    each = {names[old]: (errors_of if limits else unlike)(new, chip) for old, new in made.items()}
    listed = [f"{name or 'the net'} ({'; '.join(errors)})" for name, errors in each.items() if errors]
    if listed:
        raise LingerError(
            f"{chip.name} does not run {', '.join(listed)}; change them, keep them in float with disable_quant, see the ways "
            "out with linger.check, or pass limits=False for an engine that is not the chip's"
        )
