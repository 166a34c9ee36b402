"""Cross-layer equalization: the ranges of a tensor's channels brought together without a change of the float function.

A layer's output channel c is divided by s_c, and the layer that alone reads it multiplies its input channel c by s_c;
between them stand only functions with f(x / s) = f(x) / s for s > 0. With r1 and r2 the channel's largest weights there,

    s_c = sqrt(r1_c / r2_c),   so that both become sqrt(r1_c r2_c)                                      (1)

rounded to a power of two, with which float arithmetic is exact: the float net's outputs are the same bits as before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from linger.fuse import consumers, shared_parameters
from linger.numerics import pow2_round
from linger.ops._base import dry
from linger.ops.convbn import FUSED
from linger.trace import Graph, Node, Value, recorded

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
ROUNDS = 20
# Functions with f(x / s) = f(x) / s that keep channels apart; those of the second row also work along the channels' axis.
PER_CHANNEL = {
    "MaxPool1d", "MaxPool2d", "AvgPool1d", "AvgPool2d", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d", "AvgPool1dInt", "AvgPool2dInt", "AdaptiveAvgPool1dInt", "AdaptiveAvgPool2dInt", "Flatten",
    "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "flatten", "view", "reshape", "squeeze", "mean",
}  # fmt: skip
ANYWHERE = {"ReLU", "relu", "relu_", "LeakyReLU", "leaky_relu", "Dropout", "dropout", "Identity", "EmptyBatchNorm"}
FUSED_TYPES = tuple(FUSED.values())


def equalize(net: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> list[tuple[str, str]]:
    """Equalize every pair of layers of a net at any stage, in place.

    Args:
        net: a float, traced, normalized or fixed-point net. Ranges of the latter have to be chosen anew.
        inputs: what its forward takes; values do not matter.
        kwargs: keyword arguments of its forward.

    Returns:
        The pairs of dotted names. A layer whose output or weights are bounded is in none: a bound does not scale.
    """
    with dry():
        graph = recorded(net, inputs, kwargs, lenient=True)[0]
    names = dict(net.named_modules())
    found = list(pairs(net, names, graph))
    with torch.no_grad():
        for _ in range(ROUNDS):
            changed = [_balance(names[a], names[b]) for a, b in found]
            if not any(changed):
                break
    return found


def pairs(net: nn.Module, names: dict[str, nn.Module], graph: Graph) -> Iterator[tuple[str, str]]:
    """(producer, consumer) between which channels can be scaled."""
    calls, readers, tied = Counter(node.module for node in graph.nodes), consumers(graph), shared_parameters(net)

    def usable(module: nn.Module, name: str) -> bool:
        tensors = list(module.parameters())
        return (
            calls[name] == 1
            and not any(id(p) in tied for p in tensors)
            and not (module._forward_hooks or module._forward_pre_hooks)
            and all(getattr(module, f"normalize_{k}", None) is None for k in ("data", "weight", "bias"))
        )

    for node in graph.nodes:
        producer = names.get(node.module or "")
        if producer is None or not _scales(producer) or not usable(producer, node.module or ""):
            continue
        consumer = _reader(node, readers)
        if consumer is None or consumer.module is None:
            continue
        module = names[consumer.module]
        if _layer(module) is not None and usable(module, consumer.module) and _inputs(module) == _outputs(producer):
            yield str(node.module), consumer.module


def _layer(module: nn.Module) -> Any:
    """The layer that holds the weight; None where it is of no kind that can be scaled."""
    layer: Any = module.conv if isinstance(module, FUSED_TYPES) else module
    known = isinstance(layer, LAYERS) and not getattr(layer, "transposed", False)
    return layer if known and "weight" in layer._parameters else None


def _scales(module: nn.Module) -> bool:
    """Whether its output channels can be scaled."""
    layer: Any = _layer(module)
    affine = not isinstance(module, FUSED_TYPES) or module.bn.weight is not None
    return layer is not None and affine


def _outputs(module: nn.Module) -> int:
    return len(_layer(module).weight)


def _inputs(module: nn.Module) -> int:
    layer = _layer(module)
    return int(layer.weight.shape[1] * getattr(layer, "groups", 1))


def _reader(node: Node, readers: dict[int, list[Node | None]]) -> Node | None:
    """The layer that alone reads the node's result, behind functions that keep channels and scale."""
    value = node.outputs[0]
    axis = len(value.shape) - 1 if node.op.endswith(("Linear", "LinearInt")) else 1
    while True:
        after = readers.get(value.id, [])
        if len(after) != 1 or after[0] is None:
            return None
        following = after[0]
        if following.op not in PER_CHANNEL and following.op not in ANYWHERE:
            linear = following.op.endswith(("Linear", "LinearInt"))
            return following if axis == (len(value.shape) - 1 if linear else 1) else None
        made = following.outputs[0]
        if len(following.inputs()) != 1 or not _kept(following, value, made, axis):
            return None
        value = made


def _kept(node: Node, value: Value, made: Value, axis: int) -> bool:
    """Whether the call leaves the channels where they are."""
    if node.op in ANYWHERE:
        return made.shape == value.shape
    return axis == 1 and made.shape[:2] == value.shape[:2] and len(made.shape) > 1


def _rows(module: Any) -> Tensor:
    """max|w| of every output channel, of the folded weight where a batch normalization follows."""
    weight = (
        module.fold(module.bn.running_mean, module.bn.running_var)[0]
        if isinstance(module, FUSED_TYPES)
        else module.weight
    )
    return weight.abs().flatten(1).amax(1)


def _columns(module: Any) -> Tensor:
    """max|w| of every input channel."""
    layer = _layer(module)
    weight = (
        module.fold(module.bn.running_mean, module.bn.running_var)[0]
        if isinstance(module, FUSED_TYPES)
        else layer.weight
    )
    groups = getattr(layer, "groups", 1)
    grouped = weight.abs().reshape(groups, len(weight) // groups, weight.shape[1], -1)
    return grouped.amax((1, 3)).flatten()


def _balance(first: Any, second: Any) -> bool:
    """Equation (1) on one pair; whether something changed."""
    r1, r2 = _rows(first).double(), _columns(second).double()
    ratio = torch.where((r1 > 0) & (r2 > 0), r1 / r2, 1.0).sqrt().clamp(2.0**-20, 2.0**20)
    s = pow2_round(ratio.float())
    if bool((s == 1).all()):
        return False
    for p in (first.bn.weight, first.bn.bias) if isinstance(first, FUSED_TYPES) else (first.weight, first.bias):
        if p is not None:
            p.div_(s.to(p.dtype).reshape(-1, *[1] * (p.dim() - 1)))
    layer = _layer(second)
    groups = getattr(layer, "groups", 1)
    factors = s.to(layer.weight.dtype).reshape(groups, 1, -1).expand(-1, len(layer.weight) // groups, -1)
    layer.weight.mul_(factors.reshape(*layer.weight.shape[:2], *[1] * (layer.weight.dim() - 2)))
    return True
