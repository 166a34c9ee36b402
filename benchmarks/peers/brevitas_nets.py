"""Brevitas: its layers and its fixed-point quantizers (power-of-two scales, one per tensor)."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from brevitas.graph import quantize as conversion
from brevitas.graph.calibrate import finalize_collect_stats
from brevitas.nn import QuantMultiheadAttention
from brevitas.quant import Int32Bias
from brevitas.quant.fixed_point import Int8ActPerTensorFixedPoint, Int8WeightPerTensorFixedPoint
from torch import Tensor, nn

from benchmarks.peers import NotRun

WEIGHTS = {"in_proj_weight_quant", "out_proj_weight_quant", "weight_quant"}


def rows_of(rows: dict[Any, Any], weights: int, data: int) -> dict[Any, Any]:
    """Brevitas' table of layers with its float scales replaced by powers of two, and these widths."""
    return {layer: row and (row[0], _options(row[1], weights, data)) for layer, row in rows.items()}


def _options(options: dict[str, Any], weights: int, data: int) -> dict[str, Any]:
    found = dict(options)
    for name in options:
        if name.endswith("bias_quant"):
            found[name] = Int32Bias
        elif name in WEIGHTS:
            found[name] = Int8WeightPerTensorFixedPoint.let(bit_width=weights)
        elif name.endswith("_quant"):
            found[name] = Int8ActPerTensorFixedPoint.let(bit_width=data)
    return found


def by_layers(net: nn.Module, weights: int, data: int) -> nn.Module:
    """``net`` converted layer by layer, for nets that tracing does not get through: weights, biases and what enters a layer.

    Sums, normalizations, pools, relu, GELU and softmax stay in float.
    """
    torch.backends.mha.set_fastpath_enabled(False)  # it asks for attributes that Brevitas' attention does not have
    return _attending(
        conversion.layerwise_quantize(net, rows_of(conversion.LAYERWISE_COMPUTE_LAYER_MAP, weights, data))
    )


def _attending(net: nn.Module) -> nn.Module:
    """PyTorch's encoder layers pass an argument that Brevitas' attention does not know."""

    def without(forward: Any, *args: Any, is_causal: bool = False, **options: Any) -> Any:
        return forward(*args, **options)

    for module in net.modules():
        if isinstance(module, QuantMultiheadAttention):
            module.forward = partial(without, module.forward)
    return net


def trainable(net: nn.Module, x: Tensor) -> nn.Module:
    """W8A8 by layers, past the collecting of statistics: its scales of activations are parameters from here on.

    Raises:
        NotRun: it has no such recurrent layer.
    """
    for kind in (nn.GRU, nn.RNN):
        if any(type(m) is kind for m in net.modules()):
            raise NotRun(f"not run, it has no {kind.__name__} and would leave it in float")
    made = by_layers(copy.deepcopy(net), 8, 8).train()
    with torch.no_grad():
        made(x)
    made.apply(finalize_collect_stats)
    return made
