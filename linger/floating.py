"""A fixed-point net computed in float: what its integers are compared with."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from linger.errors import LingerError
from linger.ops import ROWS, SITES, IntModule
from linger.ops.quant import ScaledRoundLayer

FLOATS: dict[type[nn.Module], type[nn.Module]] = {
    op.integer: op.floats[0] for op in ROWS if op.integer is not None and op.floats
}


def _in_float(module: Any, cls: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
    out: Any = cls.forward(module, *args, **kwargs)
    return out if module.normalize_data is None else _bounded(out, module.normalize_data)


def _bounded(out: Any, bound: float) -> Any:
    """What the layer's normalized twin bounds: its output, of a recurrent layer the sequence and no states."""
    if isinstance(out, Tensor):
        return out.clamp(-bound, bound)
    first, *rest = out
    if isinstance(first, PackedSequence):
        return first._replace(data=first.data.clamp(-bound, bound)), *rest
    return first.clamp(-bound, bound), *rest


def _same(x: Any) -> Any:
    return x


CLIPPED, CORRECTED = "_linger_clipped", "_linger_corrected"  # name -> (before, limit); (before, after) of the bias


@torch.no_grad()
def originals(module: nn.Module) -> dict[str, Tensor]:
    """What calibration changed of a layer's parameters, as it was before; nothing that has been changed again since."""
    found: dict[str, Tensor] = {}
    for name, (before, limit) in module.__dict__.get(CLIPPED, {}).items():
        weight = module._parameters.get(name)
        if weight is not None and torch.equal(before.to(weight).clamp(-limit, limit), weight):
            found[name] = before
    bias = module._parameters.get("bias")
    before, after = module.__dict__.get(CORRECTED, (None, None))
    if before is not None and bias is not None and torch.equal(after.to(bias), bias):
        found["bias"] = before
    return found


@torch.no_grad()
def put(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy these values into the module's parameters."""
    for name, value in values.items():
        module._parameters[name].copy_(value)  # type: ignore[union-attr]


@contextmanager
def in_float(net: nn.Module, but: Collection[nn.Module] = ()) -> Iterator[None]:
    """While this is open, the layers and calls of a fixed-point net compute in float, but for those in ``but``.

    The layers' own functions with the parameters as they were before ``calibrate`` fitted them to their grids, in the mode
    (training or eval) that the net is in.
    """
    layers = [m for m in net.modules() if isinstance(m, IntModule)]
    off = {m: m.__dict__["_linger_off"] for m in net.modules() if "_linger_off" in m.__dict__}
    forwards = {m: float_forward(m) for m in layers if m not in but}
    fitted = {m: {k: m._parameters[k].detach().clone() for k in originals(m)} for m in forwards}  # type: ignore[union-attr]
    try:
        for module in fitted:
            put(module, originals(module))
        for owner in off:
            owner._linger_off = frozenset(SITES)  # type: ignore[assignment]
        for module, forward in forwards.items():
            if forward is not None:
                module.__dict__["forward"] = forward
        for module in layers:
            module._seen_in = -1  # an exporter has nothing to learn from these forwards
        yield
    finally:
        for module, values in fitted.items():
            put(module, values)
        for owner, was in off.items():
            owner._linger_off = was  # type: ignore[assignment]
        for module in forwards:
            module.__dict__.pop("forward", None)
        for module in layers:
            module.forget()


def float_forward(module: IntModule) -> Any:
    """What stands for the module's forward; None for the site of a call, which is not reached."""
    if isinstance(module, ScaledRoundLayer):
        return _same
    cls = FLOATS.get(type(module))
    if cls is not None:
        return functools.partial(_in_float, module, cls)
    if type(module) in {op.integer for op in SITES.values()}:
        return None
    raise LingerError(f"found {type(module).__name__}, which has no float form; disable_quant it to leave it in float")
