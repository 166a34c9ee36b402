"""Brevitas: its own conversion and calibration, with its fixed-point quantizers (power-of-two scales, one per tensor).

The image nets are converted as graphs, relu outputs signed as on the chip; the others layer by layer, because tracing does not
get through them or their mean over time: there sums, normalizations, GELU and softmax stay in float.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from brevitas.graph import quantize as conversion
from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
from brevitas.nn import QuantLSTM, QuantMultiheadAttention
from brevitas.quant import Int32Bias
from brevitas.quant.fixed_point import Int8ActPerTensorFixedPoint, Int8WeightPerTensorFixedPoint
from torch import nn

from benchmarks.accuracy.tasks import batches
from benchmarks.accuracy.ways import BATCH, CALIBRATION, LATER, Job, train

WHOLE, FOLDED = (
    ("residual", "mobilenet"),
    ("residual", "mobilenet", "speech"),
)  # converted as graphs; batch norms folded
WEIGHTS = {"in_proj_weight_quant", "out_proj_weight_quant", "weight_quant"}


def rows_of(rows: dict[Any, Any], job: Job) -> dict[Any, Any]:
    """Brevitas' table of layers with its float scales replaced by powers of two, and the widths asked for."""
    return {layer: row and (row[0], _options(row[1], *job.bits)) for layer, row in rows.items()}


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


def converted(job: Job) -> nn.Module:
    """The net with Brevitas' layers, not calibrated."""
    net = job.copy().eval()
    torch.backends.mha.set_fastpath_enabled(False)  # it asks for attributes that Brevitas' attention does not have
    if job.task.name in FOLDED:
        net = conversion.preprocess_for_quantize(net)
    if job.task.name not in WHOLE:
        return _attending(conversion.layerwise_quantize(net, rows_of(conversion.LAYERWISE_COMPUTE_LAYER_MAP, job)))
    identities = rows_of({"signed": conversion.QUANT_IDENTITY_MAP["signed"]}, job)
    return conversion.quantize(
        net,
        quant_identity_map=identities | {"unsigned": identities["signed"]},
        compute_layer_map=rows_of(conversion.COMPUTE_LAYER_MAP, job),
        quant_act_map=rows_of(conversion.QUANT_ACT_MAP, job),
        unsigned_act_tuple=(),
    )


def _attending(net: nn.Module) -> nn.Module:
    """PyTorch's encoder layers pass an argument that Brevitas' attention does not know."""

    def without(forward: Any, *args: Any, is_causal: bool = False, **options: Any) -> Any:
        return forward(*args, **options)

    for module in net.modules():
        if isinstance(module, QuantMultiheadAttention):
            module.forward = partial(without, module.forward)
    return net


def calibrated(job: Job) -> nn.Module:
    """Its calibration of activations, then of biases; its LSTM has only the collecting of training mode."""
    net = converted(job).eval()
    loader = batches(job.data, BATCH, 12345)[:CALIBRATION]
    recurrent = any(isinstance(m, QuantLSTM) for m in net.modules())
    with torch.no_grad():
        for x, _ in loader if recurrent else ():
            net.train()(x)
        for mode in () if recurrent else (calibration_mode, bias_correction_mode):
            with mode(net):
                for x, _ in loader:
                    net(x)
    return net


def trained(job: Job) -> nn.Module:
    """Training from the calibrated net; its scales of activations are learned."""
    return train(calibrated(job), job.data, LATER, job.rate, job.seed)
