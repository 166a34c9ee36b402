"""torchao's PT2E flow on the accuracy tasks; what it quantizes, and how, is in ``benchmarks.peers.pt2e_nets``."""

from __future__ import annotations

import torch
from torch import nn
from torchao.quantization.pt2e import allow_exported_model_train_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from benchmarks.accuracy.tasks import batches
from benchmarks.accuracy.ways import BATCH, CALIBRATION, LATER, Job, train
from benchmarks.peers import pt2e_nets


def prepared(job: Job, qat: bool) -> nn.Module:
    """The exported net with observers, or with fake quantization."""
    net = job.copy() if qat else job.copy().eval()
    return pt2e_nets.prepared(net, job.data[0][:4], *job.bits, qat)


def calibrated(job: Job) -> nn.Module:
    """Observed, then converted."""
    net = prepared(job, qat=False)
    net.eval()
    with torch.no_grad():
        for x, _ in batches(job.data, BATCH, 12345)[:CALIBRATION]:
            net(x)
    return allow_exported_model_train_eval(convert_pt2e(net))


def trained(job: Job) -> nn.Module:
    """Trained with fake quantization from the float net, then converted."""
    net = train(prepared(job, qat=True), job.data, LATER, job.rate, job.seed)
    net.eval()
    return allow_exported_model_train_eval(convert_pt2e(net))
