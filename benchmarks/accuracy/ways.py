"""The ways of quantizing that are compared. Each takes a float net and gives one in fixed point."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import linger
from benchmarks.accuracy.tasks import Task, batches
from linger.demo_data import Split

BATCH = 100
CALIBRATION = 8  # batches
LATER = 6  # epochs of every kind of training after the float stage; the two stages share them
RATE = 1e-3
Bits = tuple[int, int]  # of weights, of activations


@dataclass(frozen=True, kw_only=True)
class Job:
    """A trained float net, what it was trained on, and the widths asked for."""

    task: Task
    net: nn.Module
    data: Split
    bits: Bits
    seed: int

    def traced(self) -> nn.Module:
        net = copy.deepcopy(self.net).train()  # PyTorch's fast path for transformers in eval hides the layers
        return linger.trace_layers(net, net, self.data[2][:1])

    def fixed(self, net: nn.Module, **options: Any) -> nn.Module:
        weights, data = self.bits
        return linger.init(net, parameter_bits=weights, data_bits=data, out_bits=data, **options)

    def calibrated(self, net: nn.Module, *args: Any, **options: Any) -> nn.Module:
        loader = batches(self.data, BATCH, 12345)[:CALIBRATION]
        return linger.calibrate(net, loader, *args, progress=False, **options)


def train(
    net: nn.Module,
    data: Split,
    epochs: int,
    rate: float,
    seed: int,
    groups: Any = None,
    stops: linger.Schedule | None = None,
) -> nn.Module:
    """AdamW on one cycle, in place; ``stops`` says when what freezes."""
    groups = groups or [{"params": list(net.parameters()), "lr": rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-2)
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peaks, total_steps=max(2, epochs * (len(data[0]) // BATCH))
    )
    for epoch in range(epochs):
        net.train()
        if stops is not None:
            stops.begin(net, epoch)
        for x, y in batches(data, BATCH, 1000 * seed + epoch):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            schedule.step()
    return net


def plain(method: str) -> Callable[[Job], nn.Module]:
    """Ranges alone: weights and biases as they are."""
    return lambda job: job.calibrated(job.fixed(job.traced()), method, weights=None, correct_bias=False)


def three_lines(job: Job) -> nn.Module:
    """trace_layers, init, calibrate as they come."""
    return job.calibrated(job.fixed(job.traced()))


def equalized(job: Job) -> nn.Module:
    """The same with equalization, where the net has pairs for it."""
    return job.calibrated(job.fixed(job.traced()), equalize=True)


def from_float(job: Job) -> nn.Module:
    """Ranges follow the maximum, from the first batch on."""
    return train(job.fixed(job.traced()), job.data, LATER, RATE, job.seed)


def two_stages(job: Job) -> nn.Module:
    """Half the epochs with bounds in float, half in fixed point."""
    net = job.traced()
    linger.normalize_layers(
        net, normalize_weight_value=8, normalize_bias_value=8, normalize_output_value=job.task.bound
    )
    train(net, job.data, LATER // 2, RATE, job.seed)
    return train(job.fixed(net), job.data, LATER - LATER // 2, RATE, job.seed)


def held(job: Job) -> nn.Module:
    """Training from the calibrated net, its ranges held."""
    return train(three_lines(job), job.data, LATER, RATE, job.seed)


def learned(kind: str) -> Callable[[Job], nn.Module]:
    """Training from the calibrated net, its ranges learned."""

    def way(job: Job) -> nn.Module:
        net = job.calibrated(job.fixed(job.traced(), observe=kind))
        groups, stops = linger.param_groups(net, lr=RATE), linger.Schedule(epochs=LATER)
        return train(net, job.data, LATER, RATE, job.seed, groups, stops)

    return way


WAYS: dict[str, Callable[[Job], nn.Module]] = {
    "PTQ, max": plain("max"),
    "PTQ, percentile": plain("percentile"),
    "PTQ, mse": plain("mse"),
    "PTQ, kl": plain("kl"),
    "PTQ, calibrate's defaults": three_lines,
    "PTQ, defaults + equalization": equalized,
    "QAT from float": from_float,
    "QAT, two stages": two_stages,
    "QAT, calibrated and held": held,
    "QAT, learned thresholds": learned("learned"),
    "QAT, learned steps": learned("lsq"),
}
