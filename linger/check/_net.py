"""A net of any stage as the file it would become, without a change to the net."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import onnx
import torch
from torch import nn

from linger.convert import init
from linger.errors import LingerWarning
from linger.fuse import trace_layers
from linger.onnx.export import DEFAULT_OPSET, build
from linger.onnx.inputs import given
from linger.ops import IntModule
from linger.ops._base import dry
from linger.ops._normalize import Normalized
from linger.ops.convbn import EmptyBatchNorm
from linger.ops.quant import ScaledRoundLayer
from linger.targets import Target


def exported(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], chip: Target, bits: dict[str, int]) -> Any:
    """The file of a copy of ``net``, and the layers that ``init`` leaves in float."""
    made = copy.deepcopy(net)
    args, kwargs = given(made, args, kwargs)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = _converted(made, args, kwargs, chip, bits)
        ranged = _ranged(made, args, kwargs)
        proto = _built(made, args, kwargs, chip, ranged)
    left = [str(w.message) for w in said if issubclass(w.category, LingerWarning)]
    return proto, left


def _converted(
    net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], chip: Target, bits: dict[str, int]
) -> nn.Module:
    modules = [m for m in net.modules() if not isinstance(m, ScaledRoundLayer)]
    if any(isinstance(m, IntModule) for m in modules):
        return net
    if not kwargs and not any(isinstance(m, (Normalized, EmptyBatchNorm)) for m in modules):
        trace_layers(net, net, *args)
    return init(net, target=chip.name, **bits)  # type: ignore[arg-type]


def _ranged(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether every range is known: after one training forward where the net allows one on these inputs."""
    modes = {m: m.training for m in net.modules()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            net.train()
            net(*args, **kwargs)
        except Exception:  # one value per channel, for example: the forward in eval says what else is wrong
            return False
        finally:
            for m in net.modules():
                m.training = modes.get(m, False)
    return True


def _built(
    net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], chip: Target, ranged: bool
) -> onnx.ModelProto:
    if ranged:
        return build(net, args, kwargs, None, None, DEFAULT_OPSET, {}, "thinker", chip.name)[0]
    with dry():
        return build(net, args, kwargs, None, None, DEFAULT_OPSET, {}, "thinker", chip.name)[0]
