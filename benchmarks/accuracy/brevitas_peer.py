"""Brevitas: its own conversion and calibration, with its fixed-point quantizers (power-of-two scales, one per tensor).

The image nets are converted as graphs, relu outputs signed as on the chip; the others layer by layer, because tracing does not
get through them or their mean over time: there sums, normalizations, GELU and softmax stay in float.
"""

from __future__ import annotations

import torch
from brevitas.graph import quantize as conversion
from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
from brevitas.nn import QuantLSTM
from torch import nn

from benchmarks.accuracy.tasks import batches
from benchmarks.accuracy.ways import BATCH, CALIBRATION, LATER, Job, train
from benchmarks.peers.brevitas_nets import by_layers, rows_of

WHOLE, FOLDED = (
    ("residual", "mobilenet"),
    ("residual", "mobilenet", "speech"),
)  # converted as graphs; batch norms folded


def converted(job: Job) -> nn.Module:
    """The net with Brevitas' layers, not calibrated."""
    net = job.copy().eval()
    if job.task.name in FOLDED:
        net = conversion.preprocess_for_quantize(net)
    if job.task.name not in WHOLE:
        return by_layers(net, *job.bits)
    identities = rows_of({"signed": conversion.QUANT_IDENTITY_MAP["signed"]}, *job.bits)
    return conversion.quantize(
        net,
        quant_identity_map=identities | {"unsigned": identities["signed"]},
        compute_layer_map=rows_of(conversion.COMPUTE_LAYER_MAP, *job.bits),
        quant_act_map=rows_of(conversion.QUANT_ACT_MAP, *job.bits),
        unsigned_act_tuple=(),
    )


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
